"""Judges one window of telemetry against a reference: what moved beyond chance, how good the model still is, and why.

Every p-value is at the level of sessions; Holm's correction over all tests of a window holds the chance of any false
alarm at `alpha`. A series has *moved* if its test is rejected and its effect is large enough to matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rankd_pipeline.drift.causes import Action, Cause, Found, Moved, name_causes, worst_action
from rankd_pipeline.drift.series import Series, context_series, input_series, output_series
from rankd_pipeline.drift.statistics import (
    above_budget,
    classifier_two_sample,
    holm,
    ks,
    lower_mean,
    mean_interval,
    psi,
    session_means,
    session_table,
)
from rankd_pipeline.telemetry.contract import TelemetrySchema

NEW_SHARE = 0.02
"""A site or band needs this share of a window's rows to be worth a name: stray rows are no new site."""


@dataclass(frozen=True)
class Rows:
    """Telemetry rows with what they are worth, [n] each.

    own: decided by the model under watch. score and baseline: row scores of the model and of the classical method, NaN
    without a label. expected: the score that the model's own certainty promises, NaN where it does not say.
    """

    columns: Mapping[str, np.ndarray]
    own: np.ndarray
    score: np.ndarray
    baseline: np.ndarray
    expected: np.ndarray

    @property
    def session(self) -> np.ndarray:
        return np.asarray(self.columns["session"])

    def __len__(self) -> int:
        return len(self.own)

    def take(self, at: np.ndarray) -> "Rows":
        columns = {name: values[at] for name, values in self.columns.items()}
        return Rows(columns, self.own[at], self.score[at], self.baseline[at], self.expected[at])


@dataclass(frozen=True)
class Rules:
    """What a judgement goes by; see spec.DriftStep."""

    alpha: float
    min_psi: float
    min_labelled: int
    budget_us: float
    actions: Mapping[Cause, Action]


@dataclass(frozen=True)
class Test:
    """One two-sample test: d is the KS distance (the classifier's held-out accuracy for `all inputs`)."""

    name: str
    kind: str
    psi: float | None
    d: float
    p: float
    rejected: bool
    moved: bool


@dataclass(frozen=True)
class Quality:
    """How good the model is in a window, each with its 95 % interval (None: not known, or too few labels).

    score and gain: on labelled rows, the latter against the classical method on the same rows. expected: without labels
    (CBPE), corrected by what labels said in the reference; its interval holds the sampling and the correction error.
    """

    labelled: int
    score: float | None = None
    score_ci95: tuple[float, float] | None = None
    baseline: float | None = None
    gain: float | None = None
    gain_ci95: tuple[float, float] | None = None
    expected: float | None = None
    expected_ci95: tuple[float, float] | None = None
    by_site: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """The verdict on one window."""

    rows: int
    tests: tuple[Test, ...]
    quality: Quality
    late_share: float
    p999_us: float
    causes: tuple[Found, ...]

    @property
    def drifted(self) -> bool:
        return bool(self.causes)

    @property
    def action(self) -> Action | None:
        return worst_action(self.causes)

    def as_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return {**asdict(self), "drifted": self.drifted, "action": self.action}


def judge(reference: Rows, window: Rows, schema: TelemetrySchema, rules: Rules, seed: int = 0) -> Judgement:
    """The verdict on `window`, given how things were in `reference`."""
    pairs = _pairs(reference, window, schema)
    found = {
        before.name: (ks(*_means(before, after, reference, window)), psi(before.values, after.values)) for before, after in pairs
    }
    p_values = {name: test[0][1] for name, test in found.items()}
    accuracy, p_values["all inputs"] = _all_inputs(pairs, reference, window, seed)
    late = np.asarray(window.columns["latency_us"])
    p_values["latency"] = above_budget(late, rules.budget_us)
    labelled_before, labelled_after = _labelled_means(reference, "score"), _labelled_means(window, "score")
    enough = int((np.isfinite(window.score) & window.own).sum()) >= rules.min_labelled
    p_values["score"] = lower_mean(labelled_before, labelled_after) if enough else 1.0
    p_values["expected score"] = lower_mean(_labelled_means(reference, "expected"), _labelled_means(window, "expected"))
    rejected = holm(p_values, rules.alpha)
    moved = {name: name in rejected and effect >= rules.min_psi for name, (_, effect) in found.items()}
    tests = [
        Test(before.name, before.kind, found[before.name][1], *found[before.name][0], before.name in rejected, moved[before.name])
        for before, _ in pairs
    ]
    tests += [
        Test("all inputs", "all", None, accuracy, p_values["all inputs"], "all inputs" in rejected, "all inputs" in rejected),
        *(
            Test(name, "outcome", None, 0.0, p_values[name], name in rejected, name in rejected)
            for name in ("score", "expected score")
        ),
    ]
    causes = name_causes(
        [_moved(before, after, pairs) for before, after in pairs if moved[before.name]],
        _new(reference, window, "site"), _new(reference, window, "band_ghz"), _late(late, rules.budget_us, "latency" in rejected),
        rules.actions, _unexplained(tests),
    )  # fmt: skip
    p999 = float(np.quantile(late, 0.999))
    return Judgement(
        len(window), tuple(tests), _quality(reference, window, rules), float((late > rules.budget_us).mean()), p999, tuple(causes)
    )


def quality_of(rows: Rows, rules: Rules) -> Quality:
    """How good the model was in a window that has no reference yet."""
    return _quality(None, rows, rules)


