"""A catalogue of faults that real logs have, planted on purpose at random place and severity: how good is the audit?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pyarrow as pa

from rankd_pipeline.audit.report import AuditConfig, AuditReport, audit
from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema, SourceInfo, as_column
from rankd_pipeline.store.tensors import column_array

SEVERITIES = ("low", "medium", "high")


@dataclass(frozen=True)
class Corpus:
    """A corpus in memory: feature columns as arrays (n rows first), labels (sample_id, label), who owns it.

    `finish` changes the finished Arrow batches: what happens to files, not to values.
    """

    columns: dict[str, np.ndarray]
    labels: pa.Table
    sources: tuple[SourceInfo, ...]
    schema: CorpusSchema
    finish: Callable[[list[pa.Table]], list[pa.Table]] | None = None

    @property
    def rows(self) -> int:
        return len(self.columns[self.schema.id_column])

    def batches(self, rows: int = 1024) -> list[pa.Table]:
        """The feature tables as a shard reader would give them."""
        arrays = [as_column(self.columns[c.name], c) for c in self.schema.columns]
        table = pa.Table.from_arrays(arrays, names=[c.name for c in self.schema.columns])
        parts = [table.slice(i, rows) for i in range(0, max(self.rows, 1), rows)]
        return self.finish(parts) if self.finish else parts

    def take(self, index: np.ndarray) -> "Corpus":
        """The rows `index`, in that order, without the labels of the rest."""
        columns = {name: values[index] for name, values in self.columns.items()}
        kept = np.isin(column_array(self.labels["sample_id"]), columns[self.schema.id_column])
        return replace(self, columns=columns, labels=self.labels.filter(pa.array(kept)))

    def audit(self, cfg: AuditConfig | None = None) -> AuditReport:
        """Audit this corpus."""
        return audit(self.batches, self.labels, self.schema, self.sources, cfg)


Plant = Callable[[Corpus, np.random.Generator, float], Corpus]


@dataclass(frozen=True)
class Fault:
    """A kind of fault. `expects`: findings that name it rightly. `scale` says what low and high severity mean."""

    name: str
    expects: frozenset[str]
    scale: str
    plant: Plant = field(repr=False)


CATALOGUE: dict[str, Fault] = {}


def _fault(expects: str, scale: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        CATALOGUE[plant.__name__] = Fault(plant.__name__, frozenset(expects.split()), scale, plant)
        return plant

    return register


# -- tools --------------------------------------------------------------------------------------------------------
def _log(severity: float, low: float, high: float) -> float:
    return float(low * (high / low) ** severity)


def _main(corpus: Corpus) -> tuple[ColumnSpec, np.ndarray, np.ndarray]:
    """The measured tensor with a mask: its spec, a copy of its values and of its mask, both [n, width]."""
    spec = next(c for c in corpus.schema.columns if c.role == "feature" and c.mask)
    values, mask = corpus.columns[spec.name], corpus.columns[spec.mask or ""]
    return spec, values.reshape(len(values), -1).copy(), mask.reshape(len(mask), -1).copy()


def _with(corpus: Corpus, spec: ColumnSpec, values: np.ndarray, mask: np.ndarray | None = None) -> Corpus:
    changed: dict[str, np.ndarray] = {spec.name: values.reshape(-1, *spec.shape).astype(np.float32)}
    if mask is not None and spec.mask:
        changed[spec.mask] = mask.reshape(-1, *spec.shape).astype(np.uint8)
    return replace(corpus, columns={**corpus.columns, **changed})


def _cells(corpus: Corpus, rng: np.random.Generator, share: float) -> tuple[ColumnSpec, np.ndarray, np.ndarray, np.ndarray]:
    """(spec, values, mask, chosen measured values [n, width]); at least one value is chosen."""
    spec, values, mask = _main(corpus)
    there = np.flatnonzero(mask.reshape(-1) != 0)
    chosen = np.zeros(mask.size, bool)
    chosen[rng.choice(there, max(1, round(share * len(there))), replace=False)] = True
    return spec, values, mask, chosen.reshape(mask.shape)


def _block(corpus: Corpus, rng: np.random.Generator, share: float) -> np.ndarray:
    """[n] a run of rows, such as one log file: at least 2 % of the rows, anywhere."""
    n = corpus.rows
    length = max(round(share * n), round(0.02 * n), 8)
    start = int(rng.integers(0, n - length + 1))
    chosen = np.zeros(n, bool)
    chosen[start : start + length] = True
    return chosen


def _units(corpus: Corpus, rng: np.random.Generator, share: float, splits: tuple[str, ...] = ()) -> np.ndarray:
    """Ids of whole units, at least one."""
    unit, split = corpus.columns[corpus.schema.unit_column], corpus.columns[corpus.schema.split_column]
    pool = np.unique(unit[np.isin(split, splits)] if splits else unit)
    return rng.choice(pool, max(1, round(share * len(pool))), replace=False)


def _labels(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    return column_array(corpus.labels["sample_id"]).copy(), column_array(corpus.labels[corpus.schema.label.name]).astype(np.int64)


def _with_labels(corpus: Corpus, ids: np.ndarray, labels: np.ndarray) -> Corpus:
    return replace(corpus, labels=pa.table({"sample_id": pa.array(ids), corpus.schema.label.name: pa.array(labels)}))


def _series(corpus: Corpus) -> np.ndarray:
    """[n] a number for the series (what one clock runs through) of each row."""
    names = list(corpus.schema.series_columns or (corpus.schema.unit_column,))
    return pd.DataFrame({c: corpus.columns[c] for c in names}).groupby(names).ngroup().to_numpy()


def _append(corpus: Corpus, rows: np.ndarray, rng: np.random.Generator, split: str | None) -> Corpus:
    """The rows once more at the end, as new units with new ids and their labels, in `split` if given."""
    schema = corpus.schema
    copy = {name: values[rows].copy() for name, values in corpus.columns.items()}
    old_ids, unit = copy[schema.id_column].copy(), copy[schema.unit_column]
    copy[schema.id_column] = corpus.columns[schema.id_column].max() + 1 + np.arange(len(rows))
    _, index = np.unique(unit, return_inverse=True)
    copy[schema.unit_column] = corpus.columns[schema.unit_column].max() + 1 + index
    if schema.time_column and schema.series_columns:
        # The copies follow the last unit of their series, so that only their content gives them away.
        series, time = _series(corpus), corpus.columns[schema.time_column]
        last = np.array([time[series == code].max() for code in range(series.max() + 1)])
        for u in range(index.max() + 1):
            mine = index == u
            last[series[rows[mine][0]]] += 1
            copy[schema.time_column][mine] = last[series[rows[mine][0]]]
    if split is not None:
        copy[schema.split_column] = np.full(len(rows), split, object)
    columns = {name: np.concatenate([values, copy[name]]) for name, values in corpus.columns.items()}
    ids, labels = _labels(corpus)
    order = np.argsort(ids)
    at = np.minimum(np.searchsorted(ids, old_ids, sorter=order), len(ids) - 1)
    has = ids[order[at]] == old_ids
    ids = np.concatenate([ids, copy[schema.id_column][has]])
    labels = np.concatenate([labels, labels[order[at[has]]]])
    return _with_labels(replace(corpus, columns=columns), ids, labels)


# -- values -------------------------------------------------------------------------------------------------------
@_fault("not_finite", "0.01 % to 5 % of values")
def not_a_number(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """NaN or infinity where a value was measured."""
    spec, values, _, chosen = _cells(corpus, rng, _log(severity, 1e-4, 0.05))
    values[chosen] = rng.choice([np.nan, np.inf, -np.inf])
    return _with(corpus, spec, values)


@_fault("sentinel out_of_range mask_mismatch", "0.01 % to 5 % of values")
def sentinel(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """The log's code for "nothing measured", taken for a measurement."""
    spec, values, _, chosen = _cells(corpus, rng, _log(severity, 1e-4, 0.05))
    values[chosen] = rng.choice([-999.0, 0.0, 127.0, 255.0, -32768.0])
    return _with(corpus, spec, values)


