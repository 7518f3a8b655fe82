"""Estimates with 95 % intervals from the evaluation table, resampled by drop.

Drops, not rows, are resampled, because samples of one drop share a topology (Efron and Tibshirani, "An Introduction to
the Bootstrap", 1993, ch. 8). Terms of one estimate that lie on the same split see the same resampled drops (paired),
different splits are resampled independently. Intervals are percentile intervals of 2,000 resamples.

Aggregates, written as text so that a gate's YAML can hold them:

    mean              n-weighted mean over all samples
    quantile(q)       n-weighted inverse of the empirical distribution, 0 < q < 1 (write the metric one row a sample)
    worst_cell        the worst n-weighted mean over cells; worst_cell(site) groups by that part of the cell only,
                      worst_cell(snr,speed) by both
    db                10·log10 of the mean: an NMSE over all samples in dB
    db_of_cells       10·log10 of the plain mean of the cells' means: every cell counts alike, the dB comes last
    cells_db          the plain mean of 10·log10 of the cells' means: the dB comes first, so no cell drowns the others
    worst_cell_db     the worst over cells of what plus minus minus is in dB there (10·log10 of the cell's means): a difference
                      of cells, not of worst cells; its interval holds for all cells at once
    crossing(0.1,snr) where along the numbers of a cell part a mean falls to 0.1 (the SNR at 10 % BLER), interpolated on a
                      log scale; a curve that never does so within what was measured gets the end of it
    off_by(0.9)       |mean − 0.9|: how far a coverage is from what was promised
    ece               from the rows ``ece_bin_XX`` (value = mean of confidence − correct):
                      ECE = sum over bins |sum over units n·value| / sum n     (Naeini et al. 2015; Guo et al. 2017)

``ece``, ``off_by`` and ``worst_cell`` are not smooth: resampling adds noise that can only push them up (down), so their
percentile interval would not even hold the estimate. It is shifted by the bootstrap's own estimate of that bias. The
interval of ``worst_cell_db`` is simultaneous (max-t bootstrap: the 95 % quantile of the largest studentized deviation over
cells), so that "not worse in any cell" is a statement about every cell, not about a lucky one.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.table import parse_cell, select
from rankd_pipeline.evaluation.terms import parse_aggregate, split_term

RESAMPLES = 2000
MIN_CELL_SAMPLES = 30  # a cell with fewer says nothing about its mean, and would always be "the worst"

Where = Mapping[str, str | list[str]]
Statistic = Callable[[np.ndarray], np.ndarray]  # weights of units [R, U] -> value of each resample [R]


@dataclass(frozen=True)
class Estimate:
    """A point value with its 95 % interval (None where there are fewer than two drops to resample)."""

    value: float
    ci95: tuple[float, float] | None
    n_units: int
    n_samples: int


def estimate(
    table: pd.DataFrame,
    plus: Sequence[str] | str,
    minus: Sequence[str] = (),
    *,
    metric: str,
    aggregate: str = "mean",
    where: Where | None = None,
    higher_is_better: bool = True,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Sum of the aggregates of ``plus`` minus that of ``minus``, with its interval.

    Args:
        table: a long evaluation table.
        plus, minus: terms ``"model@split"``.
        metric: the metric's name; for ``aggregate="ece"`` any name, the rows ``ece_bin_*`` are read.
        where: filter on parts of the cell.
        higher_is_better: of the metric; it decides which cell is the worst one.
        seed: two calls with the same seed see the same resampled drops of a split that has the same drops.
    Raises:
        RankdError: a term has no rows; the message says what there is.
    """
    name, argument = parse_aggregate(aggregate)
    signed = [(+1.0, t) for t in ([plus] if isinstance(plus, str) else plus)] + [(-1.0, t) for t in minus]
    by_split: dict[str, list[tuple[float, pd.DataFrame]]] = {}
    for sign, term in signed:
        rows = _rows(table, term, metric, name, where)
        by_split.setdefault(split_term(term)[1], []).append((sign, rows))
    if name == "worst_cell_db":
        return _worst_difference(by_split, argument, higher_is_better, seed, resamples)

    value, draws, smallest, n_samples = 0.0, np.zeros(resamples), np.iinfo(np.int64).max, 0
    for split, terms in by_split.items():
        sample = _resample([rows for _, rows in terms], split, name, argument, higher_is_better, seed, resamples)
        signs = np.array([sign for sign, _ in terms])
        value += float(signs @ sample.value)
        draws += signs @ sample.draws
        smallest = min(smallest, sample.n_units)
        n_samples += max(_count(rows) for _, rows in terms)
    return Estimate(value, _interval(value, draws, name, bool(minus), smallest), int(smallest), n_samples)