def _pairs(reference: Rows, window: Rows, schema: TelemetrySchema) -> list[tuple[Series, Series]]:
    """The same series of both sides; one that a side lacks is left out."""
    sides = []
    for rows in (reference, window):
        own = rows.take(np.flatnonzero(rows.own))
        series = [*input_series(rows.columns, schema), *context_series(rows.columns)]
        if len(own):
            series += _aligned(output_series(own.columns["output"], own.columns["confidence"]), rows.own)
        sides.append({item.name: item for item in series})
    return [(before, sides[1][name]) for name, before in sides[0].items() if name in sides[1]]


def _aligned(series: Sequence[Series], own: np.ndarray) -> list[Series]:
    """Series of the own rows, as long as the others: NaN where another model decided."""
    found = []
    for item in series:
        values = np.full(len(own), np.nan)
        values[own] = item.values
        found.append(Series(item.name, item.kind, item.of, values, item.element))
    return found


def _means(before: Series, after: Series, reference: Rows, window: Rows) -> tuple[np.ndarray, np.ndarray]:
    return session_means(before.values, reference.session), session_means(after.values, window.session)


def _all_inputs(pairs: Sequence[tuple[Series, Series]], reference: Rows, window: Rows, seed: int) -> tuple[float, float]:
    """Classifier two-sample test over the session means of every input series."""
    inputs = [pair for pair in pairs if pair[0].kind in ("level", "element", "missing", "summary")]
    if not inputs:
        return 0.5, 1.0
    tables = [session_table([pair[side].values for pair in inputs], rows.session) for side, rows in enumerate((reference, window))]
    return classifier_two_sample(tables[0], tables[1], seed)


def _labelled_means(rows: Rows, what: str) -> np.ndarray:
    return session_means(np.where(rows.own, getattr(rows, what), np.nan), rows.session)


def _moved(before: Series, after: Series, pairs: Sequence[tuple[Series, Series]]) -> Moved:
    middle = np.nanmean if before.kind == "missing" or before.name.endswith(" known") else np.nanmedian
    elements = sum(other.of == before.of and other.kind == before.kind for other, _ in pairs)
    values = [float(middle(item.values)) if np.isfinite(item.values).any() else float("nan") for item in (before, after)]
    return Moved(before.name, before.kind, before.of, before.element, values[0], values[1], elements)


def _new(reference: Rows, window: Rows, column: str) -> list[str]:
    """Values of a key that the window has and the reference had not."""
    if column not in window.columns:
        return []
    values, counts = np.unique(np.asarray(window.columns[column]).astype(str), return_counts=True)
    known = set(np.unique(np.asarray(reference.columns[column]).astype(str)).tolist())
    unit = " GHz" if column == "band_ghz" else ""
    needed = max(NEW_SHARE * len(window), 1)
    return [
        f"{value}{unit}" for value, count in zip(values.tolist(), counts, strict=True) if value not in known and count >= needed
    ]


def _late(latency_us: np.ndarray, budget_us: float, rejected: bool) -> str | None:
    if not rejected:
        return None
    p999, share = np.quantile(latency_us, 0.999), np.mean(latency_us > budget_us)
    return f"p99.9 {p999:.0f} us, budget {budget_us:g} us; {share:.1%} of calls late"


def _unexplained(tests: Sequence[Test]) -> str | None:
    """What moved although no cause was found; the largest effects first."""
    moved = sorted((test for test in tests if test.moved), key=lambda test: test.p)
    return ", ".join(f"{test.name} (p {test.p:.1g})" for test in moved[:5]) or None


def _quality(reference: Rows | None, window: Rows, rules: Rules) -> Quality:
    labelled = np.isfinite(window.score) & window.own
    count = int(labelled.sum())
    expected, expected_ci = _expected(reference, window)
    if count < rules.min_labelled:
        return Quality(count, expected=expected, expected_ci95=expected_ci)
    means = session_means(np.where(labelled, window.score, np.nan), window.session)
    both = labelled & np.isfinite(window.baseline)
    gains = session_means(np.where(both, window.score - window.baseline, np.nan), window.session)
    sites = np.asarray(window.columns["site"]).astype(str)
    by_site = {site: float(window.score[labelled & (sites == site)].mean()) for site in np.unique(sites[labelled]).tolist()}
    return Quality(
        labelled=count, score=float(window.score[labelled].mean()), score_ci95=mean_interval(means),
        baseline=float(window.baseline[both].mean()) if both.any() else None,
        gain=float((window.score - window.baseline)[both].mean()) if both.any() else None,
        gain_ci95=mean_interval(gains), expected=expected, expected_ci95=expected_ci, by_site=by_site,
    )  # fmt: skip


def _expected(reference: Rows | None, window: Rows) -> tuple[float | None, tuple[float, float] | None]:
    """CBPE: the mean of what the model's certainty promises, shifted by how far labels of the reference missed it."""
    promised = _labelled_means(window, "expected")
    if len(promised) < 2:
        return None, None
    value, variance = float(promised.mean()), float(promised.var(ddof=1) / len(promised))
    if reference is not None:
        missed = session_means(np.where(reference.own, reference.score - reference.expected, np.nan), reference.session)
        if len(missed) >= 2:
            value, variance = value + float(missed.mean()), variance + float(missed.var(ddof=1) / len(missed))
    half = 1.96 * variance**0.5
    return value, (value - half, value + half)