@_fault("out_of_range", "0.01 % to 5 % of values")
def out_of_range(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Values that physics or the standard rules out."""
    spec, values, _, chosen = _cells(corpus, rng, _log(severity, 1e-4, 0.05))
    low, high = spec.valid_range or (-1.0, 1.0)
    off = rng.uniform(1, 40, int(chosen.sum()))
    values[chosen] = np.where(rng.random(len(off)) < 0.5, low - off, high + off)
    return _with(corpus, spec, values)


@_fault("mask_mismatch sentinel", "0.01 % to 5 % of values")
def mask_contradicts(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """A mask that says missing where there is a value, or measured where there is none."""
    spec, values, mask, chosen = _cells(corpus, rng, _log(severity, 1e-4, 0.05))
    if rng.random() < 0.5:
        mask[chosen] = 0
    else:
        values[chosen] = 0.0
    return _with(corpus, spec, values, mask)


@_fault("out_of_range", "a run of 2 % to 50 % of rows")
def watts_for_dbm(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """One log in W or mW among logs in dBm."""
    spec, values, mask = _main(corpus)
    chosen = _block(corpus, rng, _log(severity, 0.02, 0.5))[:, None] & (mask != 0)
    values[chosen] = 10.0 ** ((values[chosen] - rng.choice([0.0, 30.0])) / 10)
    return _with(corpus, spec, values)


@_fault("out_of_range level_shift", "a run of 2 % to 50 % of rows")
def dbw_for_dbm(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """One log 30 dB too low (dBW) or 30 dB too high (an amplifier counted twice)."""
    spec, values, mask = _main(corpus)
    chosen = _block(corpus, rng, _log(severity, 0.02, 0.5))[:, None] & (mask != 0)
    values[chosen] += rng.choice([-30.0, 30.0])
    return _with(corpus, spec, values)


@_fault("out_of_range", "a run of 2 % to 50 % of rows")
def sign_flipped(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """One log whose minus signs were lost."""
    spec, values, mask = _main(corpus)
    chosen = _block(corpus, rng, _log(severity, 0.02, 0.5))[:, None] & (mask != 0)
    values[chosen] *= -1
    return _with(corpus, spec, values)


@_fault("stuck_component dead_component", "30 % to 100 % of the rows of one site")
def stuck_component(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """One beam of one site repeats a value, or is never there."""
    spec, values, mask = _main(corpus)
    site = corpus.columns[corpus.schema.site_column or ""]
    rows = (site == rng.choice(np.unique(site))) & (rng.random(corpus.rows) < 0.3 + 0.7 * severity)
    seen = (mask[rows] != 0).mean(axis=0)
    k = int(rng.choice(np.flatnonzero(seen >= 0.5 * seen.max())))
    held = values[rows, k][mask[rows, k] != 0]
    values[rows, k] = np.where(mask[rows, k] != 0, rng.choice(held), 0)
    return _with(corpus, spec, values, mask)


@_fault("component_order", "2 components swapped to all 16 shuffled, at one site")
def components_permuted(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """The beams of one site numbered in another order; labels untouched."""
    spec, values, mask = _main(corpus)
    site = corpus.columns[corpus.schema.site_column or ""]
    rows = np.flatnonzero(site == rng.choice(np.unique(site)))
    instants = int(np.prod(spec.shape[:-1]))
    d = spec.shape[-1]
    moved = rng.choice(d, max(2, round(severity * d)), replace=False)
    order = np.arange(d)
    order[moved] = np.roll(moved, 1)
    whole = np.concatenate([order + t * d for t in range(instants)])
    values[rows], mask[rows] = values[rows][:, whole], mask[rows][:, whole]
    return _with(corpus, spec, values, mask)


# -- rows and time ------------------------------------------------------------------------------------------------
@_fault("rows_missing short_units", "0.5 % to 20 % of rows, in runs")
def rows_lost(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Runs of rows that were never written."""
    n, lost = corpus.rows, np.zeros(corpus.rows, bool)
    wanted = max(4, round(_log(severity, 0.005, 0.2) * n))
    while lost.sum() < wanted:
        start, length = int(rng.integers(0, n)), int(rng.integers(3, 40))
        lost[start : start + min(length, wanted)] = True
    return corpus.take(np.flatnonzero(~lost))


@_fault("missing_run", "1 % to 20 % of rows, in runs")
def receiver_off(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Runs of rows in which nothing was measured."""
    spec, values, mask = _main(corpus)
    n, off = corpus.rows, np.zeros(corpus.rows, bool)
    wanted = max(25, round(_log(severity, 0.01, 0.2) * n))
    while off.sum() < wanted:
        start, length = int(rng.integers(0, n - 25)), int(rng.integers(25, 80))
        off[start : start + min(length, wanted)] = True
    values[off], mask[off] = 0, 0
    return _with(corpus, spec, values, mask)


@_fault("clock", "0.2 % to 10 % of rows")
def clock_fault(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """A clock that jumps back, or stands still for some units."""
    name = corpus.schema.time_column or ""
    time, keys = corpus.columns[name].copy(), _series(corpus)
    # Begin where a series goes on to another time, or nothing would change.
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero((np.diff(keys[order]) == 0) & (np.diff(time[order]) > 0)) + 1
    start = int(rng.choice(begins))
    rows = order[start : start + max(8, round(_log(severity, 0.002, 0.1) * corpus.rows))]
    rows = rows[keys[rows] == keys[order[start]]]
    if rng.random() < 0.5:
        time[rows] -= rng.uniform(3, 3600)
    else:
        time[rows] = time[order[start - 1]]
    return replace(corpus, columns={**corpus.columns, name: time})


@_fault("duplicate_id", "0.1 % to 10 % of rows")
def ids_repeated(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Sample ids that were given twice."""
    name = corpus.schema.id_column
    ids = corpus.columns[name].copy()
    hit = rng.choice(corpus.rows, max(1, round(_log(severity, 0.001, 0.1) * corpus.rows)), replace=False)
    ids[hit] = ids[hit - 1]
    return replace(corpus, columns={**corpus.columns, name: ids})


# -- copies and leaks ---------------------------------------------------------------------------------------------
@_fault("duplicated_unit", "0.2 % to 10 % of units")
def units_duplicated(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Whole drops once more, under new ids, in the same split."""
    chosen = _units(corpus, rng, _log(severity, 0.002, 0.1))
    rows = np.flatnonzero(np.isin(corpus.columns[corpus.schema.unit_column], chosen))
    return _append(corpus, rows, rng, None)


@_fault("split_leak", "0.2 % to 10 % of units")
def units_leaked(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Training drops that are in the test set as well: the same unit torn, or a copy under new ids."""
    schema = corpus.schema
    chosen = _units(corpus, rng, _log(severity, 0.002, 0.1), ("train",))
    unit = corpus.columns[schema.unit_column]
    rows = np.flatnonzero(np.isin(unit, chosen))
    if rng.random() < 0.5:
        return _append(corpus, rows, rng, "test")
    split = corpus.columns[schema.split_column].copy()
    _, first = np.unique(unit[rows], return_index=True)
    split[rows[first]] = "test"
    return replace(corpus, columns={**corpus.columns, schema.split_column: split})


@_fault("near_copy split_leak", "0.2 % to 10 % of units; noise of 1.5 dB (low) to 0.3 dB (high)")
def units_leaked_with_noise(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Training drops that are in the test set under new ids, each value with a little noise, rounded as reports are."""
    schema, before = corpus.schema, corpus.rows
    chosen = _units(corpus, rng, _log(severity, 0.002, 0.1), ("train",))
    rows = np.flatnonzero(np.isin(corpus.columns[schema.unit_column], chosen))
    copied = _append(corpus, rows, rng, "test")
    spec, values, mask = _main(copied)
    low, high = spec.valid_range or (-np.inf, np.inf)
    new = values[before:]
    noisy = np.clip(np.rint(new + _log(1 - severity, 0.3, 1.5) * rng.standard_normal(new.shape)), low, high)
    values[before:] = np.where(mask[before:] != 0, noisy, 0)
    return _with(copied, spec, values)


# -- keys ---------------------------------------------------------------------------------------------------------
@_fault("inconsistent_key split_leak", "a run of 2 % to 30 % of rows")
def key_mislabelled(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """A run of rows filed under another site, or under another band."""
    schema = corpus.schema
    name = str(rng.choice([c for c in (schema.site_column, schema.band_column) if c]))
    values = corpus.columns[name].copy()
    rows = _block(corpus, rng, _log(severity, 0.02, 0.3))
    values[rows] = rng.choice(np.unique(values[~rows]))
    if (values == corpus.columns[name]).all():
        return key_mislabelled(corpus, rng, severity)
    return replace(corpus, columns={**corpus.columns, name: values})


@_fault("imbalance missing_category", "6 : 1 to wholly absent")
def scenario_starved(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """One scenario nearly or wholly absent from the corpus."""
    column = corpus.schema.balance_columns[-1]
    values = corpus.columns[column]
    names, counts = np.unique(values, return_counts=True)
    rare = int(rng.integers(0, len(names)))
    # The audit warns at 4 : 1; low severity leaves 6 : 1, high severity one unit, or none where the schema expects some.
    keep = counts[np.arange(len(names)) != rare].max() / 6 * (1 - severity) / counts[rare]
    unit = corpus.columns[corpus.schema.unit_column]
    mine = np.unique(unit[values == names[rare]])
    left = 0 if severity > 0.95 and corpus.schema.column(column).categories else max(int(keep * len(mine)), 1)
    kept = rng.choice(mine, left, replace=False)
    return corpus.take(np.flatnonzero((values != names[rare]) | np.isin(unit, kept)))


@_fault("sovereignty", "1 % to 100 % of rows")
def owner_unknown(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Rows of a source without an owner, or of one that nobody declared."""
    name = corpus.schema.source_column or ""
    sources = corpus.columns[name].copy()
    unit = corpus.columns[corpus.schema.unit_column]
    rows = np.isin(unit, _units(corpus, rng, _log(severity, 0.01, 1.0)))
    sources[rows] = "survey"
    added = () if rng.random() < 0.5 else (SourceInfo(name="survey", owner="", may_leave=True, kind="drive_test"),)
    return replace(corpus, columns={**corpus.columns, name: sources}, sources=corpus.sources + added)


# -- labels -------------------------------------------------------------------------------------------------------
@_fault("label_noise", "5 % to 20 % of labels drawn at random")
def labels_random(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Labels replaced by random classes."""
    ids, labels = _labels(corpus)
    hit = rng.random(len(labels)) < _log(severity, 0.05, 0.2)
    labels[hit] = rng.integers(0, corpus.schema.label.classes, int(hit.sum()))
    return _with_labels(corpus, ids, labels)


@_fault("label_noise", "a run of 15 % to 60 % of labels")
def labels_of_other_rows(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Labels joined by row number after some rows were lost: each belongs to a row a little further on."""
    ids, labels = _labels(corpus)
    length = round(_log(severity, 0.15, 0.6) * len(labels))
    start = int(rng.integers(0, len(labels) - length))
    labels[start : start + length] = np.roll(labels[start : start + length], int(rng.integers(1, 8)))
    return _with_labels(corpus, ids, labels)


@_fault("label_shift label_out_of_range", "the labels of one site, band or split")
def labels_off_by_one(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """One site (low), band (medium) or split (high) counts its classes from 1."""
    schema = corpus.schema
    column = (schema.site_column, schema.band_column, schema.split_column)[min(int(severity * 3), 2)] or schema.split_column
    ids, labels = _labels(corpus)
    order = np.argsort(corpus.columns[schema.id_column])
    key = corpus.columns[column][order[np.searchsorted(corpus.columns[schema.id_column], ids, sorter=order)]]
    hit = key == rng.choice(np.unique(key))
    # Where the last class never occurs the fault shows in no range.
    labels[hit] = (labels[hit] + 1) % schema.label.classes
    return _with_labels(corpus, ids, labels)


@_fault("label_unknown_id label_conflict label_absent", "1 % to 100 % of labels")
def labels_of_another_corpus(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Labels whose sample ids are not in the corpus."""
    ids, labels = _labels(corpus)
    hit = rng.random(len(ids)) < _log(severity, 0.01, 1.0)
    hit[int(rng.integers(0, len(ids)))] = True
    return _with_labels(corpus, np.where(hit, ids + 10_000_000, ids), labels)


# -- files --------------------------------------------------------------------------------------------------------
@_fault("format null", "one batch to all batches")
def column_broken(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """Batches in which a column is missing, of another type, or has nulls."""
    spec = corpus.schema.columns[int(rng.integers(0, len(corpus.schema.columns)))]
    kind, seed = int(rng.integers(0, 3)), int(rng.integers(0, 2**31))

    def finish(batches: list[pa.Table]) -> list[pa.Table]:
        hit = np.random.default_rng(seed).permutation(len(batches))[: max(1, round(severity * len(batches)))]
        return [_broken(b, spec, kind) if i in hit else b for i, b in enumerate(batches)]

    return replace(corpus, finish=finish)


def _broken(table: pa.Table, spec: ColumnSpec, kind: int) -> pa.Table:
    at = table.column_names.index(spec.name)
    if kind == 0:
        return table.drop_columns([spec.name])
    if kind == 1 or spec.shape:
        return table.set_column(at, spec.name, pa.array([str(i) for i in range(table.num_rows)], pa.large_binary()))
    values = table[spec.name].to_pylist()
    return table.set_column(at, spec.name, pa.array([None, *values[1:]], table.schema.field(spec.name).type))


@_fault("short_units rows_missing label_unknown_id label_absent", "5 % to 90 % of one batch is gone")
def shard_cut(corpus: Corpus, rng: np.random.Generator, severity: float) -> Corpus:
    """A shard whose last rows were not copied; their labels were."""
    share, place = _log(severity, 0.05, 0.9), float(rng.random())

    def finish(batches: list[pa.Table]) -> list[pa.Table]:
        i = int(place * len(batches))
        kept = batches[i].slice(0, max(batches[i].num_rows - max(int(share * batches[i].num_rows), 2), 1))
        return [*batches[:i], kept, *batches[i + 1 :]]

    return replace(corpus, finish=finish)


# -- clean corpora and the benchmark ------------------------------------------------------------------------------
def resample(pool: Corpus, rng: np.random.Generator, share: float = 0.5) -> Corpus:
    """A clean corpus: whole units drawn from every series of a clean pool, numbered and timed afresh.

    Units of the seen splits are split again by the pool's own shares within each series, so that no two corpora agree on
    what is trained and what is tested.
    """
    schema = pool.schema
    unit, series = pool.columns[schema.unit_column], schema.series_columns or (schema.unit_column,)
    frame = pd.DataFrame({"unit": unit, **{c: pool.columns[c] for c in series}}).groupby("unit", sort=True).first()
    chosen: list[np.ndarray] = []
    roles: dict[int, int] = {}
    for _, group in frame.groupby(list(series), sort=True):
        units = np.sort(rng.choice(group.index.to_numpy(), max(2, round(share * len(group))), replace=False))
        # Whose split and label flag each unit takes over.
        roles.update(zip(units.tolist(), rng.permutation(units).tolist(), strict=True))
        chosen.append(units)
    _, first, size = np.unique(unit, return_index=True, return_counts=True)
    at = dict(zip(np.unique(unit).tolist(), range(len(first)), strict=True))
    picked = [u for units in chosen for u in units.tolist()]
    order = np.argsort(unit, kind="stable")
    starts = np.r_[0, np.cumsum(size)]
    rows = np.concatenate([order[starts[at[u]] : starts[at[u] + 1]] for u in picked])
    columns = {name: values[rows].copy() for name, values in pool.columns.items()}
    lengths = np.array([size[at[u]] for u in picked])
    donor = np.repeat([order[starts[at[roles[u]]]] for u in picked], lengths)
    columns[schema.split_column] = pool.columns[schema.split_column][donor]
    old_ids = columns[schema.id_column]
    columns[schema.id_column] = np.arange(len(rows), dtype=np.int64)
    columns[schema.unit_column] = np.repeat(np.arange(len(picked)), lengths)
    if schema.time_column and schema.series_columns:
        within = np.concatenate([np.arange(len(units)) for units in chosen])
        columns[schema.time_column] = np.repeat(within, lengths).astype(float)
    ids, labels = _labels(pool)
    lookup = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    labelled = pool.columns[schema.labelled_column][donor] if schema.labelled_column else np.ones(len(rows), bool)
    labelled &= np.array([i in lookup for i in old_ids.tolist()])
    if schema.labelled_column:
        columns[schema.labelled_column] = labelled
    new_labels = np.array([lookup[i] for i in old_ids[labelled].tolist()], np.int64)
    return _with_labels(replace(pool, columns=columns), columns[schema.id_column][labelled], new_labels)


def run_catalogue(
    make_clean: Callable[[int], Corpus],
    seeds: Sequence[int],
    clean_seeds: Sequence[int],
    faults: Sequence[str] = tuple(CATALOGUE),
    cfg: AuditConfig | None = None,
) -> pd.DataFrame:
    """Plant every fault at random severity and place into a fresh clean corpus per seed, and audit it.

    :returns: one row a trial: fault ("clean" for none), seed, severity (0 to 1; NaN), level (low, medium, high), found (any
        finding at all), named (a finding that names the fault), stopped (verdict fail), findings
    """
    rows = []
    for seed in clean_seeds:
        rows.append(_trial("clean", seed, np.nan, make_clean(seed).audit(cfg), frozenset()))
    for seed in seeds:
        clean = make_clean(seed)
        for name in faults:
            rng = np.random.default_rng([seed, *name.encode()])
            severity = float(rng.random())
            report = CATALOGUE[name].plant(clean, rng, severity).audit(cfg)
            rows.append(_trial(name, seed, severity, report, CATALOGUE[name].expects))
    return pd.DataFrame(rows)


def _trial(fault: str, seed: int, severity: float, report: AuditReport, expects: frozenset[str]) -> dict:
    kinds = {f.fault for f in report.findings}
    level = "" if np.isnan(severity) else SEVERITIES[min(int(severity * 3), 2)]
    return {
        "fault": fault,
        "seed": seed,
        "severity": severity,
        "level": level,
        "found": bool(kinds),
        "named": bool(kinds & expects),
        "stopped": report.verdict == "fail",
        "findings": " ".join(sorted(kinds)),
    }


def recall_table(trials: pd.DataFrame) -> pd.DataFrame:
    """Recall of each fault, overall and by severity: trials, found, named, stopped and named_<level>; clean is left out."""
    planted = trials[trials["fault"] != "clean"]
    table = planted.groupby("fault", sort=False).agg(
        trials=("found", "size"), found=("found", "mean"), named=("named", "mean"), stopped=("stopped", "mean")
    )
    levels = planted.pivot_table(index="fault", columns="level", values="named", aggfunc="mean", sort=False)
    return table.join(levels.reindex(columns=list(SEVERITIES)).add_prefix("named_"))
