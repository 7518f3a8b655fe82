"""The checks that see every row: formats, ranges, masks, keys, identity, time. One pass, memory flat."""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema, arrow_type
from rankd_pipeline.store.tensors import column_array

Comparison = Literal["runs", "components", "levels", "copies", "labels"]
Batches = Callable[[], Iterable[pa.Table]]


class Finding(BaseModel):
    """One thing that is wrong: what kind, how bad, where, the measured value against its threshold, what to do."""

    model_config = ConfigDict(frozen=True)

    fault: str
    severity: Literal["warn", "fail"]
    where: str
    value: float
    threshold: float
    unit: str = "share"
    next_step: str


class AuditConfig(BaseModel):
    """Thresholds of the audit; shares are of rows or values, in [0, 1].

    bad_value_share: tolerated share of NaN, sentinel, out-of-range or mask-contradicting values (above: fail).
    missing_warn / missing_fail: share of values missing, of those that the schema expects to be there.
    label_noise_*: lower bound of the estimated share of wrong labels.
    labelled_warn: least share of training rows with a label. imbalance_warn: largest over smallest scenario.
    repeats_fail: share of rows that repeat another row of their own unit (a link at the top of its table reports the same for
    seconds).
    comparisons: the statistical checks that run (see audit/patterns.py).
    sampled_rows: rows (whole units) kept for the statistical checks. spill_rows: rows kept in memory before spilling to disk.
    accept: source -> faults that only warn there, because what is known of the source explains them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bad_value_share: float = Field(default=0.0, ge=0, le=1)
    missing_warn: float = Field(default=0.6, ge=0, le=1)
    missing_fail: float = Field(default=0.9, ge=0, le=1)
    rows_missing_fail: float = Field(default=0.2, ge=0, le=1)
    labelled_warn: float = Field(default=0.05, ge=0, le=1)
    label_noise_warn: float = Field(default=0.02, ge=0, le=1)
    label_noise_fail: float = Field(default=0.1, ge=0, le=1)
    min_sites: int = Field(default=3, ge=1)
    min_bands: int = Field(default=2, ge=1)
    imbalance_warn: float = Field(default=4.0, ge=1)
    repeats_fail: float = Field(default=0.001, ge=0, le=1)
    comparisons: tuple[Comparison, ...] = ("runs", "components", "levels", "copies", "labels")
    sampled_rows: int = Field(default=40_000, ge=100)
    label_rows: int = Field(default=5_000, ge=100)
    spill_rows: int = Field(default=1_000_000, ge=1)
    accept: dict[str, tuple[str, ...]] = {}
    seed: int = 0


def hash64(words: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of `words` [n, w] uint64: multilinear, then the splitmix64 finaliser."""
    keys = np.random.Generator(np.random.PCG64(0x5EED)).integers(1, 2**63, words.shape[1], dtype=np.uint64) * 2 + 1
    h = np.full(len(words), 0x9E3779B97F4A7C15, np.uint64)
    for j in range(words.shape[1]):
        h += (words[:, j] ^ (words[:, j] >> np.uint64(31))) * keys[j]
        h ^= h >> np.uint64(29)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return h ^ (h >> np.uint64(31))


def hash_arrays(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """A 64-bit hash of each row over several arrays [n, ...]; -0.0 and 0.0 hash alike."""
    parts = []
    for array in arrays:
        a = np.asarray(array)
        a = (a + 0.0).astype("<f8") if a.dtype.kind == "f" else a.astype("<i8")
        parts.append(a.reshape(len(a), -1).view("<u8"))
    return hash64(np.concatenate(parts, axis=1))


class KeyCodes:
    """Gives each distinct value of the key columns a small stable number, and the name back."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._codes: dict[str, int] = {}

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Codes [n] int32 of values [n] (strings, numbers or None)."""
        unique, inverse = np.unique(np.array([_text(v) for v in values], dtype=object), return_inverse=True)
        for name in unique:
            if name not in self._codes:
                self._codes[name] = len(self.names)
                self.names.append(name)
        return np.array([self._codes[n] for n in unique], np.int32)[inverse]


def _text(value: Any) -> str:
    if value is None:
        return "(none)"
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


class Spill:
    """Records of fixed type, kept in memory up to a limit and then in 64 files by hash of a key: flat memory.

    Iterating gives arrays such that all records of one key are in the same array.
    """

    def __init__(self, dtype: np.dtype, key: str, limit: int) -> None:
        self.dtype, self.key, self.limit = dtype, key, limit
        self._parts: list[np.ndarray] = []
        self._held = 0
        self._folder: tempfile.TemporaryDirectory | None = None

    def add(self, records: np.ndarray) -> None:
        self._parts.append(records)
        self._held += len(records)
        if self._held > self.limit:
            self._flush()

    def _flush(self) -> None:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="rankd-audit-")
        records = np.concatenate(self._parts)
        bucket = hash64(records[self.key].astype("<u8")[:, None]) >> np.uint64(58)
        for b in np.unique(bucket):
            with open(Path(self._folder.name) / f"{b}", "ab") as file:
                file.write(records[bucket == b].tobytes())
        self._parts, self._held = [], 0

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._folder is None:
            if self._parts:
                yield np.concatenate(self._parts)
            return
        if self._parts:
            self._flush()
        for path in sorted(Path(self._folder.name).iterdir()):
            yield np.fromfile(path, self.dtype)

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            self._folder.cleanup()


