"""The contract of telemetry: which columns a Parquet file from the field has, and what makes a file or a row unusable.

docs/telemetry.md is the same contract for people. Anyone may write such a file; nothing here is particular to rankd.
Light: pyarrow and numpy only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema, as_column
from rankd_pipeline.ran_functions.contract import ESTIMATE_AND_HALF_WIDTH, RanFunction
from rankd_pipeline.store.tensors import column_array, tensor_array

SOURCE = "telemetry"
"""What telemetry rows are called as a source, once they have joined a corpus."""
MAX_TEXT = 200
BAD_ROWS = 0.01
"""A file with a larger share of unusable rows is set aside whole: whoever wrote it has a fault."""


class Unusable(Exception):
    """Why a file is set aside, in one sentence."""


@dataclass(frozen=True)
class Quantity:
    """A radio quantity that a base station estimates beside the decision.

    error: one standard deviation of a usual estimator; in the quantity's unit, or relative where `relative`.
    """

    name: str
    title: str
    unit: str
    valid_range: tuple[float, float]
    error: float
    relative: bool


CONTEXT: tuple[Quantity, ...] = (
    Quantity("delay_spread_ns", "delay spread", "ns", (0.0, 1e6), 0.15, True),
    Quantity("doppler_hz", "Doppler", "Hz", (0.0, 1e5), 0.10, True),
    Quantity("k_factor_db", "K-factor", "dB", (-100.0, 100.0), 2.0, False),
    Quantity("angle_spread_deg", "angle spread", "deg", (0.0, 180.0), 0.10, True),
    Quantity("snr_db", "power", "dB", (-100.0, 150.0), 1.0, False),
)
"""Optional columns `<name>` and `<name>_error` (float32, null where unknown)."""


def error_column(name: str) -> str:
    return f"{name}_error"


@dataclass(frozen=True)
class TelemetrySchema:
    """The columns of one pipeline's telemetry.

    required and optional by name; classes: of the label, 0 for a tensor label of `label_shape`; not_asked: rows [n] of
    columns that the deployed model cannot have decided, and how one sees that.
    """

    required: Mapping[str, ColumnSpec]
    optional: Mapping[str, ColumnSpec]
    classes: int
    label_shape: tuple[int, ...]
    not_asked: Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, str]]

    @property
    def features(self) -> tuple[ColumnSpec, ...]:
        """Feature and mask columns, as the corpus has them."""
        return tuple(spec for spec in self.required.values() if spec.role in ("feature", "mask"))


OWN = (
    ColumnSpec(name="time_s", dtype="float64", unit="s since 1970-01-01 UTC", valid_range=(0.0, 1e11), role="context"),
    ColumnSpec(name="session", dtype="int64", role="unit"),
    ColumnSpec(name="site", dtype="string", role="key"),
    ColumnSpec(name="model", dtype="string", role="key"),
    ColumnSpec(name="confidence", dtype="float32", unit="1", nullable=True, role="context"),
    ColumnSpec(name="latency_us", dtype="float32", unit="us", valid_range=(0.0, 1e9), role="context"),
)
FILLED = ("sample_id", "group", "source", "scenario", "split", "labelled")
"""Corpus columns that telemetry does not carry: rankd fills them when rows join a corpus."""


def telemetry_schema(function: RanFunction, cfg: Any, budget_us: float) -> TelemetrySchema:
    """The contract of a pipeline: its own columns, the features of its corpus, its model's decision."""
    corpus: CorpusSchema = function.schema(cfg)
    required = {spec.name: spec for spec in OWN}
    optional: dict[str, ColumnSpec] = {}
    for spec in corpus.columns:
        if spec.name in required or spec.name == corpus.unit_column or spec.name in FILLED:
            continue
        carried = spec.role in ("feature", "mask") or spec.name in (corpus.band_column, *function.feature_columns)
        (required if carried else optional)[spec.name] = spec
    answer = function.answer(cfg, budget_us)
    required["output"] = ColumnSpec(
        name="output", dtype="float32", axes=answer.axes, shape=answer.shape, unit=answer.unit, role="context"
    )
    for quantity in CONTEXT:
        if quantity.name in required:  # a function that decides by it has it among its features
            continue
        common = {"dtype": "float32", "unit": quantity.unit, "nullable": True, "role": "context"}
        optional[quantity.name] = ColumnSpec(name=quantity.name, valid_range=quantity.valid_range, **common)
        optional[error_column(quantity.name)] = ColumnSpec(
            name=error_column(quantity.name), valid_range=(0.0, quantity.valid_range[1]), **common
        )
    # An answer with its uncertainty is held against what it estimates.
    label_shape = answer.shape[1:] if answer.axes[:1] == (ESTIMATE_AND_HALF_WIDTH,) else answer.shape
    return TelemetrySchema(required, optional, corpus.label.classes, label_shape, lambda columns: function.not_asked(cfg, columns))