def _worst_difference(
    by_split: Mapping[str, list[tuple[float, pd.DataFrame]]], part: str | None, higher_is_better: bool, seed: int, resamples: int
) -> Estimate:
    """The worst over cells of the signed sum of their means in dB, with an interval that holds for all cells together."""
    if len(by_split) > 1:
        raise RankdError(f"worst_cell_db compares cells of one split; the terms lie on {', '.join(by_split)}.")
    split, terms = next(iter(by_split.items()))
    units = np.unique(np.concatenate([rows["unit"].to_numpy() for _, rows in terms]))
    names = sorted(set.intersection(*(set(_cell_names(rows, part)) for _, rows in terms)))
    sums = [(sign, *_cell_sums(rows, _cell_names(rows, part), names, units)) for sign, rows in terms]
    enough = np.min([count_UG.sum(0) for _, _, count_UG in sums], axis=0)
    big = enough >= min(MIN_CELL_SAMPLES, enough.max(initial=0))

    def difference(weights: np.ndarray) -> np.ndarray:
        return sum(sign * _db(_ratio(weights @ total_UG[:, big], weights @ count_UG[:, big])) for sign, total_UG, count_UG in sums)  # type: ignore[return-value]

    here = difference(np.ones((1, len(units))))[0]
    worst = np.min if higher_is_better else np.max
    n_samples = max(_count(rows) for _, rows in terms)
    if resamples == 0 or len(units) < 2:
        return Estimate(float(worst(here)), None, len(units), n_samples)
    draws = np.concatenate([difference(weights) for weights in resampled_weights(len(units), resamples, seed, split)])
    there = np.isfinite(draws)  # a cell that a resample misses has no say in it
    if there.all(1).mean() < 0.5 and there.mean() < 0.95:
        return Estimate(float(worst(here)), None, len(units), n_samples)
    spread = np.sqrt(np.mean(np.where(there, draws - here, 0.0) ** 2, axis=0))
    far = np.divide(np.abs(draws - here), spread, out=np.zeros_like(draws), where=there & (spread > 0))
    reach = float(np.quantile(far.max(axis=1), 0.95)) * spread
    return Estimate(float(worst(here)), (float(worst(here - reach)), float(worst(here + reach))), len(units), n_samples)