class ValueCounts:
    """Counts of bad values of one column, with the place of the worst of each kind."""

    KINDS = ("not_finite", "sentinel", "out_of_range", "mask_mismatch", "missing")

    def __init__(self, spec: ColumnSpec) -> None:
        self.spec = spec
        self.values = 0
        self.rows_empty = 0
        self.bad: Counter[str] = Counter()
        self.places: dict[str, Counter[str]] = defaultdict(Counter)
        self.first_id: dict[str, int] = {}
        self.example: dict[str, float] = {}
        self.component_missing = np.zeros(spec.width, np.int64)
        self.rows = 0
        self.low: float = np.inf
        self.high: float = -np.inf
        self.total = 0.0

    def update(self, values: np.ndarray, mask: np.ndarray | None, ids: np.ndarray, place: np.ndarray, names: list[str]):
        """values, mask [n, width]; ids [n]; place [n] codes into names (site and band of the row)."""
        n = len(values)
        measured = np.ones(values.shape, bool) if mask is None else mask != 0
        finite = np.isfinite(values)
        kinds = {"not_finite": ~finite}
        sentinel = np.isin(values, np.asarray(self.spec.sentinels, values.dtype)) & measured
        kinds["sentinel"] = sentinel
        good = measured & finite & ~sentinel
        if self.spec.valid_range is not None:
            low, high = self.spec.valid_range
            kinds["out_of_range"] = good & ((values < low) | (values > high))
            good &= ~kinds["out_of_range"]
        if mask is not None:
            kinds["mask_mismatch"] = (~measured & finite & (values != 0)) | (mask > 1)
            if "out_of_range" in kinds:  # 0 is how a missing value is written, so it speaks of the mask, not of the unit
                written_as_missing = kinds["out_of_range"] & (values == 0)
                kinds["out_of_range"] &= ~written_as_missing
                kinds["mask_mismatch"] |= written_as_missing
            kinds["missing"] = ~measured
            self.rows_empty += int((~measured).all(axis=1).sum())
            self.component_missing += (~measured).sum(axis=0)
        self.values += values.size
        self.rows += n
        if good.any():
            self.low = min(self.low, float(values[good].min()))
            self.high = max(self.high, float(values[good].max()))
            self.total += float(values[good].sum())
        for kind, bad in kinds.items():
            if not bad.any():
                continue
            per_row = bad.sum(axis=1)
            self.bad[kind] += int(per_row.sum())
            by_place = np.bincount(place, weights=per_row, minlength=len(names))
            for code in np.flatnonzero(by_place):
                self.places[kind][names[code]] += int(by_place[code])
            if kind not in self.first_id:
                row = int(np.flatnonzero(per_row)[0])
                self.first_id[kind] = int(ids[row])
                self.example[kind] = float(values[row][bad[row]][0])

    def findings(self, cfg: AuditConfig) -> list[Finding]:
        return [*self._bad_values(cfg), *self._missing(cfg)]

    def _bad_values(self, cfg: AuditConfig) -> Iterator[Finding]:
        unit = f" {self.spec.unit}" if self.spec.unit else ""
        cures = {
            "not_finite": "write a missing value as mask 0 and value 0, never as NaN or infinity",
            "sentinel": "name the sentinel in the column map, so that it becomes a missing value",
            "out_of_range": f"check the column's unit; expected {_range(self.spec)}{unit}",
            "mask_mismatch": "write mask 0 with value 0 and mask 1 with a measured value",
        }
        for kind, cure in cures.items():
            if count := self.bad[kind]:
                share = count / self.values
                worst, _ = self.places[kind].most_common(1)[0]
                where = (
                    f"column {self.spec.name}, most in {worst} ({len(self.places[kind])} places); "
                    f"first at sample {self.first_id[kind]} with {self.example[kind]:g}{unit}"
                )
                severity = "fail" if share > cfg.bad_value_share else "warn"
                if kind == "out_of_range":
                    cure = _unit_hint(self.spec, self.example[kind]) or cures[kind]
                yield Finding(
                    fault=kind, severity=severity, where=where, value=share, threshold=cfg.bad_value_share, next_step=cure
                )

    def _missing(self, cfg: AuditConfig) -> Iterator[Finding]:
        """What is missing is mostly too weak to be measured; only an extreme share speaks of the log. Gaps show as runs."""
        if self.spec.mask is None or not self.values:
            return
        expected = 1 - self.spec.expected_missing
        share = 1 - min((1 - self.bad["missing"] / self.values) / expected, 1.0)
        if share > cfg.missing_warn:
            yield Finding(
                fault="missing_values",
                severity="fail" if share > cfg.missing_fail else "warn",
                where=f"column {self.spec.name}, whole corpus",
                value=share,
                threshold=cfg.missing_warn,
                next_step="look for gaps in the log; leave out sites or periods that are mostly missing",
            )
        by_component = self.component_missing / max(self.rows, 1)
        dead = np.flatnonzero(by_component > 0.98)
        if len(dead) and float(np.median(by_component)) < 0.9:
            at = tuple(int(i) for i in np.unravel_index(int(dead[0]), self.spec.shape))
            yield Finding(
                fault="missing_component",
                severity="warn",
                where=f"column {self.spec.name}, component {at}" + (f" and {len(dead) - 1} more" if len(dead) > 1 else ""),
                value=float(by_component[dead[0]]),
                threshold=0.98,
                next_step="the component is hardly ever there; check its antenna, beam or log column",
            )


