"""Gates: a YAML line over the evaluation table becomes {metric, value, 95 % interval, threshold, verdict}.

A gate compares ``sum(aggregate of plus) − sum(aggregate of minus)`` with a threshold. It passes if the whole 95 %
interval satisfies the comparator, fails if the whole interval violates it, and is inconclusive in between: more data
can turn "inconclusive" into an answer, a lucky draw is not taken for one.

    name: margin                                     # the teacher beats the best non-learned baseline by 5 points
    metric: top1
    plus: [teacher@test]
    minus: [best_baseline@test]
    comparator: ">="
    threshold: 0.05
    unit: fraction
    next_step: "More labels, SSL, or a larger teacher: see docs/beam_management.md."

This module is loaded by the code location, so numpy and pandas are imported only when a gate is evaluated.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.terms import parse_aggregate, split_term

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["pass", "fail", "inconclusive"]
Comparator = Literal[">=", "<=", "<", ">"]
BEST_BASELINE = "best_baseline"  # as a term's model: the best of the given baselines on that split


def _as_value_error(check: Callable[[str], object], text: str) -> None:
    """Pydantic turns a ValueError into one that names the key."""
    try:
        check(text)
    except RankdError as error:
        raise ValueError(str(error)) from error


class Gate(BaseModel):
    """One gate as written in YAML. Terms are ``model@split``; ``best_baseline@split`` is resolved when evaluated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    aggregate: str = "mean"
    plus: list[str] = Field(min_length=1)
    minus: list[str] = []
    comparator: Comparator
    threshold: float = Field(allow_inf_nan=False)
    unit: str
    where: dict[str, str | list[str]] = {}
    next_step: str = Field(min_length=1)

    @field_validator("plus", "minus")
    @classmethod
    def _terms(cls, terms: list[str]) -> list[str]:
        for term in terms:
            _as_value_error(split_term, term)
        return terms

    @field_validator("aggregate")
    @classmethod
    def _aggregate(cls, text: str) -> str:
        _as_value_error(parse_aggregate, text)
        return text


class GateResult(BaseModel):
    """What a gate found. ``ci95`` is None where there was too little to resample; the verdict is then inconclusive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    metric: str
    value: float
    ci95: tuple[float, float] | None
    threshold: float
    comparator: Comparator
    unit: str
    verdict: Verdict
    resolved: dict[str, str]
    n_units: int
    next_step: str

    def sentence(self) -> str:
        """``margin: 0.081 [0.064, 0.097] >= 0.05 fraction: PASS`` on one line, for terminals and logs."""
        interval = f" [{self.ci95[0]:.4g}, {self.ci95[1]:.4g}]" if self.ci95 else " [no interval]"
        verdict = {"pass": "PASS", "fail": "MISS", "inconclusive": "INCONCLUSIVE"}[self.verdict]
        return f"{self.name}: {self.value:.4g}{interval} {self.comparator} {self.threshold:g} {self.unit}: {verdict}"


def judge(ci95: tuple[float, float] | None, comparator: Comparator, threshold: float) -> Verdict:
    """pass if every point of the interval satisfies the comparator, fail if none does, else inconclusive."""
    if ci95 is None:
        return "inconclusive"
    holds = {
        ">=": lambda x: x >= threshold,
        ">": lambda x: x > threshold,
        "<=": lambda x: x <= threshold,
        "<": lambda x: x < threshold,
    }[comparator]
    ends = [holds(x) for x in ci95]
    return "pass" if all(ends) else "inconclusive" if any(ends) else "fail"


def evaluate_gate(
    gate: Gate,
    table: "pd.DataFrame",
    baselines: Sequence[str],
    higher_is_better: bool,
    seed: int = 0,
    resamples: int = 2000,
) -> GateResult:
    """Evaluate one gate.

    Args:
        table: the long evaluation table; every term's model and split must be in it.
        baselines: names of the non-learned baselines that ``best_baseline`` may stand for.
        higher_is_better: of ``gate.metric``; it decides which baseline is best and which cell is worst.
        seed, resamples: of the bootstrap over drops.
    Raises:
        RankdError: a term has no rows, or ``best_baseline`` has no candidate.
    """
    from rankd_pipeline.evaluation.bootstrap import estimate

    resolved = {term: _resolve(term, gate, table, baselines, higher_is_better) for term in [*gate.plus, *gate.minus]}
    result = estimate(
        table,
        [resolved[t] for t in gate.plus],
        [resolved[t] for t in gate.minus],
        metric=gate.metric,
        aggregate=gate.aggregate,
        where=gate.where,
        higher_is_better=higher_is_better,
        seed=seed,
        resamples=resamples,
    )
    return GateResult(
        name=gate.name,
        metric=gate.metric,
        value=result.value,
        ci95=result.ci95,
        threshold=gate.threshold,
        comparator=gate.comparator,
        unit=gate.unit,
        verdict=judge(result.ci95, gate.comparator, gate.threshold),
        resolved=resolved,
        n_units=result.n_units,
        next_step=gate.next_step,
    )


def verdict_of(results: Sequence[GateResult]) -> Verdict:
    """The worst verdict (fail, then inconclusive, then pass); no gate at all is a pass."""
    seen = {r.verdict for r in results}
    return "fail" if "fail" in seen else "inconclusive" if "inconclusive" in seen else "pass"


def best_baseline(
    table: "pd.DataFrame",
    split: str,
    baselines: Sequence[str],
    *,
    metric: str,
    higher_is_better: bool,
    aggregate: str = "mean",
    where: dict[str, str | list[str]] | None = None,
) -> tuple[str, float]:
    """Name and value of the best of ``baselines`` on ``split``; ties go to the first one named.

    Chosen on the very data it is judged on, which favours the baseline: the model under test has the harder race.
    """
    from rankd_pipeline.evaluation.bootstrap import estimate
    from rankd_pipeline.evaluation.table import select

    present = [b for b in baselines if not select(table, model=b, split=split, where=where).empty]
    if not present:
        raise RankdError(f"No baseline of {list(baselines)} is in the evaluation table for split {split!r}.")
    values = [
        estimate(table, f"{b}@{split}", metric=metric, aggregate=aggregate, where=where,
                 higher_is_better=higher_is_better, resamples=0).value
        for b in present
    ]  # fmt: skip
    best = max(values) if higher_is_better else min(values)
    return present[values.index(best)], best


def _resolve(term: str, gate: Gate, table: "pd.DataFrame", baselines: Sequence[str], higher_is_better: bool) -> str:
    model, split = term.split("@")
    if model != BEST_BASELINE:
        return term
    name, _ = best_baseline(table, split, baselines, metric=gate.metric, higher_is_better=higher_is_better,
                            aggregate=gate.aggregate, where=gate.where)  # fmt: skip
    return f"{name}@{split}"
