"""Turns a user's own Parquet or CSV of measurements into the corpus format, by a column map with units."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rankd_pipeline.audit.schema import ARROW_TYPES, ColumnSpec, CorpusSchema, as_column
from rankd_pipeline.errors import RankdError
from rankd_pipeline.ingest.cells import (
    BLANK,
    OK,
    OUT_OF_RANGE,
    REASONS,
    SENTINEL,
    TEXT,
    Cells,
    Rows,
    names_of,
    numbers,
    read_rows,
    spelt,
)
from rankd_pipeline.ingest.source import ColumnMap, DropRule, SourceConfig, load_source
from rankd_pipeline.ingest.units import likely_units
from rankd_pipeline.settings import inside

__all__ = ["Ingest", "SourceConfig", "ingest", "load_source"]


@dataclass
class _Parsed:
    """Rows in our columns, before splits: features and truth as arrays, drop number, whether each row can be evaluated."""

    columns: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]
    drop: np.ndarray
    labelled: np.ndarray
    complete: np.ndarray
    number: np.ndarray


@dataclass
class _Tally:
    """What was left out in a pass, and why."""

    rejected: dict[int, str] = field(default_factory=dict)
    masked: Counter[tuple[str, str]] = field(default_factory=Counter)
    first_row: dict[tuple[str, str], int] = field(default_factory=dict)
    converted: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[float]] = field(default_factory=dict)
    first_outside: dict[str, int] = field(default_factory=dict)
    rows: int = 0


class _Drops:
    """Gives each row its drop, over batches."""

    def __init__(self, rule: DropRule) -> None:
        self.rule = rule
        self.count = 0
        self._of: dict[tuple, int] = {}
        self._last: dict[tuple, float] = {}

    def assign(self, rows: Rows, site: np.ndarray, band: np.ndarray, time: np.ndarray) -> np.ndarray:
        names = [self.rule.column] if self.rule.column else list(self.rule.by)
        parts = [[str(v).strip() for v in rows.cells[n]] for n in names]
        drops = np.empty(len(rows.number), np.int64)
        for r, key in enumerate(zip(*parts, strict=True)):
            if not self.rule.column:
                key = (*key, site[r], band[r])
                step = time[r] - self._last.get(key, -np.inf)
                if not 0 <= step <= self.rule.gap_s:
                    self._of.pop(key, None)
                self._last[key] = time[r]
            if key not in self._of:
                self._of[key] = self.count
                self.count += 1
            drops[r] = self._of[key]
        return drops


class _Pass:
    """Reads the file from start to end once, parsing each batch. Two passes give the same rows."""

    def __init__(self, path: Path, cfg: SourceConfig, schema: CorpusSchema) -> None:
        self.path, self.cfg, self.schema = path, cfg, schema
        self.tally = _Tally()
        self._drops = _Drops(cfg.drop)
        self._past: dict[int, deque] = {}

    def __iter__(self) -> Iterator[_Parsed]:
        for rows in read_rows(self.path, self.cfg, self.tally.rejected):
            self.tally.rows += len(rows.number)
            parsed = self._parse(rows)
            if len(parsed.number):
                yield parsed

    def _parse(self, rows: Rows) -> _Parsed:
        cfg, schema, n = self.cfg, self.schema, len(rows.number)
        good = np.ones(n, bool)
        columns: dict[str, np.ndarray] = {}
        for spec in schema.columns:
            if spec.name == schema.labelled_column or spec.role in ("mask", "unit", "id") or spec.name == schema.split_column:
                continue
            if spec.name == schema.source_column:
                columns[spec.name] = np.full(n, cfg.name, object)
            elif spec.dtype == "string":
                columns[spec.name] = self._category(rows, spec, good)
            else:
                columns.update(self._measured(rows, spec, good))
        truth, complete, labelled = self._truth(rows, good)
        kept = rows.keep(good)
        columns = {name: values[good] for name, values in columns.items()}
        site = columns.get(schema.site_column or "", np.full(len(kept.number), ""))
        band = columns.get(schema.band_column or "", np.zeros(len(kept.number)))
        time = columns.get(schema.time_column or "", np.zeros(len(kept.number)))
        drop = self._drops.assign(kept, site, band, time)
        self._stack_history(columns, drop)
        truth = {name: values[good] for name, values in truth.items()}
        return _Parsed(columns, truth, drop, labelled[good], complete[good], kept.number)

    def _reject(self, good: np.ndarray, bad: np.ndarray, rows: Rows, reason: str) -> None:
        for at in np.flatnonzero(bad & good):
            self.tally.rejected[int(rows.number[at])] = reason
        good &= ~bad

    def _category(self, rows: Rows, spec: ColumnSpec, good: np.ndarray) -> np.ndarray:
        names = (
            names_of(rows, self.cfg.columns[spec.name])
            if spec.name in self.cfg.columns
            else np.full(len(rows.number), "main", object)
        )
        self._reject(good, names == "", rows, f"{spec.name} is empty")
        if spec.categories:
            for name in sorted(set(names[good]) - set(spec.categories)):
                self._reject(good, names == name, rows, f"{spec.name} {name!r} is not one of {', '.join(spec.categories)}")
        return names

    def _measured(self, rows: Rows, spec: ColumnSpec, good: np.ndarray) -> dict[str, np.ndarray]:
        column, n = self.cfg.columns[spec.name], len(rows.number)
        kind = ARROW_TYPES[spec.dtype].to_pandas_dtype()
        if column.value is not None:
            return {spec.name: np.full((n, *spec.shape), column.value, kind)}
        shape = column.shape
        names = spelt(column, shape)
        cells = numbers(rows, names, column, spec, self.path.name)
        self._count(cells, rows, names, spec)
        text = (cells.why == TEXT).any(axis=1)
        for at in np.flatnonzero(text & good):
            name = names[int(np.flatnonzero(cells.why[at] == TEXT)[0])]
            self.tally.rejected[int(rows.number[at])] = f"{name}: {rows.cells[name][at]!r} is not a number"
        good &= ~text
        missing = np.isnan(cells.values)
        if spec.mask:
            values = np.where(missing, 0.0, cells.values).astype(kind).reshape(n, *shape)
            return {spec.name: values, spec.mask: (~missing).astype(np.uint8).reshape(n, *shape)}
        if column.fill is not None:
            cells.values[missing] = column.fill
        else:
            for code, reason in REASONS.items():
                self._reject(good, (missing & (cells.why == code)).any(axis=1), rows, f"{names[0]} is {reason}")
        return {spec.name: np.where(np.isnan(cells.values), 0, cells.values).astype(kind).reshape(n, *spec.shape)}

    def _count(self, cells: Cells, rows: Rows, names: list[str], spec: ColumnSpec) -> None:
        tally = self.tally
        for j, name in enumerate(names):
            why = cells.why[:, j]
            tally.seen[name] += int(((why == OK) | (why == OUT_OF_RANGE)).sum())
            for code in (BLANK, SENTINEL, OUT_OF_RANGE):
                hit = np.flatnonzero(why == code)
                if len(hit):
                    tally.masked[(name, REASONS[code])] += len(hit)
                    tally.first_row.setdefault((name, REASONS[code]), int(rows.number[hit[0]]))
            hit = np.flatnonzero(why == OUT_OF_RANGE)
            if len(hit):
                tally.outside[name] += len(hit)
                tally.first_outside.setdefault(name, int(rows.number[hit[0]]))
                known = tally.examples.setdefault(name, [])
                known += [float(v) for v in rows.cells[name][hit[: 200 - len(known)]]]

    def _truth(self, rows: Rows, good: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """(truth columns, rows that have all of them, rows that have a label)."""
        cfg, n = self.cfg, len(rows.number)
        truth: dict[str, np.ndarray] = {}
        complete = np.ones(n, bool)
        for name, column in cfg.truth.items():
            if column.value is not None:
                truth[name] = np.full((n, *column.shape), column.value, ARROW_TYPES[column.dtype].to_pandas_dtype())
                continue
            values, there = self._truth_column(rows, name, column)
            truth[name] = values
            complete &= there
        labelled = complete.copy()
        if cfg.label is not None:
            label, labelled = self._label(rows, cfg.label, good)
            complete &= labelled
            for name in cfg.label_into:
                truth[name] = label.astype(np.int16)
        return truth, complete, labelled

    def _truth_column(self, rows: Rows, name: str, column: ColumnMap) -> tuple[np.ndarray, np.ndarray]:
        kind = ARROW_TYPES[column.dtype].to_pandas_dtype()
        if column.dtype == "bool":
            text = np.array(["" if v is None else str(v).strip().lower() for v in rows.cells[column.source or ""]], dtype=str)
            return np.isin(text, ["1", "1.0", "true", "yes", "y"]), np.asarray(text != "")
        spec = ColumnSpec(name=name, dtype="float64", shape=column.shape, unit=column.unit_ours, valid_range=column.range)
        cells = numbers(rows, spelt(column, column.shape), column, spec, self.path.name)
        missing = np.isnan(cells.values)
        # A sweep that missed some beams is still a sweep; one that missed all is none.
        there = ~missing.any(axis=1) if column.fill is None else ~missing.all(axis=1)
        there = np.asarray(there)
        filled = np.where(missing, column.fill if column.fill is not None else 0.0, cells.values)
        filled = filled - column.index_base * ~missing
        return filled.astype(kind).reshape(len(filled), *column.shape), there

    def _label(self, rows: Rows, column: ColumnMap, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        spec, classes = ColumnSpec(name="label", dtype="float64"), self.schema.label.classes
        cells = numbers(rows, [column.source or ""], column, spec, self.path.name)
        self._reject(good, (cells.why == TEXT).any(axis=1), rows, f"{column.source} is not a number")
        label = cells.values[:, 0] - column.index_base
        there = ~np.isnan(label)
        whole = np.where(there, label, 0)
        wrong = there & ((whole != np.floor(whole)) | (whole < 0) | (whole >= classes))
        low, high = column.index_base, classes - 1 + column.index_base
        for at in np.flatnonzero(wrong & good):
            found = label[at] + column.index_base
            self.tally.rejected[int(rows.number[at])] = f"{column.source} {found:g} is not a whole number from {low} to {high}"
        good &= ~wrong
        return np.where(there & ~wrong, whole, -1).astype(np.int64), there & ~wrong

    def _stack_history(self, columns: dict[str, np.ndarray], drop: np.ndarray) -> None:
        """Where the schema wants past instants and a row of the file holds one, take the drop's rows before it."""
        for spec in self.schema.columns:
            length = spec.shape[0] if len(spec.shape) > 1 else 1
            if not spec.mask or length == 1 or columns[spec.name].shape[1:] == spec.shape:
                continue
            values, mask = columns[spec.name], columns[spec.mask]
            both = np.zeros((len(drop), 2, *spec.shape), np.float32)
            for r, d in enumerate(drop.tolist()):
                past = self._past.setdefault(d, deque(maxlen=length))
                past.append((values[r, 0], mask[r, 0]))
                for age, (v, m) in enumerate(reversed(past)):
                    both[r, 0, length - 1 - age], both[r, 1, length - 1 - age] = v, m
            columns[spec.name], columns[spec.mask] = both[:, 0], both[:, 1].astype(np.uint8)