def _range(spec: ColumnSpec) -> str:
    low, high = spec.valid_range or (-np.inf, np.inf)
    return f"{low:g} to {high:g}"


def _unit_hint(spec: ColumnSpec, value: float) -> str:
    """Names the unit that would explain an out-of-range value of a dBm column, or the empty string."""
    if spec.unit.lower() not in ("dbm", "db") or spec.valid_range is None:
        return ""
    low, high = spec.valid_range
    candidates = [("the sign is flipped", -value), ("dB above 1 W instead of dBm", value + 30), ("tenths of a dBm", value / 10)]
    if value > 0:
        candidates += [("watts instead of dBm", 10 * np.log10(value) + 30), ("milliwatts instead of dBm", 10 * np.log10(value))]
    fits = [name for name, corrected in candidates if low <= corrected <= high]
    if not fits:
        return ""
    return f"{value:g} would fit {low:g} to {high:g} {spec.unit} if {' or '.join(fits)}; check the unit in the column map"


class Stream:
    """Everything the audit learns in one pass over the feature batches. Memory: counters, key names, spilled records."""

    def __init__(self, schema: CorpusSchema, cfg: AuditConfig) -> None:
        self.schema, self.cfg = schema, cfg
        self.rows = self.batches = 0
        self.broken: dict[str, str] = {}
        self.broken_batches: Counter[str] = Counter()
        self.nulls: Counter[str] = Counter()
        self.columns = {c.name: ValueCounts(c) for c in schema.columns if c.dtype.startswith("float") and c.role != "key"}
        self.keys = {c.name: KeyCodes() for c in schema.columns if c.role == "key"}
        self.key_counts: dict[str, Counter[str]] = {name: Counter() for name in self.keys}
        self.by_split: dict[str, dict[str, Counter[str]]] = {n: defaultdict(Counter) for n in self.keys}
        self.pairs = {(a, b): Counter() for a, bs in schema.constant_within.items() if a != schema.unit_column for b in bs}
        self.labelled: Counter[str] = Counter()
        self.place_names = KeyCodes()
        self.within_unit = [n for n in schema.constant_within.get(schema.unit_column, ()) if n != schema.split_column]
        unit_type = [("unit", "<i8"), ("position", "<i8"), ("time", "<f8"), ("split", "<i4")]
        unit_type += [(f"key{i}", "<i4") for i in range(len(self.within_unit))]
        self.clock = Clock()
        self.units = Spill(np.dtype(unit_type), "unit", cfg.spill_rows)
        self.ids = Spill(np.dtype([("id", "<i8"), ("position", "<i8")]), "id", cfg.spill_rows)
        content_type = [("content", "<u8"), ("unit", "<i8"), ("id", "<i8"), ("split", "<i4")]
        self.contents = Spill(np.dtype(content_type), "content", cfg.spill_rows)

    # -- one batch ------------------------------------------------------------------------------------------------
    def update(self, table: pa.Table) -> bool:
        """Take in one batch. False if its format is broken, so that nothing more can be read from it."""
        self.batches += 1
        problems = self._format(table)
        for name, text in problems.items():
            self.broken.setdefault(name, f"{text} (first in batch {self.batches})")
            self.broken_batches[name] += 1
        if problems:
            return False
        codes = {name: coder.encode(column_array(table[name])) for name, coder in self.keys.items()}
        place = self._place(codes, table.num_rows)
        ids = column_array(table[self.schema.id_column])
        for name, counts in self.columns.items():
            spec = counts.spec
            values = column_array(table[name]).reshape(table.num_rows, -1)
            mask = column_array(table[spec.mask]).reshape(table.num_rows, -1) if spec.mask else None
            counts.update(values, mask, ids, place, self.place_names.names)
        self._count_keys(codes, table)
        self._remember(codes, table, ids)
        self.rows += table.num_rows
        return True

    def _format(self, table: pa.Table) -> dict[str, str]:
        problems = {}
        for spec in self.schema.columns:
            if spec.name not in table.column_names:
                problems[spec.name] = "missing"
                continue
            found, expected = table.schema.field(spec.name).type, arrow_type(spec)
            if found != expected and not (pa.types.is_large_string(found) and spec.dtype == "string"):
                problems[spec.name] = f"is {found}, expected {expected}"
            elif table[spec.name].null_count and not spec.nullable:
                self.nulls[spec.name] += table[spec.name].null_count
                problems[spec.name] = f"has {table[spec.name].null_count} nulls"
        return problems

    def _place(self, codes: dict[str, np.ndarray], rows: int) -> np.ndarray:
        """[rows] codes into place_names: site and band of each row."""
        schema = self.schema
        columns = [c for c in (schema.site_column, schema.band_column) if c in codes]
        if not columns:
            return self.place_names.encode(np.full(rows, "the corpus", object))
        combined = np.stack([codes[c] for c in columns], axis=1)
        unique, inverse = np.unique(combined, axis=0, return_inverse=True)
        label = [", ".join(f"{c} {self.keys[c].names[v]}" for c, v in zip(columns, row, strict=True)) for row in unique]
        return self.place_names.encode(np.array(label, object))[inverse.reshape(-1)]

    def _count_keys(self, codes: dict[str, np.ndarray], table: pa.Table) -> None:
        split = codes[self.schema.split_column]
        split_names = self.keys[self.schema.split_column].names
        for name, values in codes.items():
            pairs, counts = np.unique(np.stack([split, values], axis=1), axis=0, return_counts=True)
            for (s, v), n in zip(pairs, counts, strict=True):
                self.key_counts[name][self.keys[name].names[v]] += int(n)
                self.by_split[name][split_names[s]][self.keys[name].names[v]] += int(n)
        for (a, b), counter in self.pairs.items():
            pairs, counts = np.unique(np.stack([codes[a], codes[b]], axis=1), axis=0, return_counts=True)
            for (x, y), n in zip(pairs, counts, strict=True):
                counter[(self.keys[a].names[x], self.keys[b].names[y])] += int(n)
        flag = self.schema.labelled_column
        if flag and self.schema.has(flag):
            for s, n in Counter(split[column_array(table[flag]).astype(bool)].tolist()).items():
                self.labelled[split_names[s]] += n

    def _remember(self, codes: dict[str, np.ndarray], table: pa.Table, ids: np.ndarray) -> None:
        schema, n = self.schema, table.num_rows
        position = np.arange(self.rows, self.rows + n)
        unit = column_array(table[schema.unit_column]).astype(np.int64)
        units = np.zeros(n, self.units.dtype)
        units["unit"], units["position"], units["split"] = unit, position, codes[schema.split_column]
        if schema.has(schema.time_column):
            units["time"] = column_array(table[schema.time_column])
            if schema.series_columns:
                series = hash_arrays(codes[c] for c in schema.series_columns)
                self.clock.follow(series, unit, units["time"])
        for i, name in enumerate(self.within_unit):
            units[f"key{i}"] = codes[name]
        self.units.add(units)
        id_records = np.zeros(n, self.ids.dtype)
        id_records["id"], id_records["position"] = ids, position
        self.ids.add(id_records)
        content = np.zeros(n, self.contents.dtype)
        columns = content_columns(schema)
        content["content"] = hash_arrays(column_array(table[c.name]) for c in columns)
        content["unit"], content["id"], content["split"] = unit, ids, codes[schema.split_column]
        self.contents.add(content[_says_enough(table, columns)])

    def close(self) -> None:
        """Delete what was spilled to disk."""
        for spill in (self.units, self.ids, self.contents):
            spill.close()


