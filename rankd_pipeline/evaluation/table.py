"""The long evaluation table: what every score, gate, slice and report picture is an aggregate of.

One row: over ``n`` samples of drop ``unit`` in ``cell``, ``model`` on ``split`` has a mean ``metric`` of ``value``.
Several rows may share all keys (metrics whose quantiles matter are written one row a sample).

    model  str      "teacher", "student_int8", "best_of_set_b", ...
    split  str      "validation", "test", "heldout_site", "heldout_band", ...
    unit   int64    drop id: samples of one drop share a topology, so drops (not rows) are what is resampled
    cell   str      "key=value|key=value": where the samples lie, e.g. "site=umi_2|band=28GHz|link=nlos"
    metric str      "top1", "l1_rsrp_loss_db", ...; calibration by confidence bin: "ece_bin_07" (confidence − correct)
                    and "confidence_bin_07"
    value  float64  mean over the n samples, in the metric's unit (rates as fractions 0..1)
    n      int64    number of samples, > 0
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rankd_pipeline.errors import RankdError

KEYS = ("model", "split", "cell", "metric")
COLUMNS = ("model", "split", "unit", "cell", "metric", "value", "n")

_DICTIONARY = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("model", _DICTIONARY),
        ("split", _DICTIONARY),
        ("unit", pa.int64()),
        ("cell", _DICTIONARY),
        ("metric", _DICTIONARY),
        ("value", pa.float64()),
        ("n", pa.int64()),
    ]
)


def format_cell(**parts: str) -> str:
    """Build a cell name: ``format_cell(site="umi_2", link="los")`` -> ``"site=umi_2|link=los"``."""
    for key, value in parts.items():
        if any(c in f"{key}{value}" for c in "|="):
            raise RankdError(f"Cell part {key}={value!r} holds '|' or '=', which separate the parts: rename it.")
    return "|".join(f"{key}={value}" for key, value in parts.items())


@lru_cache(maxsize=65536)
def parse_cell(cell: str) -> Mapping[str, str]:
    """The inverse of :func:`format_cell`; the empty cell has no parts. Read only: it is shared between callers."""
    parts = dict(part.split("=", 1) for part in cell.split("|")) if cell else {}
    return MappingProxyType(parts)


def validate_table(df: pd.DataFrame) -> pd.DataFrame:
    """Return ``df`` with exactly the columns and types above, or raise RankdError naming the column and row."""
    missing = [c for c in COLUMNS if c not in df.columns]
    extra = [c for c in df.columns if c not in COLUMNS]
    if missing or extra:
        raise RankdError(f"Evaluation table: columns missing {missing}, unknown {extra}; expected exactly {list(COLUMNS)}.")
    columns: dict[str, Any] = {}
    for name in KEYS:
        column = pd.Series(df[name]).reset_index(drop=True)
        if column.isna().any():
            row = int(np.flatnonzero(column.isna())[0])
            raise RankdError(f"Evaluation table: '{name}' is empty in row {row}; every row needs one.")
        columns[name] = column.astype("category")
        for bad in (c for c in columns[name].cat.categories if not isinstance(c, str)):
            raise RankdError(f"Evaluation table: '{name}' holds {bad!r}; expected text.")
    for cell in (c for c in columns["cell"].cat.categories if c and any("=" not in p for p in c.split("|"))):
        raise RankdError(f"Evaluation table: cell {cell!r} is not 'key=value|key=value'.")
    for name in ("unit", "n"):
        column = df[name].to_numpy()
        if not np.issubdtype(column.dtype, np.integer):
            raise RankdError(f"Evaluation table: '{name}' has type {column.dtype}; expected integers.")
        columns[name] = column.astype(np.int64)
    columns["value"] = df["value"].to_numpy(np.float64)
    _refuse("value", columns["value"], ~np.isfinite(columns["value"]), "a finite number (or no row at all)")
    _refuse("n", columns["n"], columns["n"] <= 0, "at least 1")
    return pd.DataFrame({name: columns[name] for name in COLUMNS})


def _refuse(name: str, column: np.ndarray, bad: np.ndarray, want: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise RankdError(f"Evaluation table: '{name}' is {column[row]} in row {row}; expected {want}.")


def concat_tables(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Stack tables of several models and splits into one valid table, in the order given."""
    parts = [t.astype({c: "object" for c in KEYS}) for t in tables]
    if not parts:
        raise RankdError("Evaluation table: nothing to stack; expected at least one table.")
    return validate_table(pd.concat(parts, ignore_index=True))


def write_table(df: pd.DataFrame, path: str | Path) -> None:
    """Validate and write as Parquet; the same rows in the same order give the same bytes."""
    valid = validate_table(df)
    arrays = []
    for field in SCHEMA:
        if field.name in KEYS:
            # Encoded from the text, in order of appearance: category codes depend on where the frame came from.
            arrays.append(pa.array(valid[field.name].astype("object"), pa.string()).dictionary_encode())
        else:
            arrays.append(pa.array(valid[field.name].to_numpy(), field.type))
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), str(path), compression="zstd", version="2.6")


def read_table(path: str | Path) -> pd.DataFrame:
    """Read what :func:`write_table` wrote; text columns come back as categories."""
    try:
        table = pq.read_table(str(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise RankdError(f"Evaluation table {path} cannot be read as Parquet ({error}); run the step again.") from error
    return validate_table(table.to_pandas())


def select(
    table: pd.DataFrame,
    *,
    model: str | None = None,
    split: str | None = None,
    metric: str | None = None,
    where: Mapping[str, str | list[str]] | None = None,
) -> pd.DataFrame:
    """Rows that match all that is given.

    ``where`` filters on parts of the cell, a list meaning any of its values; a ``metric`` ending in ``*`` is a prefix.
    """
    keep = np.ones(len(table), dtype=bool)
    for column, wanted in (("model", model), ("split", split)):
        if wanted is not None:
            keep &= (table[column] == wanted).to_numpy()
    if metric is not None:
        prefix = metric.removesuffix("*")
        keep &= _where(table, "metric", lambda m: m.startswith(prefix) if metric.endswith("*") else m == metric)
    if where:
        wanted_values = {key: [v] if isinstance(v, str) else list(v) for key, v in where.items()}
        keep &= _where(table, "cell", lambda c: all(parse_cell(c).get(k) in v for k, v in wanted_values.items()))
    return table.loc[keep]


def _where(table: pd.DataFrame, column: str, test: Callable[[str], bool]) -> np.ndarray:
    """``test`` of each row's text, evaluated once for each distinct value."""
    text = pd.Categorical(table[column])
    hit = np.array([test(str(c)) for c in text.categories] or [False], dtype=bool)
    return hit[text.codes]