# -- the import ---------------------------------------------------------------------------------------------------
class Ingest:
    """The import of one source. Iterate it once for (features, truth) shards; then read what was left out.

    rejected: [{"row", "reason"}] of the rows set aside. masked: [{"column", "reason", "values", "first_row"}] of the values that
    became missing. Both are complete before the first shard.
    """

    def __init__(self, cfg: SourceConfig, schema: CorpusSchema, root: Path, seed: int) -> None:
        self.schema, self.seed = schema, seed
        self.path = inside(root, cfg.path, "steps.corpus.source.path")
        self.cfg = cfg = _with_shapes(cfg, schema)
        first = _Pass(self.path, cfg, schema)
        cells, whole = self._survey(first)
        self._check_units(first.tally)
        self._check_rejected(first.tally)
        self._split_of = self._plan(cells, whole)
        self._set_aside(first.tally)
        self.rejected = [{"row": row, "reason": reason} for row, reason in sorted(first.tally.rejected.items())]
        self.masked = [
            {"column": name, "reason": reason, "values": count, "first_row": first.tally.first_row[(name, reason)]}
            for (name, reason), count in sorted(first.tally.masked.items())
        ]

    def __iter__(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        next_id = 0
        for parsed in _Pass(self.path, self.cfg, self.schema):
            splits = np.array([self._split_of[d] for d in parsed.drop.tolist()], dtype=object)
            usable = splits != ""
            if not usable.any():
                continue
            ids = next_id + np.arange(int(usable.sum()), dtype=np.int64)
            next_id += len(ids)
            yield self._features(parsed, usable, splits, ids), self._truth(parsed, usable, ids)

    def _features(self, parsed: _Parsed, usable: np.ndarray, splits: np.ndarray, ids: np.ndarray) -> pa.Table:
        schema = self.schema
        columns = {name: values[usable] for name, values in parsed.columns.items()}
        columns[schema.id_column], columns[schema.unit_column] = ids, parsed.drop[usable]
        columns[schema.split_column] = splits[usable]
        if schema.labelled_column:
            columns[schema.labelled_column] = parsed.labelled[usable]
        arrays = [as_column(columns[c.name], c) for c in schema.columns]
        return pa.Table.from_arrays(arrays, names=[c.name for c in schema.columns])

    def _truth(self, parsed: _Parsed, usable: np.ndarray, ids: np.ndarray) -> pa.Table:
        table = {"sample_id": pa.array(ids)}
        for name, values in parsed.truth.items():
            kept = values[usable]
            table[name] = as_column(kept, ColumnSpec(name=name, dtype=_dtype_name(kept), shape=kept.shape[1:]))
        return pa.table(table)

    def _survey(self, first: _Pass) -> tuple[dict[tuple, list[int]], dict[int, bool]]:
        """(drops of each site and band, whether each drop is labelled and complete throughout)."""
        cells: dict[tuple, list[int]] = {}
        whole: dict[int, bool] = {}
        for parsed in first:
            site = parsed.columns.get(self.schema.site_column or "", np.full(len(parsed.drop), ""))
            band = parsed.columns.get(self.schema.band_column or "", np.zeros(len(parsed.drop)))
            for d, s, b, c in zip(parsed.drop.tolist(), site.tolist(), band.tolist(), parsed.complete.tolist(), strict=True):
                if d not in whole:
                    cells.setdefault((s, round(float(b), 6)), []).append(d)
                whole[d] = whole.get(d, True) and c
        return cells, whole

    def _check_rejected(self, tally: _Tally) -> None:
        count, total = len(tally.rejected), max(tally.rows, 1)
        if count <= self.cfg.most_rejected * total:
            return
        reason, times = Counter(tally.rejected.values()).most_common(1)[0]
        raise RankdError(
            f"{self.path.name}: {count} of {total} rows would be set aside (first: row {min(tally.rejected)}; most often: "
            f"{reason}, {times} times); correct the column map, or raise source.most_rejected."
        )

    def _plan(self, cells: dict[tuple, list[int]], whole: dict[int, bool]) -> dict[int, str]:
        """The split of each drop: held out by site and band, otherwise drawn within its site and band from the seed."""
        self._check_held_out(cells)
        split: dict[int, str] = {}
        for index, ((site, band), drops) in enumerate(sorted(cells.items())):
            held = (
                "heldout_band" if _among(band, self.cfg.heldout_bands) else "heldout_site" if site in self.cfg.heldout_sites else ""
            )
            if held:
                # What is only tested must be known whole; the rest of a held-out place is of no use.
                split.update({d: held if whole[d] else "" for d in drops})
            else:
                split.update(self._draw(drops, whole, np.random.default_rng([self.seed, index])))
        for kind in ("train", "val", "test"):
            if kind not in split.values():
                raise RankdError(
                    f"{self.path.name}: no drop is left for split {kind!r}; {sum(whole.values())} of {len(whole)} drops "
                    "have a label and all truth columns in every row, and only those can be validated or tested on."
                )
        return split

    def _check_held_out(self, cells: dict[tuple, list[int]]) -> None:
        sites, bands = {s for s, _ in cells}, {b for _, b in cells}
        for site in self.cfg.heldout_sites:
            if site not in sites:
                raise RankdError(
                    f"{self.path.name}: heldout_sites names {site!r}, which no row has; found {', '.join(sorted(sites))}."
                )
        for band in self.cfg.heldout_bands:
            if not any(_among(b, (band,)) for b in bands):
                found = ", ".join(f"{b:g}" for b in sorted(bands))
                raise RankdError(f"{self.path.name}: heldout_bands names {band:g}, which no row has; found {found}.")

    def _draw(self, drops: list[int], whole: dict[int, bool], rng: np.random.Generator) -> dict[int, str]:
        order = rng.permutation(np.array(drops)).tolist()
        eligible = [d for d in order if whole[d]]
        n_val, n_test = (round(share * len(drops)) for share in self.cfg.split_shares[1:])
        if n_val + n_test > len(eligible):
            n_val = n_test = len(eligible) // 2
        split = dict.fromkeys(order, "train")
        split.update(dict.fromkeys(eligible[:n_val], "val"))
        split.update(dict.fromkeys(eligible[n_val : n_val + n_test], "test"))
        return split

    def _set_aside(self, tally: _Tally) -> None:
        """List the rows of drops that no split can use."""
        unused = {d for d, split in self._split_of.items() if not split}
        for parsed in _Pass(self.path, self.cfg, self.schema) if unused else ():
            for row, d in zip(parsed.number.tolist(), parsed.drop.tolist(), strict=True):
                if d in unused:
                    tally.rejected[row] = "of a held-out site or band, in a drop that is not labelled throughout"

    def _theirs(self, spec: ColumnSpec) -> list[str]:
        column = self.cfg.columns[spec.name]
        return spelt(column, column.shape)

    def _check_units(self, tally: _Tally) -> None:
        for name, outside in tally.outside.items():
            if outside <= 0.5 * tally.seen[name]:
                continue
            spec = next(c for c in self.schema.columns if c.name in self.cfg.columns and name in self._theirs(c))
            column = self.cfg.columns[spec.name]
            low, high = spec.valid_range or (-np.inf, np.inf)
            fits = likely_units(spec.unit, np.array(tally.examples[name]), low, high)
            hint = f"they would fit as {' or '.join(fits)}" if fits else "no unit that rankd knows would fit"
            raise RankdError(
                f"{self.path.name}, column {name!r}: {outside} of {tally.seen[name]} values are outside {low:g} to {high:g} "
                f"{spec.unit} when read as {column.unit or spec.unit} "
                f"(first: {tally.examples[name][0]:g} in row {tally.first_outside[name]}); "
                f"{hint}; set source.columns.{spec.name}.unit."
            )


def ingest(cfg: SourceConfig, schema: CorpusSchema, root: Path, seed: int) -> Ingest:
    """Import a user's table as corpus shards.

    :param schema: the columns, units and ranges that the corpus must have
    :param root: the folder that holds the file; a path that leads out of it is refused
    :returns: iterate for (features, truth) tables, of at most rows_per_shard rows; same seed, same bytes
    Raises: RankdError naming file, column and row
    """
    return Ingest(cfg, schema, root, seed)


def _with_shapes(cfg: SourceConfig, schema: CorpusSchema) -> SourceConfig:
    """The configuration with the shape of every tensor that the file holds. Raises: RankdError for a map that does not fit."""
    automatic = {schema.id_column, schema.unit_column, schema.split_column, schema.source_column, schema.labelled_column, "group"}
    wanted = [c.name for c in schema.columns if c.name not in automatic and c.role != "mask"]
    absent = [name for name in wanted if name not in cfg.columns]
    if absent:
        raise RankdError(f"source.columns: {absent[0]!r} is missing; expected a map for each of {', '.join(wanted)}.")
    unknown = sorted(set(cfg.columns) - set(wanted) - {"group"})
    if unknown:
        raise RankdError(f"source.columns: {unknown[0]!r} is no column of the corpus; expected {', '.join(wanted)}.")
    columns = dict(cfg.columns)
    for name, column in cfg.columns.items():
        spec = schema.column(name)
        if not spec.shape or column.source is None:
            continue
        if "{i}" not in column.source:
            raise RankdError(
                f"source.columns.{name}: {column.source!r} names one column; expected a pattern such as 'ssb_{{i}}_rsrp'."
            )
        # Without {t} a row of the file holds one instant; the past is taken from the rows before it.
        one_instant = len(spec.shape) > 1 and "{t}" not in column.source
        columns[name] = column.model_copy(update={"shape": (1, *spec.shape[1:]) if one_instant else spec.shape})
    return cfg.model_copy(update={"columns": columns})


def _among(band: float, bands: tuple[float, ...]) -> bool:
    return any(abs(band - b) < 1e-4 * max(abs(b), 1) for b in bands)


def _dtype_name(values: np.ndarray) -> Any:
    return "bool" if values.dtype == bool else str(values.dtype)