def content_columns(schema: CorpusSchema) -> list[ColumnSpec]:
    """The measured columns: what must differ between two rows that are not the same measurement."""
    found = [c for c in schema.columns if c.role in ("feature", "mask") and c.dtype != "string"]
    return found + [
        c for c in schema.columns if c.role == "context" and c.dtype.startswith("float") and c.name != schema.time_column
    ]


def _says_enough(table: pa.Table, columns: list[ColumnSpec]) -> np.ndarray:
    """Rows with at least four measured values: with fewer, two different measurements may well read the same."""
    masks = [column_array(table[c.name]).reshape(table.num_rows, -1) for c in columns if c.role == "mask"]
    unmasked = sum(c.width for c in columns if c.role == "feature" and not c.mask)
    return sum((m != 0).sum(axis=1) for m in masks) + np.full(table.num_rows, unmasked) >= 4


# -- findings of the pass -----------------------------------------------------------------------------------------
def format_findings(stream: Stream) -> list[Finding]:
    """Missing columns, wrong types, nulls."""
    return [
        Finding(
            fault="null" if name in stream.nulls else "format",
            severity="fail",
            where=f"column {name}: {text}",
            value=stream.broken_batches[name],
            threshold=0,
            unit="batches",
            next_step="rewrite the shard with the column as the schema says; its rows were not audited further",
        )
        for name, text in stream.broken.items()
    ]


