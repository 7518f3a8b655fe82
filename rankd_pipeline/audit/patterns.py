"""The checks that compare rows with each other, on a bounded sample of whole units: stuck and swapped components, unit
offsets, near copies, wrong labels."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.spatial import KDTree
from scipy.stats import beta, binom

from rankd_pipeline.audit.checks import AuditConfig, Finding, KeyCodes, content_columns, hash64
from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema
from rankd_pipeline.store.tensors import column_array

NEIGHBOURS = 50
COMPLEX_AXIS = "re_im"
MIN_ROWS = 100
RUN_SCORE = 6.0


@dataclass(frozen=True)
class Sample:
    """Rows of the sampled units in corpus order. n rows; values [n, width] by column, NaN where missing."""

    values: dict[str, np.ndarray]
    unit: np.ndarray
    ids: np.ndarray
    codes: dict[str, np.ndarray]
    names: dict[str, list[str]]
    label: np.ndarray
    """[n] int64, -1 = none."""
    complete: bool
    """True if the sample is the whole corpus."""

    @property
    def rows(self) -> int:
        return len(self.unit)

    def groups(self, columns: tuple[str | None, ...]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, row mask [n]) of each combination of the key columns that exist."""
        there = [c for c in columns if c in self.codes]
        if not there:
            yield "the corpus", np.ones(self.rows, bool)
            return
        combined, inverse = np.unique(np.stack([self.codes[c] for c in there], axis=1), axis=0, return_inverse=True)
        for i, row in enumerate(combined):
            yield ", ".join(f"{c} {self.names[c][v]}" for c, v in zip(there, row, strict=True)), inverse.reshape(-1) == i


