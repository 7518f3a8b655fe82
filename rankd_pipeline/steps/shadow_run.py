"""Field step: the challenger beside the champion, over the stored telemetry and on the general test set; says who should serve."""

from dataclasses import asdict
from typing import Any

import numpy as np

from rankd_pipeline.drift.evidence import Evidence as FieldEvidence
from rankd_pipeline.drift.series import input_series
from rankd_pipeline.drift.statistics import above_budget, alike, session_table
from rankd_pipeline.evaluation.bootstrap import Estimate, estimate
from rankd_pipeline.evaluation.challenge import ChallengeRules, Evidence, decide
from rankd_pipeline.evaluation.table import write_table
from rankd_pipeline.ran_functions.contract import Metric, Predictor
from rankd_pipeline.runtime.bundle import Predictor as Bundle
from rankd_pipeline.runtime.bundle import load_bundle
from rankd_pipeline.spec import ShadowStep
from rankd_pipeline.steps.data import present_splits
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.scoring import evaluate_splits, score_of
from rankd_pipeline.steps.site_data import roles_for
from rankd_pipeline.telemetry.contract import TelemetrySchema, telemetry_schema
from rankd_pipeline.telemetry.roles import JUDGE
from rankd_pipeline.telemetry.rows import columns_of_files
from rankd_pipeline.training.seeds import derive_seed

CHALLENGER, CHAMPION = "challenger", "champion"
GENERAL = "general"
TIMED_ROWS = 2000


def shadow_run(ctx: StepContext) -> None:
    """Write `decision.json`, `evaluation.parquet` (general test set); metrics carry scores and the decision.

    ctx.given: {windows: spans of the telemetry, look: which challenger of this champion this is}.
    """
    schema = telemetry_schema(ctx.function, ctx.corpus_config, ctx.spec.steps.latency_profile.budget_us)
    spans = [(start, end) for start, end in ctx.given["windows"]]
    columns = columns_of_files(ctx.inputs["telemetry"], schema, spans)
    bundles = {
        CHALLENGER: load_bundle(ctx.inputs["deployment"].file("bundle")),
        CHAMPION: load_bundle(ctx.inputs["champion"].file("bundle")),
    }
    ctx.progress(1, 4, "over the stored telemetry")
    delivered = {name: _predictor(ctx, bundle)(columns) for name, bundle in bundles.items()}
    judged = columns["has_label"] & (roles_for(ctx.spec, columns) == JUDGE)
    scores = {name: _scores(ctx, output, columns, judged) for name, output in delivered.items()}
    ctx.progress(2, 4, "the challenger's calls")
    late = _call_times_us(ctx, bundles[CHALLENGER], columns)
    ctx.progress(3, 4, "on the general test set")
    general, champion = _general(ctx, bundles)
    evidence = Evidence(
        gain=scores[CHALLENGER] - scores[CHAMPION], session=columns["session"][judged], general=general.value,
        general_ci95=general.ci95, label_bias_p=_label_bias(ctx, columns, schema), failed=_unfinite(delivered[CHALLENGER]),
        late_p=above_budget(late, ctx.spec.steps.latency_profile.budget_us), look=ctx.given["look"],
    )  # fmt: skip
    decision = decide(evidence, rules_of(ctx.config, ctx.function.metric, champion))
    ctx.write_json("decision.json", asdict(decision))
    ctx.metrics.update(
        promote=decision.promote, reason=decision.reason, look=ctx.given["look"], rows=len(columns["time_s"]),
        held_back=decision.labelled, sessions=decision.sessions, gain=decision.gain, bound=decision.bound,
        recent={name: float(values.mean()) for name, values in scores.items() if len(values)} | _classical(ctx, columns, judged),
        general_gain=general.value, general_ci95=list(general.ci95 or ()), agreement=_agreement(delivered),
        label_bias_p=evidence.label_bias_p, failed=evidence.failed,
    )  # fmt: skip
    # Times are of this host and this moment; the decision reads only whether the budget is broken beyond chance.
    ctx.observed["call_p999_us"] = float(np.quantile(late, 0.999))