def _cell_sums(rows: pd.DataFrame, names: np.ndarray, cells: Sequence[str], units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of n·value and of n [units, cells]; rows of other cells are left out."""
    group = pd.Categorical(names, categories=list(cells)).codes
    kept = group >= 0
    where = np.searchsorted(units, rows["unit"].to_numpy()[kept]) * len(cells) + group[kept]
    n, value = rows["n"].to_numpy(np.float64)[kept], rows["value"].to_numpy(np.float64)[kept]
    shape = (len(units), len(cells))
    return tuple(np.bincount(where, of, shape[0] * shape[1]).reshape(shape) for of in (n * value, n))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Sample:
    """Terms of one split under the same resampled drops: value [terms], draws [terms, resamples]."""

    value: np.ndarray
    draws: np.ndarray
    n_units: int


def _resample(
    terms: Sequence[pd.DataFrame], split: str, name: str, argument: str | None, higher_is_better: bool, seed: int, resamples: int
) -> _Sample:
    units = np.unique(np.concatenate([rows["unit"].to_numpy() for rows in terms]))
    statistics = [
        _statistic(rows, np.searchsorted(units, rows["unit"].to_numpy()), len(units), name, argument, higher_is_better)
        for rows in terms
    ]
    everything = np.ones((1, len(units)))
    chunks = [
        np.stack([statistic(weights) for statistic in statistics])
        for weights in resampled_weights(len(units), resamples, seed, split)
    ]
    draws = np.concatenate(chunks, axis=1) if chunks else np.zeros((len(terms), 0))
    return _Sample(np.array([float(statistic(everything)[0]) for statistic in statistics]), draws, len(units))


def resampled_weights(n_units: int, resamples: int, seed: int, split: str, chunk: int = 100) -> Iterator[np.ndarray]:
    """Yield multinomial weights [chunk, n_units] of drops drawn with replacement, reproducible by seed and split."""
    key = int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "big")
    rng = np.random.default_rng([seed, key])
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        yield np.stack([np.bincount(rng.integers(0, n_units, n_units), minlength=n_units) for _ in range(rows)]).astype(np.float64)


def slices(
    table: pd.DataFrame,
    *,
    by: str,
    metric: str,
    models: Sequence[str],
    splits: Sequence[str],
    aggregate: str = "mean",
    higher_is_better: bool = True,
    seed: int = 0,
    resamples: int = 500,
) -> pd.DataFrame:
    """One estimate for each split, value of cell part ``by``, model: columns split, <by>, model, value, lo, hi, n."""
    name, argument = parse_aggregate(aggregate)
    out = []
    for split in splits:
        rows = select(table, split=split, metric="ece_bin_*" if name == "ece" else metric)
        values = {parse_cell(str(c)).get(by) for c in rows["cell"].unique()} - {None}
        for part in sorted(str(v) for v in values):
            inside = select(rows, where={by: part})
            of_model = {model: select(inside, model=model) for model in models}
            present = {model: found for model, found in of_model.items() if len(found)}
            if not present:
                continue
            sample = _resample(list(present.values()), split, name, argument, higher_is_better, seed, resamples)
            for (model, found), value, draws in zip(present.items(), sample.value, sample.draws, strict=True):
                lo, hi = _interval(float(value), draws, name, False, sample.n_units) or (np.nan, np.nan)
                out.append((split, part, model, float(value), lo, hi, _count(found)))
    return pd.DataFrame(out, columns=["split", by, "model", "value", "lo", "hi", "n"])


def _rows(table: pd.DataFrame, term: str, metric: str, aggregate: str, where: Where | None) -> pd.DataFrame:
    model, split = split_term(term)
    metric = "ece_bin_*" if aggregate == "ece" else metric
    rows = select(table, model=model, split=split, metric=metric, where=where)
    if rows.empty:
        there = sorted(f"{m}@{s}" for m, s in set(zip(table["model"], table["split"], strict=True)))
        filtered = f" where {dict(where)}" if where else ""
        raise RankdError(
            f"Evaluation table has no {metric} for {term}{filtered}; it holds metrics "
            f"{sorted(map(str, table['metric'].unique()))} for {there}."
        )
    return rows


def _statistic(
    rows: pd.DataFrame, unit: np.ndarray, n_units: int, name: str, argument: str | None, higher_is_better: bool
) -> Statistic:
    """The aggregate as a function of the weights of the units; ``unit`` is each row's position among the units."""
    n = rows["n"].to_numpy(np.float64)
    value = rows["value"].to_numpy(np.float64)
    if name == "quantile":
        order = np.argsort(value, kind="stable")
        return _quantile(value[order], n[order], unit[order], float(argument or 0.5))
    # Groups are cells for what looks at cells, bins for ece, and one for the rest.
    by_cell = name in ("worst_cell", "worst_cell_db", "db_of_cells", "cells_db", "crossing")
    level, _, along = (argument or "").partition(",") if name == "crossing" else ("", "", argument)
    names = _cell_names(rows, along or None) if by_cell else rows["metric"].astype(str).to_numpy()
    group, found = pd.factorize(names, sort=True)
    groups = int(group.max()) + 1
    where = unit * groups + group
    total_UG = np.bincount(where, n * value, n_units * groups).reshape(n_units, groups)
    count_UG = np.bincount(where, n, n_units * groups).reshape(n_units, groups)
    if name == "ece":
        return lambda w: np.abs(w @ total_UG).sum(1) / (w @ count_UG.sum(1))
    if not by_cell:
        return lambda w: _AFTER_MEAN[name](_ratio(w @ total_UG[:, 0], w @ count_UG[:, 0]), argument)
    if name == "db_of_cells":
        return lambda w: _db(np.nanmean(_ratio(w @ total_UG, w @ count_UG), axis=1))
    if name == "cells_db":
        return lambda w: np.nanmean(_db(_ratio(w @ total_UG, w @ count_UG)), axis=1)
    if name == "crossing":
        at = _numbers(map(str, found))
        order = np.argsort(at)
        return lambda w: _crossing(at[order], _ratio(w @ total_UG[:, order], w @ count_UG[:, order]), float(level))
    big = count_UG.sum(0) >= min(MIN_CELL_SAMPLES, count_UG.sum(0).max())
    total_UG, count_UG = total_UG[:, big], count_UG[:, big]
    worst = np.fmin if higher_is_better else np.fmax  # a cell that a resample misses has no say in it
    scale = _db if name == "worst_cell_db" else lambda ratio: ratio
    return lambda w: worst.reduce(scale(_ratio(w @ total_UG, w @ count_UG)), axis=1)


def _numbers(names: Iterable[str]) -> np.ndarray:
    try:
        return np.array([float(name) for name in names])
    except ValueError as error:
        raise RankdError(f"crossing: the cell part must hold numbers ({error}).") from None


def _crossing(at: np.ndarray, mean_RG: np.ndarray, level: float) -> np.ndarray:
    """Where each falling curve [G] over `at` reaches `level`, on a log scale. Curves are made monotone first: a small sample
    may rise again by chance."""
    falling = np.minimum.accumulate(np.where(np.isfinite(mean_RG), mean_RG, np.inf), axis=1)
    log = np.log(np.clip(falling, level / 20.0, 1.0)) - np.log(level)
    below = log <= 0.0
    right = np.where(below.any(1), below.argmax(1), len(at) - 1)
    left = np.maximum(right - 1, 0)
    row = np.arange(len(log))
    rise = log[row, left] - log[row, right]
    share = np.divide(log[row, left], rise, out=np.zeros(len(log)), where=rise > 0)
    crossed = below.any(1) & (right > 0)
    return np.where(crossed, at[left] + np.clip(share, 0.0, 1.0) * (at[right] - at[left]), at[right])


def _db(value: np.ndarray) -> np.ndarray:
    """Decibels of a power ratio; nothing (NaN) where it is not positive."""
    return 10.0 * np.log10(np.where(value > 0, value, np.nan))


_AFTER_MEAN: dict[str, Callable[[np.ndarray, str | None], np.ndarray]] = {
    "mean": lambda mean, _: mean,
    "db": lambda mean, _: _db(mean),
    "off_by": lambda mean, wanted: np.abs(mean - float(wanted or 0.0)),
}


def _quantile(value: np.ndarray, n: np.ndarray, unit: np.ndarray, q: float) -> Statistic:
    def quantile(weights: np.ndarray) -> np.ndarray:
        out = np.empty(len(weights))
        for i, w in enumerate(weights):
            cumulative = np.cumsum(w[unit] * n)
            # The first value whose share of the samples reaches q; the guard keeps q·total from rounding just past it.
            at = np.searchsorted(cumulative, q * cumulative[-1] * (1 - 1e-12))
            out[i] = value[min(at, len(value) - 1)] if cumulative[-1] > 0 else np.nan
        return out

    return quantile


def _cell_names(rows: pd.DataFrame, part: str | None) -> np.ndarray:
    """The cell of each row, or only the named parts of it (separated by commas)."""
    cells = rows["cell"].astype(str)
    if part is None:
        return cells.to_numpy()
    wanted = [key.strip() for key in part.split(",")]
    names = {c: tuple(parse_cell(c).get(key) for key in wanted) for c in cells.unique()}
    absent = [key for i, key in enumerate(wanted) if any(values[i] is None for values in names.values())]
    if absent:
        raise RankdError(f"aggregate over cells ({part}): the cells have no part '{absent[0]}'; they look like {cells.iloc[0]!r}.")
    return np.array(["|".join(map(str, names[c])) for c in cells])


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _count(rows: pd.DataFrame) -> int:
    """Samples behind a term: rows of several bins (or of one metric) add up to the samples seen."""
    return int(rows["n"].to_numpy().sum())


def _interval(value: float, draws: np.ndarray, name: str, is_difference: bool, n_units: int) -> tuple[float, float] | None:
    good = draws[np.isfinite(draws)]
    # None where there is nothing to resample, or so few drops that most resamples miss the slice.
    if n_units < 2 or not len(draws) or len(good) < 0.95 * len(draws):
        return None
    lo, hi = np.quantile(good, [0.025, 0.975])
    bias = float(good.mean()) - value if name in ("ece", "off_by", "worst_cell") else 0.0
    lo, hi = float(lo - bias), float(hi - bias)
    return (max(lo, 0.0) if name in ("ece", "off_by") and not is_difference else lo), hi
