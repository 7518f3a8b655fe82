"""What a corpus must look like: the columns, units and ranges that a RAN function promises and the audit checks."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rankd_pipeline.store.tensors import tensor_array

Role = Literal["id", "unit", "key", "feature", "mask", "context"]
ARROW_TYPES: dict[str, pa.DataType] = {
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnSpec(_Frozen):
    """One column. A column with a `shape` is an Arrow fixed-shape tensor, one tensor a row.

    `mask` names the column that says which values exist (1 = measured); a missing value is mask 0 and value 0.
    `valid_range` is inclusive, in `unit`. `categories` are the only values a key may take, each of them expected.
    `expected_missing` is the share of values that is absent by design (only 4 of 16 beams reported: 0.75); what is too weak to
    be measured comes on top. `padded_by` names the key whose groups have shapes of their own, padded to this one.
    """

    name: str
    dtype: Literal["int8", "int16", "int32", "int64", "uint8", "float32", "float64", "bool", "string"]
    axes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    unit: str = ""
    valid_range: tuple[float, float] | None = None
    mask: str | None = None
    sentinels: tuple[float, ...] = ()
    nullable: bool = False
    role: Role = "feature"
    categories: tuple[str, ...] = ()
    expected_missing: float = Field(default=0.0, ge=0.0, lt=1.0)
    padded_by: str | None = None

    @model_validator(mode="after")
    def _axes_fit_shape(self) -> "ColumnSpec":
        if self.axes and len(self.axes) != len(self.shape):
            raise ValueError(f"column {self.name!r}: {len(self.axes)} axes for shape {self.shape}")
        return self

    @property
    def width(self) -> int:
        """Number of values a row holds in this column."""
        return int(np.prod(self.shape)) if self.shape else 1


class LabelSpec(_Frozen):
    """The label: a class index in [0, classes). `classes` 0 says that this function has no class labels."""

    classes: int = Field(ge=0)
    name: str = "label"


class SourceInfo(_Frozen):
    """Where rows come from: who owns them and whether they, or a model that saw them, may leave the premises."""

    name: str
    owner: str
    may_leave: bool
    kind: Literal["simulation", "drive_test", "network_log", "laboratory", "other"] = "simulation"


class CorpusSchema(_Frozen):
    """All columns of a corpus' feature table and how they hang together.

    `unit_column` names what is split whole (a drop, a trajectory; whole numbers). `time_column` (seconds) never falls
    inside a unit, nor from unit to unit of a series, which `series_columns` name (default: source, site and band).
    `constant_within` maps a column to the columns that may have only one value for each of its values (default: a unit has
    one source, site, band). `balance_columns` are the scenarios that must be balanced. `held_out` maps a split to the column
    whose values in it appear in no training, validation or test row (default: heldout_site and heldout_band).
    """

    columns: tuple[ColumnSpec, ...]
    unit_column: str = "drop_id"
    split_column: str = "split"
    site_column: str | None = None
    band_column: str | None = None
    source_column: str | None = None
    label: LabelSpec = LabelSpec(classes=0)
    id_column: str = "sample_id"
    labelled_column: str | None = "labelled"
    time_column: str | None = "time_s"
    series_columns: tuple[str, ...] = ()
    constant_within: dict[str, tuple[str, ...]] = {}
    balance_columns: tuple[str, ...] = ()
    held_out: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: dict[str, Any]) -> dict[str, Any]:
        places = tuple(data[k] for k in ("source_column", "site_column", "band_column") if data.get(k))
        held_out = {"heldout_site": data.get("site_column"), "heldout_band": data.get("band_column")}
        return {
            "series_columns": places,
            "constant_within": {data.get("unit_column", "drop_id"): places} if places else {},
            "held_out": {split: column for split, column in held_out.items() if column},
            **data,
        }

    @model_validator(mode="after")
    def _names_exist(self) -> "CorpusSchema":
        names = [c.name for c in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("two columns of the schema share a name")
        wanted = [
            self.unit_column,
            self.split_column,
            self.id_column,
            self.site_column,
            self.band_column,
            self.source_column,
            *self.series_columns,
            *self.balance_columns,
            *self.constant_within,
            *(c.mask for c in self.columns),
            *(c.padded_by for c in self.columns),
            *(n for v in self.constant_within.values() for n in v),
            *self.held_out.values(),
        ]
        unknown = sorted({n for n in wanted if n} - set(names))
        if unknown:
            raise ValueError(f"the schema refers to columns it does not declare: {', '.join(unknown)}")
        return self

    def column(self, name: str) -> ColumnSpec:
        """The column of that name; KeyError if there is none."""
        return next(c for c in self.columns if c.name == name)

    def has(self, name: str | None) -> bool:
        """Whether the schema declares a column of that name."""
        return name is not None and any(c.name == name for c in self.columns)

    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema that a feature table of this corpus has."""
        return pa.schema([pa.field(c.name, arrow_type(c)) for c in self.columns])


def arrow_type(column: ColumnSpec) -> pa.DataType:
    """The Arrow type of a column: the plain type, or a fixed-shape tensor of it."""
    plain = ARROW_TYPES[column.dtype]
    return pa.fixed_shape_tensor(plain, column.shape) if column.shape else plain


def as_column(values: np.ndarray | Sequence, column: ColumnSpec) -> pa.Array:
    """Values [rows, *shape], or a list of strings, as the Arrow array that the schema asks for."""
    plain = ARROW_TYPES[column.dtype]
    if column.shape:
        return tensor_array(np.asarray(values, dtype=plain.to_pandas_dtype()).reshape(-1, *column.shape))
    return pa.array(values, type=plain, from_pandas=False)