# -- reading ----------------------------------------------------------------------------------------------------------
def read_file(path: Path, schema: TelemetrySchema) -> tuple[dict[str, np.ndarray], int]:
    """(columns of the usable rows, number of rows left out) of one file.

    Arrays by name, first axis = row: every required column, every optional one (NaN where absent or null), `has_label`
    (bool) and, where any row has one, `label`.
    Raises: Unusable with the reason why the file is none.
    """
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise Unusable(f"not a readable Parquet file ({str(error).splitlines()[0][:200]})") from None
    if not table.num_rows:
        raise Unusable("it has no rows")
    missing = [name for name in schema.required if name not in table.column_names]
    if missing:
        raise Unusable(f"column {missing[0]!r} is missing; expected {', '.join(schema.required)}")
    columns, good, why = {}, np.ones(table.num_rows, bool), ""
    for name, spec in {**schema.required, **schema.optional}.items():
        required = name in schema.required
        if name not in table.column_names:
            columns[name] = np.full(table.num_rows, np.nan, np.float32)
            continue
        values, usable = _column(table[name], spec, required)
        columns[name] = values
        if required and not usable.all():
            why = why or f"column {name!r}, row {int((~usable).argmax()) + 1}: missing, not finite or out of its range"
            good &= usable
    for spec in schema.features:
        if spec.role == "feature":
            inside = _in_range(columns[spec.name], spec, columns.get(spec.mask or ""))
            if not inside.all():
                why = why or f"column {spec.name!r}, row {int((~inside).argmax()) + 1}: outside {spec.valid_range} {spec.unit}"
                good &= inside
    other, how = schema.not_asked(columns)
    if other.any():
        why = why or f"row {int(other.argmax()) + 1}: {how}"
        good &= ~other
    label, has_label, bad = _labels(table, schema)
    if bad.any():
        why = why or f"column 'label', row {int(bad.argmax()) + 1}: no label of this function"
        good &= ~bad
    left_out = int((~good).sum())
    if left_out > BAD_ROWS * len(good):
        raise Unusable(f"{left_out} of {len(good)} rows cannot be used; {why}")
    columns["has_label"] = has_label
    if label is not None:
        columns["label"] = label
    return {name: values[good] for name, values in columns.items()}, left_out


def _column(column: pa.ChunkedArray, spec: ColumnSpec, required: bool) -> tuple[np.ndarray, np.ndarray]:
    """(values [n, *shape], usable [n]) of a column, cast to its type; what is null or not finite is not usable.

    Range is checked here for plain columns; features have a mask and are checked with it.
    """
    n = len(column)
    if spec.dtype == "string":
        try:
            values = np.array([value if isinstance(value, str) else "" for value in column.to_pylist()], dtype=object)
        except UnicodeDecodeError:
            raise Unusable(f"column {spec.name!r}: it holds bytes that are no UTF-8 text") from None
        return values, np.array([0 < len(value) <= MAX_TEXT for value in values])
    present = ~column.combine_chunks().is_null().to_numpy(zero_copy_only=False) if column.null_count else np.ones(n, bool)
    values = _numbers(column, spec)
    finite = np.isfinite(values.reshape(n, -1).astype(np.float64)).all(axis=1)
    usable = present & finite
    if spec.valid_range is not None and not spec.shape:
        usable &= (values >= spec.valid_range[0]) & (values <= spec.valid_range[1])
    if not required or spec.nullable:
        return (np.where(usable, values, np.nan) if values.dtype.kind == "f" else values), np.ones(n, bool)
    return values, usable