class Sampler:
    """Keeps whole units chosen by a hash of their id, so that the choice depends on no order, and halves when full."""

    def __init__(self, schema: CorpusSchema, cfg: AuditConfig, labels: pa.Table | None) -> None:
        self.schema, self.cfg = schema, cfg
        self._limit = np.uint64(2**64 - 1)
        self._parts: list[dict[str, np.ndarray]] = []
        self._rows = 0
        self._coders = {c.name: KeyCodes() for c in schema.columns if c.role == "key"}
        self._label_ids = np.zeros(0, np.int64)
        if labels is not None and labels.num_rows:
            ids, values = column_array(labels["sample_id"]), column_array(labels[schema.label.name])
            order = np.argsort(ids, kind="stable")
            self._label_ids, self._labels = ids[order], values[order].astype(np.int64)

    def update(self, table: pa.Table) -> None:
        """Offer one batch (of sound format)."""
        unit = column_array(table[self.schema.unit_column]).astype(np.int64)
        part = {"unit": unit, "hash": hash64(unit.view(np.uint64)[:, None]), "ids": column_array(table[self.schema.id_column])}
        part["label"] = self._label_of(part["ids"])
        for name, coder in self._coders.items():
            part[f"key {name}"] = coder.encode(column_array(table[name]))
        for spec in measured_columns(self.schema):
            part[f"value {spec.name}"] = _measured(table, spec)
        self._parts.append(self._kept(part))
        self._rows += len(self._parts[-1]["unit"])
        while self._rows > self.cfg.sampled_rows:
            self._limit = self._limit // np.uint64(2)
            self._parts = [self._kept(p) for p in self._parts]
            self._rows = sum(len(p["unit"]) for p in self._parts)

    def _kept(self, part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        keep = part["hash"] <= self._limit
        return part if keep.all() else {name: values[keep] for name, values in part.items()}

    def _label_of(self, ids: np.ndarray) -> np.ndarray:
        if not len(self._label_ids):
            return np.full(len(ids), -1, np.int64)
        at = np.minimum(np.searchsorted(self._label_ids, ids), len(self._label_ids) - 1)
        found = (self._label_ids[at] == ids) & (self._labels[at] >= 0) & (self._labels[at] < self.schema.label.classes)
        return np.where(found, self._labels[at], -1)

    def sample(self) -> Sample | None:
        """What was kept; None if no batch was sound."""
        if not self._parts:
            return None
        whole = {name: np.concatenate([p[name] for p in self._parts]) for name in self._parts[0]}
        return Sample(
            {c.name: whole[f"value {c.name}"] for c in measured_columns(self.schema)},
            whole["unit"],
            whole["ids"],
            {n: whole[f"key {n}"] for n in self._coders},
            {n: c.names for n, c in self._coders.items()},
            whole["label"],
            self._limit == np.uint64(2**64 - 1),
        )


def measured_columns(schema: CorpusSchema) -> list[ColumnSpec]:
    """Floating feature columns."""
    return [c for c in content_columns(schema) if c.role == "feature" and c.dtype.startswith("float")]


def _measured(table: pa.Table, spec: ColumnSpec) -> np.ndarray:
    values = column_array(table[spec.name]).reshape(table.num_rows, -1).astype(np.float32)
    missing = ~np.isfinite(values) | np.isin(values, np.asarray(spec.sentinels, np.float32))
    if spec.mask:
        missing |= column_array(table[spec.mask]).reshape(table.num_rows, -1) == 0
    return np.where(missing, np.float32(np.nan), values)


def pattern_findings(sample: Sample, schema: CorpusSchema, cfg: AuditConfig) -> tuple[list[Finding], "LabelNoise | None"]:
    """All findings of the comparing checks, and the estimate of label noise where there are enough labels."""
    found: list[Finding] = []
    for spec in measured_columns(schema):
        if "runs" in cfg.comparisons:
            found += empty_runs(sample, spec, schema)
        if "components" in cfg.comparisons and spec.width > 2:
            found += stuck_components(sample, spec, schema)
            found += component_order(sample, spec, schema)
        if "levels" in cfg.comparisons:
            found += level_shifts(sample, spec, schema)
            found += level_runs(sample, spec, schema)
    if "copies" in cfg.comparisons:
        found += near_copies(sample, schema)
    noise = None
    if schema.label.classes and "labels" in cfg.comparisons:
        around = labelled_neighbours(sample, schema, cfg)
        if around is not None:
            found += label_shifts(sample, schema, around)
            noise = estimate_label_noise(sample, schema, cfg, around)
        if noise and noise.low > cfg.label_noise_warn:
            found.append(
                Finding(
                    fault="label_noise",
                    severity="fail" if noise.low > cfg.label_noise_fail else "warn",
                    where=f"{noise.where}: about {noise.share:.1%} of labels contradict the features "
                    f"(95 % interval {noise.low:.1%} to {noise.high:.1%})",
                    value=noise.share,
                    threshold=cfg.label_noise_warn,
                    next_step="compare some of the labels with the raw log; a join by row number instead of id is a usual cause",
                )
            )
    return found, noise


# -- rows without any value ---------------------------------------------------------------------------------------
def empty_runs(sample: Sample, spec: ColumnSpec, schema: CorpusSchema) -> list[Finding]:
    """Runs of rows without a value that are too long for chance: a receiver that was off, a log that was cut.

    Chance: rows of a group are empty with the group's own probability p; a run of L among n rows has p^L * n.
    """
    empty = np.asarray(np.isnan(sample.values[spec.name]).all(axis=1))
    if not empty.any():
        return []
    lost, where, groups = 0, "", list(sample.groups((schema.source_column, schema.site_column, schema.band_column)))
    for name, rows in groups:
        flags = empty[rows]
        edges = np.flatnonzero(np.diff(np.r_[0, flags.astype(np.int8), 0]))
        lengths = edges[1::2] - edges[::2]
        if not len(lengths):
            continue
        # The run under test must not raise the probability it is tested with.
        longest = int(lengths.max())
        p = max((flags.sum() - longest) / max(len(flags) - longest, 1), 1 / max(len(flags), 1))
        limit = max(8, int(np.ceil(np.log(1e-6 / max(len(flags), 1)) / np.log(min(p, 0.95)))))
        if (over := int(lengths[lengths >= limit].sum())) > 0:
            lost += over
            where = (
                where or f"{name}: {longest} rows in a row, first at sample {sample.ids[rows][edges[2 * int(lengths.argmax())]]}"
            )
    if not lost:
        return []
    return [
        Finding(
            fault="missing_run",
            severity="warn",
            where=f"column {spec.name}, {where}",
            value=lost / sample.rows,
            threshold=0,
            next_step="see whether the receiver was off or the log was cut; leave the period out if so",
        )
    ]


# -- components ---------------------------------------------------------------------------------------------------
def stuck_components(sample: Sample, spec: ColumnSpec, schema: CorpusSchema) -> list[Finding]:
    """Components that repeat one value far more often than their neighbours do, and components that a site never has."""
    x = sample.values[spec.name]
    found = []
    for name, rows in sample.groups((schema.source_column, schema.site_column)):
        part = x[rows]
        if len(part) < MIN_ROWS:
            continue
        present = (~np.isnan(part)).sum(axis=0)
        modal = np.array([_modal(part[:, k]) for k in range(part.shape[1])])
        counts, share = modal[:, 0], modal[:, 0] / np.maximum(present, 1)
        usual = max(float(np.median(share[present >= 20])) if (present >= 20).any() else 1.0, 0.02)
        # Beyond both a multiple of what the other components do and what a binomial with that rate could.
        stuck = (share > 0.15) & (share > 2.5 * usual) & (counts >= 20) & (binom.sf(counts, present, min(2 * usual, 1)) < 1e-9)
        for k in np.flatnonzero(stuck).tolist():
            found.append(
                Finding(
                    fault="stuck_component",
                    severity="fail",
                    where=f"column {spec.name}, {_component(spec, k)}, {name}: value {modal[k, 1]:g}",
                    value=float(share[k]),
                    threshold=max(0.15, 2.5 * usual),
                    next_step="the component does not move as its neighbours do; check the antenna, the beam, the log column",
                )
            )
        rest = ~rows
        if spec.padded_by is not None:  # what all rows of like shape lack is padding
            codes = sample.codes[spec.padded_by]
            rest &= np.isin(codes, np.unique(codes[rows]))
        others = (~np.isnan(x[rest])).mean(axis=0) if rest.sum() >= MIN_ROWS else None
        if others is not None and present.any():
            # What this site would report if it missed beams as the others do, scaled to its own mean.
            expected = others * (present.mean() / max(len(part) * others.mean(), 1e-9)) * len(part)
            for k in np.flatnonzero((present == 0) & (expected > 40)).tolist():
                found.append(
                    Finding(
                        fault="dead_component",
                        severity="fail",
                        where=f"column {spec.name}, {_component(spec, k)}, {name}: never measured",
                        value=0.0,
                        threshold=float(expected[k]),
                        unit="values",
                        next_step="the component has no value at this site; check the antenna or the column map",
                    )
                )
    return found[:8]


def _modal(values: np.ndarray) -> tuple[float, float]:
    """(count, value) of the most frequent value; the ends of the range do not count: reports clip there."""
    values = values[~np.isnan(values)]
    if not len(values):
        return 0, 0.0
    unique, counts = np.unique(values, return_counts=True)
    return int(counts.max()), float(unique[counts.argmax()])


def _component(spec: ColumnSpec, k: int) -> str:
    at = np.unravel_index(int(k), spec.shape)
    return "component " + ", ".join(f"{a} {int(i)}" for a, i in zip(spec.axes or range(len(at)), at, strict=True))


def filled(x: np.ndarray) -> np.ndarray:
    """[n, d] with a missing value just below the lowest of its row (unmeasured usually means too weak), level removed.

    Rows without any value become zero.
    """
    with np.errstate(all="ignore"):
        there = ~np.isnan(x)
        low = np.where(there, x, np.inf).min(axis=1, keepdims=True)
        high = np.where(there, x, -np.inf).max(axis=1, keepdims=True)
        spread = float(np.nanstd(x)) if there.any() else 1.0
        shape = np.where(there, x, low - 0.2 * spread) - high
    return np.where(there.any(axis=1, keepdims=True), shape, 0.0).astype(np.float32)


def component_order(sample: Sample, spec: ColumnSpec, schema: CorpusSchema) -> list[Finding]:
    """Sites whose components come in another order than elsewhere.

    Each component has a profile: its correlation with all others over the rows of the site. At every other site the same
    component has nearly the same profile. Where swapping two components of a site makes its correlation matrix clearly more
    like the rest's, the order is wrong.
    """
    values = _magnitudes(sample.values[spec.name], spec)
    x = filled(values)
    measured = (~np.isnan(values)).any(axis=1)
    groups = [(n, r & measured) for n, r in sample.groups((schema.source_column, schema.site_column))]
    groups = [(n, r) for n, r in groups if r.sum() >= MIN_ROWS]
    if len(groups) < 3 or values.shape[1] > 256:
        return []
    profiles = np.stack([_correlation(x[r]) for _, r in groups])
    even_units = hash64(sample.unit.astype(np.int64).view(np.uint64)[:, None]) % np.uint64(2) == 0
    found = []
    for g, (name, rows) in enumerate(groups):
        rest = np.median(np.delete(profiles, g, axis=0), axis=0)
        moved = np.flatnonzero(_reorder(profiles[g], rest) != np.arange(len(rest))).tolist()
        if not moved:
            continue
        # Components that nothing tells apart fit better in some order by chance; on other rows that order fits no better.
        half = rows & even_units
        if min(half.sum(), (rows & ~half).sum()) < MIN_ROWS / 4:
            continue
        one, two = _correlation(x[half]), _correlation(x[rows & ~half])
        gain = (_gain(_reorder(one, rest), two, rest) + _gain(_reorder(two, rest), one, rest)) / 2
        if gain > 0.2:
            found.append(
                Finding(
                    fault="component_order",
                    severity="fail",
                    value=float(gain),
                    threshold=0.2,
                    unit="share of misfit explained by another order",
                    where=f"column {spec.name}, {name} ({int(rows.sum())} rows): components {', '.join(map(str, moved[:8]))} "
                    "look permuted",
                    next_step="compare the antenna or beam numbering of this site with the others'; correct the column map",
                )
            )
    return found


def _magnitudes(values: np.ndarray, spec: ColumnSpec) -> np.ndarray:
    """[n, components]: of complex numbers (an axis `re_im`) the RMS at each place of the last axis. Phases are arbitrary, so
    that real and imaginary parts can trade places unseen, and a line of sight that turns ties together what is loose elsewhere."""
    if COMPLEX_AXIS not in spec.axes:
        return values
    tensor = values.reshape(len(values), -1, spec.shape[-1])
    return np.sqrt((tensor**2).mean(axis=1))


def _correlation(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=0)
    covariance = centred.T @ centred / len(x)
    scale = np.sqrt(np.diag(covariance)) + 1e-6
    matrix = covariance / scale / scale[:, None]
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _reorder(matrix: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The order [d] of components, found by greedy swaps, in which `matrix` is closest to `rest`."""
    order = np.arange(len(matrix))
    current = matrix
    i, j = np.triu_indices(len(matrix), 1)
    for _ in range(2 * len(matrix)):
        cross = current @ rest.T
        # What the misfit loses when rows and columns i and j trade places (both matrices symmetric, diagonals zero).
        gain = 4 * (cross[i, j] + cross[j, i] - cross[i, i] - cross[j, j] + 2 * current[i, j] * rest[i, j])
        k = int(gain.argmax())
        if gain[k] <= 1e-6 * float(((current - rest) ** 2).sum()):
            break
        order[[i[k], j[k]]] = order[[j[k], i[k]]]
        current = matrix[np.ix_(order, order)]
    return order


def _gain(order: np.ndarray, matrix: np.ndarray, rest: np.ndarray) -> float:
    """Share of the misfit of `matrix` to `rest` that the order takes away."""
    before, after = (float(((m - rest) ** 2).sum()) for m in (matrix, matrix[np.ix_(order, order)]))
    return (before - after) / max(before, 1e-12)


def level_shifts(sample: Sample, spec: ColumnSpec, schema: CorpusSchema) -> list[Finding]:
    """Groups whose level differs from every like group by more than the radio explains: a forgotten unit or offset."""
    x = sample.values[spec.name]
    there = ~np.isnan(x)
    high = np.where(there, x, -np.inf).max(axis=1)
    keys = (schema.source_column, schema.site_column, schema.band_column)
    groups = [
        (n, high[r & there.any(axis=1)], np.flatnonzero(r)[0])
        for n, r in sample.groups(keys)
        if (r & there.any(axis=1)).sum() >= 30
    ]
    if len(groups) < 4:
        return []
    spread = float(np.median([np.subtract(*np.percentile(v, [75, 25])) for _, v, _ in groups])) / 1.349
    medians = np.array([np.median(v) for _, v, _ in groups])
    bands = np.array(
        [sample.codes[schema.band_column][first] if schema.band_column in sample.codes else 0 for _, _, first in groups]
    )
    found = []
    for g, (name, v, _) in enumerate(groups):
        like = (bands == bands[g]) & (np.arange(len(groups)) != g)
        like = like if like.sum() >= 3 else np.arange(len(groups)) != g
        gap = medians[g] - np.median(medians[like])
        # Sites of one band differ by about the spread of a site at most; a small group's median scatters on top of that.
        limit = spread * (1.1 + 3.75 / np.sqrt(len(v)))
        if abs(gap) > limit:
            found.append(
                Finding(
                    fault="level_shift",
                    severity="warn",
                    where=f"column {spec.name}, {name} ({len(v)} rows)",
                    value=float(gap),
                    threshold=float(limit),
                    unit=spec.unit,
                    next_step="compare its unit, transmit power and cable loss with the other groups'",
                )
            )
    return found


def level_runs(sample: Sample, spec: ColumnSpec, schema: CorpusSchema) -> list[Finding]:
    """Runs of units whose level lies far from the rest of their site and band: part of a log in another unit.

    The mean of w units that follow each other scatters by the units' own spread over the root of w. That spread is taken from
    the differences of neighbouring units, which a run leaves alone but for its two ends.
    """
    x = sample.values[spec.name]
    there = (~np.isnan(x)).any(axis=1)
    level = np.where(np.isnan(x), -np.inf, x).max(axis=1)
    worst = (0.0, 0.0, "")
    for name, rows in sample.groups((schema.source_column, schema.site_column, schema.band_column)):
        at = np.flatnonzero(rows & there)
        _, first, index = np.unique(sample.unit[at], return_index=True, return_inverse=True)
        means = (np.bincount(index, level[at]) / np.bincount(index))[np.argsort(first)]
        if len(means) < 12:
            continue
        spread = max(float(np.median(np.abs(np.diff(means)))) * 1.483 / np.sqrt(2), 1e-3)
        total = np.r_[0.0, np.cumsum(means - np.median(means))]
        for window in (6, 8, 12, 16, 24, 32, 48):
            if window > len(means) // 2:
                break
            gap = (total[window:] - total[:-window]) / window
            score = np.abs(gap) * np.sqrt(window) / spread
            k = int(score.argmax())
            if score[k] > worst[0] and abs(gap[k]) > 10:
                worst = (float(score[k]), float(gap[k]), f"{name}: {window} {schema.unit_column} in a row")
    if worst[0] <= RUN_SCORE:
        return []
    return [
        Finding(
            fault="level_shift",
            severity="warn",
            where=f"column {spec.name}, {worst[2]} are {worst[1]:+.0f} {spec.unit} off",
            value=worst[0],
            threshold=RUN_SCORE,
            unit="standard deviations",
            next_step="see whether part of the log is in another unit, or was taken with another antenna or cable",
        )
    ]


# -- copies -------------------------------------------------------------------------------------------------------
def near_copies(sample: Sample, schema: CorpusSchema) -> list[Finding]:
    """Units whose rows nearly equal another unit's rows, row by row: a copy with noise on it, or one trajectory cut in two.

    For a row with enough values, its nearest row in any other unit is sought. By chance the rows of a unit have their
    nearest rows in different units; where at least half of them (and two or more) have it in one and the same unit, much
    nearer than is usual, the units are copies.
    """
    x = np.concatenate([sample.values[c.name] for c in measured_columns(schema)], axis=1)
    enough = np.flatnonzero((~np.isnan(x)).sum(axis=1) >= 6)
    if len(enough) < MIN_ROWS:
        return []
    x, unit = x[enough], sample.unit[enough]
    level = np.where(np.isnan(x), -np.inf, x).max(axis=1, keepdims=True)
    space = np.concatenate([filled(x), level], axis=1)
    _, index, counts = np.unique(unit, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return []
    near = _nearest_elsewhere(space, index)
    d = np.sqrt(((space - space[near]) ** 2).mean(axis=1))
    partner = index[near]
    usual = np.median(d)
    close = d < 0.9 * usual
    pair = np.stack([np.minimum(index, partner), np.maximum(index, partner)], axis=1)[close]
    if not len(pair):
        return []
    pairs, at, votes = np.unique(pair, axis=0, return_inverse=True, return_counts=True)
    very_close = np.bincount(at.reshape(-1), weights=d[close] < 0.5 * usual)
    # Both units vote for the pair, so a full copy of r rows has about 2r votes. Half of the rows very close, or nearly
    # all of at least three rows close, does not happen by chance.
    size = np.minimum(counts[pairs[:, 0]], counts[pairs[:, 1]])
    copies = (size >= 2) & (very_close >= 2 * np.maximum(2, 0.5 * size))
    copies |= (size >= 3) & (votes >= np.maximum(5, 1.5 * size))
    copies &= ~_identical(space, index, pairs, copies)
    if not copies.any():
        return []
    units = np.unique(unit)
    a, b = pairs[copies][votes[copies].argmax()]
    split = np.zeros(len(units), np.int64)
    split[index] = sample.codes[schema.split_column][enough]
    across = int((split[pairs[copies, 0]] != split[pairs[copies, 1]]).sum())
    found = [
        Finding(
            fault="near_copy",
            severity="fail",
            where=f"{int(copies.sum())} pairs of {schema.unit_column}, such as {units[a]} and {units[b]}",
            value=float(copies.sum() / len(units)),
            threshold=0,
            unit="share of units",
            next_step="keep one of the two; see whether a log was replayed or augmented before it was split",
        )
    ]
    if across:
        found.append(
            Finding(
                fault="split_leak",
                severity="fail",
                where=f"{across} pairs of nearly equal {schema.unit_column} lie in different splits",
                value=across / len(units),
                threshold=0,
                unit="share of units",
                next_step="remove the copies, then split again",
            )
        )
    return found


def _nearest_elsewhere(space: np.ndarray, unit: np.ndarray, rows_at_once: int = 256) -> np.ndarray:
    """The nearest row [n] of another unit of each row of space [n, d]. By matrix products over all pairs: in tens of dimensions
    a tree looks at them all as well, and slower."""
    order = np.argsort(unit, kind="stable")
    points, of = space[order], unit[order]
    first, last = np.searchsorted(of, of, side="left"), np.searchsorted(of, of, side="right")
    half = 0.5 * (points**2).sum(axis=1)
    near = np.empty(len(points), np.int64)
    for start in range(0, len(points), rows_at_once):
        part = slice(start, start + rows_at_once)
        far = half - points[part] @ points.T
        for row, (low, high) in enumerate(zip(first[part], last[part], strict=True)):
            far[row, low:high] = np.inf
        near[part] = far.argmin(axis=1)
    found = np.empty_like(near)
    found[order] = order[near]
    return found


def _identical(space: np.ndarray, index: np.ndarray, pairs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which wanted pairs are equal to the last bit: the exact check has those already."""
    same = np.zeros(len(pairs), bool)
    for p in np.flatnonzero(wanted):
        a, b = space[index == pairs[p, 0]], space[index == pairs[p, 1]]
        same[p] = a.shape == b.shape and bool((a == b).all())
    return same


# -- labels -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LabelNoise:
    """Estimated share of wrong labels with its 95 % interval, from the `rows` rows that are easiest to predict."""

    share: float
    low: float
    high: float
    rows: int
    where: str


@dataclass(frozen=True)
class Neighbours:
    """The labelled rows that have features, and the nearest others of each. Row numbers are into the sample.

    rows, label, unit [n]; near [n, k] indexes into rows, nearest first; other [n, k] whether of another unit.
    """

    rows: np.ndarray
    label: np.ndarray
    unit: np.ndarray
    near: np.ndarray
    other: np.ndarray

    def votes(self, usable: np.ndarray, most: int, classes: int) -> np.ndarray:
        """[n, classes] share of the first `most` usable neighbours that carry each label."""
        row, column = np.nonzero(usable & (np.cumsum(usable, axis=1) <= most))
        flat = np.bincount(row * classes + self.label[self.near[row, column]], minlength=len(self.rows) * classes)
        votes = flat.reshape(len(self.rows), classes).astype(np.float32)
        return votes / np.maximum(votes.sum(axis=1, keepdims=True), 1)


def labelled_neighbours(sample: Sample, schema: CorpusSchema, cfg: AuditConfig) -> Neighbours | None:
    """Neighbours by shape of the features, and by level at a lesser weight. None if there are too few labels."""
    values = [sample.values[c.name] for c in measured_columns(schema)]
    seen = np.any([(~np.isnan(v)).any(axis=1) for v in values], axis=0) if values else np.zeros(sample.rows, bool)
    rows = np.flatnonzero((sample.label >= 0) & seen)
    if len(rows) > cfg.label_rows:
        rows = np.sort(np.random.default_rng(cfg.seed).choice(rows, cfg.label_rows, replace=False))
    if len(rows) < 6 * NEIGHBOURS:
        return None
    x = np.concatenate([v[rows] for v in values], axis=1)
    level = np.where(np.isnan(x), -np.inf, x).max(axis=1, keepdims=True)
    space = np.concatenate([filled(x), 0.3 * level], axis=1)
    near = np.asarray(KDTree(space).query(space, k=2 * NEIGHBOURS)[1])
    unit = sample.unit[rows]
    return Neighbours(rows, sample.label[rows], unit, near, unit[near] != unit[:, None])


def estimate_label_noise(sample: Sample, schema: CorpusSchema, cfg: AuditConfig, around: Neighbours) -> LabelNoise:
    """Share of labels that are wrong at random, where the features leave little doubt.

    A plain model (multinomial logistic regression on the shape of the features) predicts each labelled row from the rows of
    other units (three folds of whole units). Where it is surest (60 % of the rows; their own label plays no part in that
    choice), a label outside the likelier three eighths of the classes is noise; noise lands there with probability 5/8.
    Wrong labels hit easy and hard rows alike, so the easy ones show their rate without the confusion of the hard ones
    (confident learning, Northcutt et al. 2021, restricted to the confident stratum).
    """
    classes, n = schema.label.classes, len(around.rows)
    likely = _cross_predicted(sample, schema, around)
    rank = (likely > likely[np.arange(n), around.label][:, None]).sum(axis=1)
    top = max(round(3 / 8 * classes), 1)
    wrong, reach = rank >= top, 1.0 - top / classes
    trust = np.sort(likely, axis=1)[:, -4:].sum(axis=1)
    easy = np.argsort(np.argsort(trust, kind="stable"), kind="stable") >= 0.4 * n
    worst = _noise_of(wrong[easy], reach, "whole corpus")
    for column in (schema.source_column, schema.site_column, schema.split_column):
        for name, member in sample.groups((column,)):
            inside = easy & member[around.rows]
            if inside.sum() >= 150:
                part = _noise_of(wrong[inside], reach, name, level=0.001)
                if part.low > max(2 * cfg.label_noise_warn, worst.low):
                    worst = part
    return worst


def _cross_predicted(sample: Sample, schema: CorpusSchema, around: Neighbours) -> np.ndarray:
    """[n, classes] probability of each class, from a model that saw no row of the unit."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    shape = filled(np.concatenate([sample.values[c.name][around.rows] for c in measured_columns(schema)], axis=1))
    shape = shape / max(float(shape.std()), 1e-6)
    features = np.concatenate([np.exp(2 * shape), shape], axis=1)
    fold = hash64(around.unit.astype(np.int64).view(np.uint64)[:, None]) % np.uint64(3)
    likely = np.zeros((len(around.rows), schema.label.classes))
    for held in range(3):
        train = fold != held
        if len(np.unique(around.label[train])) < 2 or train.all():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # good enough long before it converges
            model = LogisticRegression(C=1.0, max_iter=60).fit(features[train], around.label[train])
        likely[np.ix_(~train, model.classes_)] = model.predict_proba(features[~train])
    return likely


def _noise_of(wrong: np.ndarray, reach: float, where: str, level: float = 0.005) -> LabelNoise:
    """Clopper-Pearson interval of the share of wrong labels, scaled by the share `reach` of them that can show.

    A 99 % interval by default: a corpus is audited every night, and one alarm in forty would soon be ignored.
    """
    n, k = len(wrong), int(wrong.sum())
    low = float(beta.ppf(level, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(1 - level, k + 1, n - k)) if k < n else 1.0
    return LabelNoise(min(k / n / reach, 1.0), min(low / reach, 1.0), min(high / reach, 1.0), n, where)


def label_shifts(sample: Sample, schema: CorpusSchema, around: Neighbours) -> list[Finding]:
    """Groups whose labels fit the rest of the corpus better when moved by one or two indexes."""
    found = []
    for column in (schema.source_column, schema.site_column, schema.band_column, schema.split_column):
        for name, member in sample.groups((column,)) if column else ():
            inside = member[around.rows]
            usable = ~inside[around.near] & inside[:, None]
            judged = usable.sum(axis=1) >= 10
            if judged.sum() < 40:
                continue
            votes = around.votes(usable, NEIGHBOURS, schema.label.classes)[judged]
            shift, gain, error = _best_shift(votes, around.label[judged], around.unit[judged], schema.label.classes)
            if shift and gain > 5 * error and gain > 0.05:
                found.append(
                    Finding(
                        fault="label_shift",
                        severity="fail",
                        where=f"{name} ({int(judged.sum())} labelled rows): labels fit when {-shift:+d} is added to the index",
                        value=float(gain),
                        threshold=float(max(5 * error, 0.05)),
                        unit="gain in neighbour agreement",
                        next_step="see whether its indexes start at 0 or 1, and correct the index base in the column map",
                    )
                )
    return found


def _best_shift(votes: np.ndarray, label: np.ndarray, unit: np.ndarray, classes: int) -> tuple[int, float, float]:
    """(shift, gain over no shift, standard error clustered by unit) of the shift that neighbours agree with most."""
    rows = np.arange(len(label))
    agree = {s: votes[rows, (label - s) % classes] for s in (-2, -1, 0, 1, 2)}
    best = max(agree, key=lambda s: agree[s].mean())
    difference = agree[best] - agree[0]
    _, index = np.unique(unit, return_inverse=True)
    sums, counts = np.bincount(index, difference), np.bincount(index)
    mean = difference.mean()
    error = float(np.sqrt(((sums - counts * mean) ** 2).sum()) / len(label))
    return best, float(mean), error