def key_findings(stream: Stream) -> list[Finding]:
    """Unknown and absent categories, keys that must agree and do not, held-out values that were seen."""
    found, schema = [], stream.schema
    for name, counts in stream.key_counts.items():
        expected = set(schema.column(name).categories)
        unknown = sorted(set(counts) - expected) if expected else []
        if unknown:
            rows = sum(counts[u] for u in unknown)
            found.append(
                Finding(
                    fault="unknown_category",
                    severity="fail",
                    where=f"column {name}: {', '.join(unknown[:5])}",
                    value=rows / max(stream.rows, 1),
                    threshold=0,
                    next_step=f"use one of {', '.join(sorted(expected))}, or correct the rows",
                )
            )
        absent = sorted(expected - set(counts)) if stream.rows else []
        if absent:
            found.append(
                Finding(
                    fault="missing_category",
                    severity="warn",
                    where=f"column {name}: no row has {', '.join(absent)}",
                    value=len(absent),
                    threshold=0,
                    unit="categories",
                    next_step="collect or simulate rows of it, or take it out of the configuration",
                )
            )
    for (a, b), counter in stream.pairs.items():
        found += _disagreeing_pairs(a, b, counter)
    for split, column in schema.held_out.items():
        inside = stream.by_split[column]
        trained = set().union(*(inside[s] for s in inside if s not in schema.held_out))
        if seen := sorted(set(inside.get(split, ())) & trained):
            rows = sum(inside[split][v] for v in seen)
            found.append(
                Finding(
                    fault="split_leak",
                    severity="fail",
                    where=f"split {split}: {column} {', '.join(seen[:5])} is also in training, validation or test rows",
                    value=rows / max(stream.rows, 1),
                    threshold=0,
                    next_step=f"hold the {column} out whole, or correct the {column} of these rows",
                )
            )
    return found