def _numbers(column: pa.ChunkedArray, spec: ColumnSpec) -> np.ndarray:
    """Values as [n, *shape] of the column's type; tensors may come as fixed-shape tensors or as lists of one length."""
    kind = column.type
    dtype = np.dtype({"bool": "uint8"}.get(spec.dtype, spec.dtype))
    try:
        if isinstance(kind, pa.FixedShapeTensorType):
            if tuple(kind.shape) != spec.shape:
                raise Unusable(f"column {spec.name!r}: shape {tuple(kind.shape)}, expected {spec.shape}")
            return column_array(column).astype(dtype)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            flat = np.asarray(column.to_pylist(), dtype=np.float64)
            return flat.reshape(len(column), *spec.shape).astype(dtype)
        if spec.shape or not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise Unusable(f"column {spec.name!r}: type {kind}, expected {spec.dtype}{list(spec.shape) or ''}")
        values = column.combine_chunks().to_numpy(zero_copy_only=False)
        return (
            np.where(np.isfinite(values.astype(np.float64)), values, 0).astype(dtype)
            if dtype.kind in "iu"
            else values.astype(dtype)
        )
    except (ValueError, TypeError, pa.ArrowException):
        raise Unusable(f"column {spec.name!r}: type {kind} does not hold {spec.dtype} of shape {spec.shape}") from None


def _in_range(values: np.ndarray, spec: ColumnSpec, mask: np.ndarray | None) -> np.ndarray:
    """[n] whether every measured value of a feature lies in its physical range."""
    if spec.valid_range is None:
        return np.ones(len(values), bool)
    inside = np.asarray((values >= spec.valid_range[0]) & (values <= spec.valid_range[1]))
    if mask is not None:
        inside = inside | (mask == 0)
    return np.asarray(inside.reshape(len(values), -1).all(axis=1))


def _labels(table: pa.Table, schema: TelemetrySchema) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """(label [n] or [n, ...] or None, has_label [n], bad [n])."""
    n = table.num_rows
    none = np.zeros(n, bool)
    if "label" not in table.column_names or table["label"].null_count == n:
        return None, none, none
    column = table["label"].combine_chunks()
    has = ~column.is_null().to_numpy(zero_copy_only=False)
    if schema.classes:
        if not pa.types.is_integer(column.type):
            raise Unusable(f"column 'label': type {column.type}, expected whole numbers from 0 to {schema.classes - 1}")
        label = np.nan_to_num(column.to_numpy(zero_copy_only=False).astype(np.float64), nan=0.0).astype(np.int64)
        return label.astype(np.int32), has, has & ((label < 0) | (label >= schema.classes))
    if not isinstance(column.type, pa.FixedShapeTensorType):
        raise Unusable(f"column 'label': type {column.type}, expected a fixed-shape tensor")
    shape = tuple(column.type.shape)
    if shape != schema.label_shape:
        raise Unusable(f"column 'label': shape {shape}, expected {schema.label_shape}")
    flat = np.zeros((n, int(np.prod(shape))), np.float32)
    flat[has] = column.filter(pa.array(has)).to_numpy_ndarray().reshape(-1, flat.shape[1])
    # Parquet gives no tensor back that is null, so a row without a label is one of NaN.
    has = has & ~np.isnan(flat).all(axis=1)
    return np.where(has[:, None], flat, 0).reshape(n, *shape), has, has & ~np.isfinite(flat).all(axis=1)


# -- writing ----------------------------------------------------------------------------------------------------------
def table_of(columns: Mapping[str, np.ndarray | Sequence[Any]], schema: TelemetrySchema) -> pa.Table:
    """A table that keeps the contract, from arrays by name; `has_label` says which rows of `label` are real."""
    arrays: dict[str, pa.Array] = {}
    for name, spec in {**schema.required, **schema.optional}.items():
        if name not in columns:
            continue
        values = columns[name]
        if spec.dtype == "string" or spec.shape:
            arrays[name] = as_column(values, spec)
        else:
            numbers = np.asarray(values)
            unknown = np.isnan(numbers) if numbers.dtype.kind == "f" else np.zeros(len(numbers), bool)
            arrays[name] = pa.array(numbers, type=as_column([], spec).type, mask=unknown)
    if "label" in columns:
        arrays["label"] = _label_array(np.asarray(columns["label"]), np.asarray(columns["has_label"]))
    return pa.table(arrays)


def _label_array(label: np.ndarray, has: np.ndarray) -> pa.Array:
    if label.ndim == 1:
        return pa.array(label.astype(np.int32), mask=~has)
    there = has.reshape(-1, *[1] * (label.ndim - 1))
    return tensor_array(np.where(there, label, np.nan).astype(np.float32))
