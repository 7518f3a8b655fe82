"""Reads a user's CSV or Parquet in batches and turns its cells into numbers in our units, each with why it is missing."""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankd_pipeline.audit.schema import ColumnSpec
from rankd_pipeline.errors import RankdError
from rankd_pipeline.ingest.source import ColumnMap, SourceConfig
from rankd_pipeline.ingest.units import converter

OK, BLANK, SENTINEL, OUT_OF_RANGE, TEXT = range(5)
REASONS = {BLANK: "empty", SENTINEL: "a sentinel", OUT_OF_RANGE: "out of range", TEXT: "not a number"}


# -- one pass -----------------------------------------------------------------------------------------------------


# -- the file -----------------------------------------------------------------------------------------------------
@dataclass
class Rows:
    """Some rows of the file: their cells [n] by column (numbers, or objects with None for nothing), and the number of each
    row as an editor shows it."""

    cells: dict[str, np.ndarray]
    number: np.ndarray

    def keep(self, mask: np.ndarray) -> "Rows":
        return Rows({name: values[mask] for name, values in self.cells.items()}, self.number[mask])


def read_rows(path: Path, cfg: SourceConfig, rejected: dict[int, str]) -> Iterator[Rows]:
    kind = cfg.format if cfg.format != "auto" else {".csv": "csv", ".txt": "csv", ".parquet": "parquet"}.get(path.suffix.lower())
    if kind is None:
        raise RankdError(f"{path.name}: neither .csv nor .parquet; set source.format to one of them.")
    if not path.is_file():
        raise RankdError(f"{path}: no such file; source.path is relative to the rankd home.")
    try:
        yield from _read_csv(path, cfg, rejected) if kind == "csv" else _read_parquet(path, cfg)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise RankdError(f"{path.name}: cannot be read as {kind} ({str(error).splitlines()[0]}).") from None


def _read_csv(path: Path, cfg: SourceConfig, rejected: dict[int, str]) -> Iterator[Rows]:
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.reader(handle, delimiter=cfg.delimiter)
        header = [name.strip() for name in next(reader, [])]
        _check_columns(path, header, cfg)
        cells: list[list[str]] = []
        numbers: list[int] = []
        for row in reader:
            if len(row) != len(header):
                if row:
                    rejected[reader.line_num] = f"{len(row)} cells, expected {len(header)} as in the header"
                continue
            cells.append(row)
            numbers.append(reader.line_num)
            if len(cells) == cfg.rows_per_shard:
                yield Rows(_by_column(header, cells), np.array(numbers))
                cells, numbers = [], []
        if cells:
            yield Rows(_by_column(header, cells), np.array(numbers))


def _read_parquet(path: Path, cfg: SourceConfig) -> Iterator[Rows]:
    with pq.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow.names, cfg)
        first = 1
        for batch in file.iter_batches(batch_size=cfg.rows_per_shard, columns=sorted(_used(cfg))):
            yield Rows(_frame(batch), np.arange(first, first + batch.num_rows))
            first += batch.num_rows


def _by_column(header: list[str], rows: list[list[str]]) -> dict[str, np.ndarray]:
    return {name: np.array(values, dtype=object) for name, values in zip(header, zip(*rows, strict=True), strict=True)}