def _disagreeing_pairs(a: str, b: str, counter: Counter) -> list[Finding]:
    by_a: dict[str, Counter] = defaultdict(Counter)
    for (x, y), n in counter.items():
        by_a[x][y] += n
    torn = {x: c for x, c in by_a.items() if len(c) > 1}
    if not torn:
        return []
    rows = sum(sum(c.values()) - c.most_common(1)[0][1] for c in torn.values())
    x, c = next(iter(torn.items()))
    return [
        Finding(
            fault="inconsistent_key",
            severity="fail",
            where=f"{a} {x} has more than one {b}: {', '.join(f'{y} ({n} rows)' for y, n in c.most_common(4))}",
            value=rows / max(sum(counter.values()), 1),
            threshold=0,
            next_step=f"correct {a} or {b} of the rows in the minority",
        )
    ]


def identity_findings(stream: Stream) -> list[Finding]:
    """Sample ids used twice."""
    repeated, example = 0, None
    for records in stream.ids:
        ids, counts = np.unique(records["id"], return_counts=True)
        repeated += int((counts - 1).sum())
        if (counts > 1).any():
            first = int(ids[counts > 1][0])
            example = first if example is None else min(example, first)
    if not repeated:
        return []
    return [
        Finding(
            fault="duplicate_id",
            severity="fail",
            where=f"{stream.schema.id_column} {example} and others",
            value=repeated / max(stream.rows, 1),
            threshold=0,
            next_step="give every sample an id of its own; drop rows that were read twice",
        )
    ]


class UnitFacts(BaseModel):
    """What the units (drops) look like, counted over the whole corpus."""

    units: int = 0
    torn_splits: int = 0
    torn_split_example: int | None = None
    torn_keys: dict[str, int] = {}
    torn_key_example: dict[str, int] = {}
    backwards: int = 0
    repeated_times: int = 0
    clock_example: int | None = None
    steps: int = 0
    rows_missing: int = 0
    gap_example: int | None = None
    sizes: dict[int, int] = {}
    short_example: int | None = None


def unit_facts(stream: Stream) -> UnitFacts:
    """Per unit: one split, one value of each constant key, time that rises by even steps."""
    facts = UnitFacts()
    sizes: Counter[int] = Counter()
    keys = [*(f"key{i}" for i in range(len(stream.within_unit))), "split"]
    for records in stream.units:
        records = records[np.lexsort((records["position"], records["unit"]))]
        same_unit = records["unit"][1:] == records["unit"][:-1]
        starts = np.flatnonzero(np.r_[True, ~same_unit])
        lengths = np.diff(np.r_[starts, len(records)])
        facts.units += len(starts)
        sizes.update(Counter(lengths.tolist()))
        for name in keys:
            torn = np.minimum.reduceat(records[name], starts) != np.maximum.reduceat(records[name], starts)
            if not torn.any():
                continue
            example = int(records["unit"][starts[np.flatnonzero(torn)[0]]])
            if name == "split":
                facts.torn_splits += int(torn.sum())
                facts.torn_split_example = min(example, facts.torn_split_example or example)
            else:
                key = stream.within_unit[int(name[3:])]
                facts.torn_keys[key] = facts.torn_keys.get(key, 0) + int(torn.sum())
                facts.torn_key_example[key] = min(example, facts.torn_key_example.get(key, example))
        if stream.schema.has(stream.schema.time_column):
            _clock_inside(records, keys, stream.clock)
    facts.steps, facts.backwards, facts.repeated_times, facts.clock_example = stream.clock.wrong()
    facts.rows_missing, facts.gap_example = stream.clock.lost()
    facts.sizes = dict(sizes)
    return facts


def _clock_inside(records: np.ndarray, keys: list[str], clock: "Clock") -> None:
    """Steps between the rows of a unit, in corpus order. A unit whose rows all carry one time holds simultaneous rows.

    keys: fields that a unit has one value of; units that share them are of one series.
    """
    same = records["unit"][1:] == records["unit"][:-1]
    step, unit = np.diff(records["time"])[same], records["unit"][1:][same]
    moving = np.isin(unit, np.unique(unit[step != 0]))
    step, unit, rows = step[moving], unit[moving], records[1:][same][moving]
    names, series = np.unique(rows[keys], return_inverse=True)
    for number, name in enumerate(names.tolist()):
        clock.add("inside", name, step[series == number], unit[series == number])