def rules_of(config: ShadowStep, metric: Metric, champion: float) -> ChallengeRules:
    """The rules of the YAML, against a champion of this score."""
    may_lose = metric.difference(config.max_forgetting, champion)
    return ChallengeRules(config.alpha, config.min_gain, may_lose, config.min_labelled, config.min_sessions)


def _predictor(ctx: StepContext, bundle: Bundle) -> Predictor:
    return ctx.function.deployed_predictor(bundle, bundle.signature)


def _scores(ctx: StepContext, delivered: np.ndarray, columns: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Row scores of the rows that judge."""
    return ctx.function.head().row_scores(delivered[rows], columns["label"][rows]) if rows.any() else np.zeros(0)


def _classical(ctx: StepContext, columns: dict[str, np.ndarray], judged: np.ndarray) -> dict[str, float]:
    """What the classical method reaches on the same rows, learned on the labelled rows that do not judge."""
    evidence = FieldEvidence(ctx.function, ctx.corpus_config, None, ctx.spec.seed)
    evidence.learn_classical({**columns, "has_label": columns["has_label"] & ~judged})
    rows = evidence.rows({**columns, "has_label": judged}).baseline
    known = rows[np.isfinite(rows)]
    return {"classical": float(known.mean())} if len(known) else {}


def _call_times_us(ctx: StepContext, bundle: Bundle, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Time of the challenger's calls on rows spread over the telemetry."""
    at = np.unique(np.linspace(0, len(columns["time_s"]) - 1, TIMED_ROWS).astype(int))
    sample = {name: values[at] for name, values in columns.items()}
    return bundle.call_times_us(ctx.function.calls(sample, bundle.signature, bundle))


def _general(ctx: StepContext, bundles: dict[str, Bundle]) -> tuple[Estimate, float]:
    """What the challenger gains on the general test set, the same samples for both (positive is better); the champion's score.

    All of the corpus that no network has seen counts, also the held-out site and band: the more, the surer.
    """
    models = {name: _predictor(ctx, bundle) for name, bundle in bundles.items()}
    corpus = ctx.inputs["corpus"]
    table = evaluate_splits(ctx, corpus, models, present_splits(corpus), list(models))
    write_table(table, ctx.out / "evaluation.parquet")
    table = table.assign(split=GENERAL)
    metric = ctx.function.metric
    plus, minus = (CHALLENGER, CHAMPION) if metric.higher_is_better else (CHAMPION, CHALLENGER)
    gain = estimate(
        table, f"{plus}@{GENERAL}", [f"{minus}@{GENERAL}"], metric=metric.name, aggregate=metric.aggregate,
        higher_is_better=metric.higher_is_better, seed=derive_seed(ctx.spec.seed, "shadow") % 2**32,
    )  # fmt: skip
    return gain, score_of(table, f"{CHAMPION}@{GENERAL}", metric)


def _label_bias(ctx: StepContext, columns: dict[str, np.ndarray], schema: TelemetrySchema) -> float:
    """p that labelled sessions differ from the others by chance alone: by the session means of the inputs."""
    labelled = np.isin(columns["session"], np.unique(columns["session"][columns["has_label"]]))
    if labelled.all() or not labelled.any():
        return 1.0
    series = input_series(columns, schema)
    tables = [session_table([item.values[side] for item in series], columns["session"][side]) for side in (labelled, ~labelled)]
    return alike(tables[1], tables[0], derive_seed(ctx.spec.seed, "label bias") % 2**32)


def _unfinite(delivered: np.ndarray) -> int:
    return int((~np.isfinite(delivered.reshape(len(delivered), -1)).all(axis=1)).sum())


def _agreement(delivered: dict[str, Any]) -> float:
    """Correlation of what both delivered, over all values: 1 where they say the same."""
    one, other = (values.reshape(-1).astype(np.float64) for values in delivered.values())
    return float(np.corrcoef(one, other)[0, 1]) if np.ptp(one) and np.ptp(other) else float(np.array_equal(one, other))
