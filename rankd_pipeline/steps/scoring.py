"""What the judging steps share: predictors, the evaluation table of several models, gates over it, headline figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from rankd_pipeline.distillation.heads import Calibration
from rankd_pipeline.evaluation.bootstrap import Estimate, estimate
from rankd_pipeline.evaluation.gates import Gate, GateResult, evaluate_gate
from rankd_pipeline.evaluation.table import concat_tables, select
from rankd_pipeline.evaluation.terms import split_term
from rankd_pipeline.ran_functions.contract import Arrays, Baseline, Metric, Predictor
from rankd_pipeline.steps.data import evaluation_data, features_of, labels_for, split_is
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.store.artifact import Artifact
from rankd_pipeline.training.seeds import derive_seed


def network_predictor(ctx: StepContext, module: torch.nn.Module, calibration: Calibration) -> Predictor:
    """A network with its calibration, as a predictor over feature columns."""
    return ctx.function.network_predictor(module, calibration)


def fitted_calibrations(ctx: StepContext, modules: Mapping[str, torch.nn.Module]) -> dict[str, Calibration]:
    """The calibration of each network, fitted on the labelled validation rows."""
    columns = list(dict.fromkeys([*ctx.function.feature_columns, *ctx.function.evaluation_columns[0]]))
    features = features_of(ctx.inputs["corpus"], columns, split_is("val"))
    if ctx.function.self_labelled:
        label = ctx.function.own_labels(features)
    else:
        label, has = labels_for(ctx.inputs["oracle_labels"], features["sample_id"])
        features, label = {name: values[has] for name, values in features.items()}, label[has]
    return {name: ctx.function.fit_calibration(module, features, label) for name, module in modules.items()}


def with_own_measurements(baselines: Sequence[Baseline], features: Arrays, truth: Arrays) -> dict[str, np.ndarray]:
    """Features plus the truth columns that hold a baseline's own measurements (a sweep it made in the field)."""
    return {**features, **{name: truth[name] for item in baselines for name in item.needs_truth if name in truth}}


def evaluate_splits(
    ctx: StepContext, corpus: Artifact, models: Mapping[str, Predictor], splits: Sequence[str], calibrated: Sequence[str],
    baselines: Sequence[Baseline] = (),
) -> pd.DataFrame:  # fmt: skip
    """The long table of all models on all splits, the same samples for each."""
    tables = []
    for number, split in enumerate(splits):
        ctx.progress(number, len(splits), f"evaluating {split}")
        features, truth = evaluation_data(ctx.function, corpus, split)
        seen = with_own_measurements(baselines, features, truth)
        tables.append(ctx.function.evaluate(models, seen, truth, split, frozenset(calibrated)))
    return concat_tables(tables)


def end_metric_of(
    ctx: StepContext, corpus: Artifact, models: Mapping[str, Predictor], baselines: Sequence[Baseline]
) -> list[pd.DataFrame]:
    """The table of the function's end metric for these models on the test split; nothing where it has none."""
    features, truth = evaluation_data(ctx.function, corpus, "test")
    table = ctx.function.end_metric(
        ctx.corpus_config, models, with_own_measurements(baselines, features, truth), truth, "test",
        ctx.spec.steps.calibration_scorecard.end_metric, derive_seed(ctx.spec.seed, "end metric") % 2**32,
        lambda done, total: ctx.progress(done, total, "end metric"),
    )  # fmt: skip
    return [] if table is None else [table]


def judge_gates(
    ctx: StepContext, gates: Sequence[Gate], table: pd.DataFrame, baselines: Sequence[str], resamples: int
) -> list[GateResult]:
    """All gates of a step; one whose split the corpus lacks is inconclusive, not passed over."""
    splits = set(table["split"].astype(str))
    metrics = {metric.name: metric for metric in (ctx.function.metric, *ctx.function.secondary_metrics)}
    results = []
    for gate in gates:
        absent = [split for term in (*gate.plus, *gate.minus) if (split := split_term(term)[1]) not in splits]
        if absent:
            results.append(_unanswered(gate, absent[0]))
            continue
        better = metrics[gate.metric].higher_is_better if gate.metric in metrics else False
        results.append(
            evaluate_gate(gate, table, baselines, better, derive_seed(ctx.spec.seed, "gates", gate.name) % 2**32, resamples)
        )
    return results


def _unanswered(gate: Gate, split: str) -> GateResult:
    return GateResult(
        name=gate.name, metric=gate.metric, value=0.0, ci95=None, threshold=gate.threshold, comparator=gate.comparator,
        unit=gate.unit, verdict="inconclusive", resolved={}, n_units=0,
        next_step=f"the corpus has no split {split!r}: hold a site and a band out, or take this gate out of the YAML",
    )  # fmt: skip


def headline(ctx: StepContext, table: pd.DataFrame, model: str, split: str = "test", metric: Metric | None = None) -> Estimate:
    """The (headline) metric of a model on a split, with its interval."""
    chosen = metric or ctx.function.metric
    return estimate(
        table, f"{model}@{split}", metric=chosen.name, aggregate=chosen.aggregate, higher_is_better=chosen.higher_is_better,
        seed=derive_seed(ctx.spec.seed, "headline") % 2**32,
    )  # fmt: skip


def score_of(table: pd.DataFrame, plus: Sequence[str] | str, metric: Metric, minus: Sequence[str] = ()) -> float:
    """The metric of one term, or of terms added and subtracted, without an interval."""
    return estimate(
        table, plus, minus, metric=metric.name, aggregate=metric.aggregate, higher_is_better=metric.higher_is_better, resamples=0
    ).value


def calibration_of(ctx: StepContext, table: pd.DataFrame, term: str) -> float:
    """The head's calibration figure (ECE, coverage error) of a term."""
    head = ctx.function.head()
    return estimate(table, term, metric=head.calibration_rows, aggregate=head.calibration_aggregate, resamples=0).value


def score_table(ctx: StepContext, table: pd.DataFrame, models: Sequence[str], splits: Sequence[str]) -> list[dict[str, Any]]:
    """Rows (model, split, metric, value) of every metric, for people."""
    rows = []
    for model in models:
        for split in splits:
            for metric in (ctx.function.metric, *ctx.function.secondary_metrics):
                if select(table, model=model, split=split, metric=metric.name).empty:
                    continue  # an end metric is not asked of everyone everywhere
                value = score_of(table, f"{model}@{split}", metric)
                rows.append({"model": model, "split": split, "metric": metric.name, "unit": metric.unit, "value": value})
    return rows