class Clock:
    """Time steps inside units, and between units that follow each other in a series; counted by series and size."""

    DISTINCT = 10_000

    def __init__(self) -> None:
        self.steps: dict[tuple[str, Hashable], Counter[float]] = {}
        self.examples: dict[tuple[str, Hashable, str], int] = {}
        self._last: dict[int, tuple[float, int]] = {}

    def add(self, kind: str, series: Hashable, step: np.ndarray, unit: np.ndarray) -> None:
        """Count steps [n] in seconds; unit [n] is where each ends."""
        steps = self.steps.setdefault((kind, series), Counter())
        for value, first, count in zip(*np.unique(np.round(step, 6), return_index=True, return_counts=True), strict=True):
            if value in steps or len(steps) < self.DISTINCT:
                steps[float(value)] += int(count)
            sort = "back" if value < 0 else "still" if value == 0 else f"step {value:g}"
            if sort in ("back", "still") or len(self.examples) < self.DISTINCT:
                name = (kind, series, sort)
                self.examples[name] = min(self.examples.get(name, int(unit[first])), int(unit[first]))

    def follow(self, series: np.ndarray, unit: np.ndarray, time: np.ndarray) -> None:
        """Take in the rows of a batch in corpus order; steps are counted where a series goes on to another unit."""
        order = np.argsort(series, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(series[order].view(np.int64)) != 0])
        for rows in np.split(order, starts[1:]):
            key = int(series[rows[0]])
            last = self._last.get(key)
            times, units = time[rows], unit[rows]
            if last is not None:
                times, units = np.r_[last[0], times], np.r_[last[1], units]
            change = units[1:] != units[:-1]
            self.add("between", key, np.diff(times)[change], units[1:][change])
            self._last[key] = (float(times[-1]), int(units[-1]))

    def wrong(self) -> tuple[int, int, int, int | None]:
        """(steps, steps back, steps of zero, a unit with one). Between units they count only where they are rare: logs
        of several users, one after the other, each start anew."""
        total = back = still = 0
        example = None
        for kind in ("inside", "between"):
            steps: Counter[float] = Counter()
            for (of, _), found in self.steps.items():
                if of == kind:
                    steps.update(found)
            n = sum(steps.values())
            total += n
            there = {"back": sum(c for v, c in steps.items() if v < 0), "still": steps[0.0]}
            for sort, count in there.items():
                if not count or (kind == "between" and (n < 20 or count > 0.1 * n)):
                    continue
                back, still = back + count * (sort == "back"), still + count * (sort == "still")
                if example is None:
                    example = min(unit for (of, _, what), unit in self.examples.items() if (of, what) == (kind, sort))
        return total, back, still, example

    def lost(self) -> tuple[int, int | None]:
        """(rows that the even clock of their own series proves to be missing, a unit after a gap)."""
        missing, example = 0, None
        for (kind, series), steps in self.steps.items():
            forward = {v: c for v, c in steps.items() if v > 0}
            if not forward:
                continue
            usual, count = max(forward.items(), key=lambda item: item[1])
            even = sum(c for v, c in forward.items() if abs(v - usual) < 0.1 * usual)
            if even < 0.8 * sum(forward.values()):
                continue
            for value, count in forward.items():
                if (gap := round(value / usual) - 1) > 0:
                    missing += gap * count
                    example = example if example is not None else self.examples.get((kind, series, f"step {value:g}"))
        return missing, example