def _frame(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Columns with nulls become objects with None, so that a null (not measured) is not mistaken for a NaN (a fault)."""
    return {
        name: np.array(array.to_pylist(), dtype=object) if array.null_count else np.asarray(array.to_numpy(zero_copy_only=False))
        for name, array in zip(batch.schema.names, batch.columns, strict=True)
    }


def _used(cfg: SourceConfig) -> dict[str, str]:
    """Their column -> the key of the map that asks for it; patterns are spelt out where the shape is known."""
    used: dict[str, str] = {}
    for where, columns in (("columns", cfg.columns), ("truth", cfg.truth), ("label", {"": cfg.label} if cfg.label else {})):
        for name, column in columns.items():
            if column.source is not None:
                for theirs in spelt(column, column.shape):
                    used.setdefault(theirs, f"{where}.{name}".rstrip("."))
    for theirs in (cfg.drop.column, *cfg.drop.by):
        if theirs:
            used.setdefault(theirs, "drop")
    return used


def spelt(column: ColumnMap, shape: tuple[int, ...]) -> list[str]:
    """The names of a column's components in the file, last axis fastest."""
    name = column.source or ""
    if "{i}" not in name:
        return [name]
    times = range(shape[0]) if "{t}" in name and len(shape) > 1 else [0]
    return [
        name.replace("{t}", str(t)).replace("{i}", str(i + column.first)) for t in times for i in range(shape[-1] if shape else 0)
    ]


def _check_columns(path: Path, header: list[str], cfg: SourceConfig) -> None:
    repeated = [name for name, n in Counter(header).items() if n > 1]
    if repeated:
        raise RankdError(f"{path.name}: column {repeated[0]!r} is there twice; give every column a name of its own.")
    absent = [(theirs, key) for theirs, key in _used(cfg).items() if theirs not in header]
    if absent:
        theirs, key = absent[0]
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        shown = ", ".join(header[:8]) + (", …" if len(header) > 8 else "")
        raise RankdError(f"{path.name}: column {theirs!r}{more} is missing (source.{key} asks for it); found {shown}.")


# -- cells --------------------------------------------------------------------------------------------------------
@dataclass
class Cells:
    """Values [n, width] in our unit, NaN where there is none, and why [n, width] (OK, BLANK, SENTINEL, ...)."""

    values: np.ndarray
    why: np.ndarray


def numbers(rows: Rows, names: list[str], column: ColumnMap, spec: ColumnSpec, file: str) -> Cells:
    """Parse the cells of the named columns.

    Raises: RankdError for NaN or infinity that no sentinel declares: a log that writes them has lost something.
    """
    texts = {str(s).strip().lower() for s in column.sentinels if isinstance(s, str)}
    numeric = np.array([s for s in column.sentinels if not isinstance(s, str)], float)
    values = np.empty((len(rows.number), len(names)))
    why = np.zeros(values.shape, np.int8)
    for j, name in enumerate(names):
        cell, why[:, j] = _parse(rows.cells[name], texts)
        bad = (why[:, j] == OK) & ~np.isfinite(cell)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise RankdError(
                f"{file}, row {rows.number[at]}, column {name!r}: found {cell[at]:g}, expected a number in "
                f"{column.unit or spec.unit or 'plain units'} or nothing; if it means 'not measured', "
                'add "nan" to the column\'s sentinels.'
            )
        why[(why[:, j] == OK) & np.isin(cell, numeric), j] = SENTINEL
        values[:, j] = cell
    return _in_our_unit(values, why, column, spec, file)


def _parse(column: np.ndarray, sentinels: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """(numbers [n], NaN where there is none; why [n])."""
    why = np.zeros(len(column), np.int8)
    if column.dtype.kind in "iufb":  # Parquet: typed already
        cell = column.astype(float)
        if "nan" in sentinels:
            why[np.isnan(cell)] = SENTINEL
        return cell, why
    # Parquet gives None for a null and its own types for the rest, CSV gives text. Few distinct texts fill a column.
    known = {cell: _one(cell, sentinels) for cell in set(column.tolist())}
    both = np.array([known[cell] for cell in column.tolist()]).reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].astype(np.int8)


def _one(cell: object, sentinels: set[str]) -> tuple[float, int]:
    """(number or NaN, why) of one cell."""
    text = "" if cell is None else str(cell).strip().lower()
    if not text:
        return np.nan, BLANK
    if text in sentinels:
        return np.nan, SENTINEL
    try:
        return float(text), OK
    except ValueError:
        return np.nan, TEXT


def _in_our_unit(values: np.ndarray, why: np.ndarray, column: ColumnMap, spec: ColumnSpec, file: str) -> Cells:
    low, high = spec.valid_range or (-np.inf, np.inf)
    where = f"{file}: source.columns.{spec.name}"
    result = np.full(values.shape, np.nan)
    open_ = why == OK
    for unit in (column.unit, *column.also):
        converted = converter(spec.unit, unit, where)(values)
        fits = open_ & (converted >= low) & (converted <= high)
        result[fits] = converted[fits]
        open_ &= ~fits
    why[open_] = OUT_OF_RANGE
    return Cells(result, why)


def names_of(rows: Rows, column: ColumnMap) -> np.ndarray:
    """Category names [n] (str); "" where the cell is empty or a sentinel."""
    if column.value is not None:
        return np.full(len(rows.number), str(column.value), object)
    names = np.array(["" if v is None or v != v else str(v).strip() for v in rows.cells[column.source or ""]], dtype=object)
    empty = {str(s) for s in column.sentinels}
    return np.array(["" if n in empty else column.values.get(n, n) for n in names], dtype=object)