def unit_findings(stream: Stream, facts: UnitFacts) -> list[Finding]:
    """Leaked, torn, short and gappy units; clocks that run backwards."""
    found, unit, total = [], stream.schema.unit_column, max(facts.units, 1)
    if facts.torn_splits:
        found.append(
            Finding(
                fault="split_leak",
                severity="fail",
                where=f"{unit} {facts.torn_split_example} and others lie in more than one split",
                value=facts.torn_splits / total,
                threshold=0,
                unit="share of units",
                next_step=f"split by whole {unit}, never by row",
            )
        )
    for key, count in facts.torn_keys.items():
        found.append(
            Finding(
                fault="inconsistent_key",
                severity="fail",
                where=f"{unit} {facts.torn_key_example[key]} and others have more than one {key}",
                value=count / total,
                threshold=0,
                unit="share of units",
                next_step=f"correct {key} of the rows in the minority",
            )
        )
    if facts.backwards or facts.repeated_times:
        found.append(
            Finding(
                fault="clock",
                severity="fail",
                value=(facts.backwards + facts.repeated_times) / max(facts.steps, 1),
                threshold=0,
                unit="share of steps",
                where=f"{unit} {facts.clock_example} and others: time goes back {facts.backwards} times, "
                f"stands still {facts.repeated_times} times",
                next_step="sort the log by time, drop rows logged twice, check for a clock reset or a change of time zone",
            )
        )
    if facts.rows_missing:
        share = facts.rows_missing / (facts.rows_missing + stream.rows)
        found.append(
            Finding(
                fault="rows_missing",
                severity="fail" if share > stream.cfg.rows_missing_fail else "warn",
                value=share,
                threshold=0,
                where=f"{unit} {facts.gap_example} and others: {facts.rows_missing} time steps have no row",
                next_step="look for gaps in the log; features that look back in time do not span them",
            )
        )
    if facts.sizes:
        usual, count = max(facts.sizes.items(), key=lambda item: item[1])
        odd = facts.units - count
        if 0 < odd <= 0.1 * facts.units and usual > 1:
            found.append(
                Finding(
                    fault="short_units",
                    severity="warn",
                    where=f"{odd} of {facts.units} units do not have the usual {usual} rows",
                    value=odd / total,
                    threshold=0,
                    unit="share of units",
                    next_step="see whether a shard was cut short while it was written or copied",
                )
            )
    return found


def duplicate_findings(stream: Stream, cfg: AuditConfig) -> list[Finding]:
    """Units that hold the measurements of another unit, bit for bit, and whether they straddle splits."""
    shared: Counter[tuple[int, int]] = Counter()
    across: Counter[tuple[int, int]] = Counter()
    inside = 0
    for records in stream.contents:
        records = records[np.argsort(records["content"], kind="stable")]
        repeats = np.flatnonzero(records["content"][1:] == records["content"][:-1])
        for i in repeats:
            a, b = records[i], records[i + 1]
            if a["unit"] == b["unit"]:
                inside += 1
                continue
            pair = (min(int(a["unit"]), int(b["unit"])), max(int(a["unit"]), int(b["unit"])))
            shared[pair] += 1
            across[pair] += int(a["split"] != b["split"])
    sizes = unit_sizes(stream, {u for pair in shared for u in pair})
    # One equal row can be chance (coarsely quantised reports); half of a unit's rows, or three, is a copy.
    copies = {p: n for p, n in shared.items() if n >= min(3, max(1, 0.5 * min(sizes[p[0]], sizes[p[1]])))}
    found, unit, rows = [], stream.schema.unit_column, max(stream.rows, 1)
    if copies:
        (a, b), n = max(copies.items(), key=lambda item: (item[1], -item[0][0], -item[0][1]))
        found.append(
            Finding(
                fault="duplicated_unit",
                severity="fail",
                where=f"{len(copies)} pairs of {unit}; {unit} {b} holds {n} rows of {unit} {a}",
                value=sum(copies.values()) / rows,
                threshold=0,
                next_step="keep one copy of each drop; see how the log came to be read twice",
            )
        )
        if leaked := sorted(p for p in copies if across[p]):
            found.append(
                Finding(
                    fault="split_leak",
                    severity="fail",
                    where=f"{unit} {leaked[0][0]} and {leaked[0][1]} hold the same rows in different splits; "
                    f"{len(leaked)} such pairs",
                    value=sum(copies[p] for p in leaked) / rows,
                    threshold=0,
                    next_step="remove the copies, then split again",
                )
            )
    if inside > cfg.repeats_fail * rows and inside > 2:
        found.append(
            Finding(
                fault="repeated_rows",
                severity="fail",
                where=f"{inside} rows repeat another row of their own {unit}",
                value=inside / rows,
                threshold=cfg.repeats_fail,
                next_step="drop rows logged twice; see whether the receiver was stuck",
            )
        )
    return found


def unit_sizes(stream: Stream, units: set[int]) -> dict[int, int]:
    """Rows of each of the named units."""
    wanted = np.array(sorted(units), np.int64)
    sizes = np.zeros(len(wanted), np.int64)
    for records in stream.units if len(wanted) else ():
        at = np.minimum(np.searchsorted(wanted, records["unit"]), len(wanted) - 1)
        hit = wanted[at] == records["unit"]
        sizes += np.bincount(at[hit], minlength=len(wanted))
    return dict(zip(wanted.tolist(), sizes.tolist(), strict=True))
