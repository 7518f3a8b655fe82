"""Step 6: does the teacher deserve to teach? Accuracy against baselines, calibration, generality; a gate."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from rankd_pipeline.evaluation.gates import best_baseline, verdict_of
from rankd_pipeline.evaluation.table import concat_tables, write_table
from rankd_pipeline.ran_functions.contract import Baseline, Predictor
from rankd_pipeline.report import figures
from rankd_pipeline.steps.data import (
    evaluation_data,
    features_of,
    labelled_inputs,
    labels_for,
    present_splits,
    split_is,
    training_columns,
)
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.scoring import (
    calibration_of,
    end_metric_of,
    evaluate_splits,
    fitted_calibrations,
    headline,
    judge_gates,
    network_predictor,
    score_of,
    score_table,
)
from rankd_pipeline.steps.students import load_student, student_job, write_student_data
from rankd_pipeline.steps.teacher import load_teacher
from rankd_pipeline.training.seeds import derive_seed

SCRATCH, RAW = "student_scratch", "teacher_raw"


def calibration_scorecard(ctx: StepContext) -> None:
    """Write `evaluation.parquet`, `scores.json`, figures; metrics carry calibration, gates and verdict."""
    model, head = load_teacher(ctx), ctx.function.head()
    corpus = ctx.inputs["corpus"]
    networks = {"teacher": model, SCRATCH: _scratch_student(ctx)}
    calibrations = fitted_calibrations(ctx, networks)
    baselines = ctx.function.baselines(ctx.corpus_config)
    rivals = fitted_baselines(ctx, [item for item in baselines if not item.learned or item.name in ctx.config.learned_baselines])
    models: dict[str, Predictor] = {
        **{name: network_predictor(ctx, network, calibrations[name]) for name, network in networks.items()},
        **({} if head.neutral is None else {RAW: network_predictor(ctx, model, head.neutral)}),
        **rivals,
    }
    splits = present_splits(corpus)
    judged = {name: model for name, model in models.items() if name not in (RAW, SCRATCH)}
    table = concat_tables([
        evaluate_splits(ctx, corpus, models, splits, ["teacher", RAW, SCRATCH], baselines),
        *end_metric_of(ctx, corpus, judged, baselines),
    ])  # fmt: skip
    write_table(table, ctx.out / "evaluation.parquet")
    ctx.write_json("scores.json", score_table(ctx, table, list(models), splits))
    plain = [item.name for item in baselines if not item.learned and item.gate]
    gates = judge_gates(ctx, ctx.spec.gates.calibration_scorecard, table, plain, ctx.config.resamples)
    references = [item.name for item in baselines if not item.gate]
    ctx.metrics.update(_summary(ctx, table, plain, references, list(models), splits))
    ctx.metrics.update(
        calibration_parameters=calibrations["teacher"],
        gates=[gate.model_dump(mode="json") for gate in gates],
        verdict=verdict_of(gates),
        reason="; ".join(gate.sentence() for gate in gates if gate.verdict != "pass"),
    )
    _draw(ctx, table, models, splits)


def fitted_baselines(ctx: StepContext, baselines: list[Baseline]) -> dict[str, Predictor]:
    """Each baseline, fitted on the labelled training rows and tuned on validation: what the teacher had, too."""
    corpus, labels = ctx.inputs["corpus"], ctx.inputs["oracle_labels"]
    columns = list(dict.fromkeys([*ctx.function.feature_columns, *ctx.function.evaluation_columns[0]]))
    data: list[dict[str, np.ndarray]] = []
    for split in ("train", "val"):
        features = features_of(corpus, columns, split_is(split))
        label, has = labels_for(labels, features["sample_id"])
        data.append({**{name: values[has] for name, values in features.items()}, "label": label[has]})
    fitted = {}
    for number, item in enumerate(baselines):
        ctx.progress(number, len(baselines), f"baseline {item.name}")
        fitted[item.name] = item.fit(data[0], data[1], derive_seed(ctx.spec.seed, "baseline", item.name) % 2**32)
    return fitted


def _scratch_student(ctx: StepContext) -> torch.nn.Module:
    """The (first) student network trained on the labels alone: a teacher that does not beat it has nothing to teach."""
    corpus, labels, student = ctx.inputs["corpus"], ctx.inputs["oracle_labels"], next(iter(ctx.spec.students.values()))
    _, train = training_columns(ctx.function, corpus, labels, labelled_only=True)
    _, val, val_label = labelled_inputs(ctx.function, corpus, labels, "val")
    write_student_data(
        ctx.scratch / "data",
        train,
        {**val, "label": val_label},
    )
    # As many optimizer steps as a student gets over the full corpus.
    longer = max(1, round(student.fit["epochs"] / max(corpus.metrics["train_labelled_share"], 1e-3)))
    every = max(1, round(student.fit.get("validate_every", 1) * longer / student.fit["epochs"]))
    job: dict[str, Any] = {
        "name": SCRATCH, "function": ctx.spec.function, "corpus": ctx.spec.steps.corpus.simulation, "network": student.network,
        "fit": {**student.fit, "epochs": longer, "validate_every": every}, "loss": student.loss, "arm": "scratch",
        "temperature": 1.0, "alpha": 0.0, "seed": derive_seed(ctx.spec.seed, "student", 0), "data": str(ctx.scratch / "data"),
        "out": str(ctx.scratch),
    }  # fmt: skip
    ctx.progress(0, 1, "student-sized network from scratch")
    student_job(job)
    return load_student(ctx.function, job)


def _summary(
    ctx: StepContext, table: pd.DataFrame, plain: list[str], references: list[str], models: list[str], splits: list[str]
) -> dict[str, Any]:
    """The `teacher` part of the report. references spend more measurements than the teacher: printed, not to be beaten."""
    metric = ctx.function.metric
    score = headline(ctx, table, "teacher")
    name, value = best_baseline(
        table, "test", plain, metric=metric.name, higher_is_better=metric.higher_is_better, aggregate=metric.aggregate
    )  # fmt: skip
    sign = 1.0 if metric.higher_is_better else -1.0
    rivals = {model: score_of(table, f"{model}@test", metric) for model in models if model not in ("teacher", RAW)}
    better = sorted(model for model, other in rivals.items() if sign * (score.value - other) <= 0)
    reference = ctx.function.gap_baseline

    def gap(split: str) -> float | None:
        if split not in splits:
            return None
        terms = ["teacher@test", f"{reference}@{split}"], [f"{reference}@test", f"teacher@{split}"]
        return sign * score_of(table, terms[0], metric, terms[1])

    return {
        "params": ctx.inputs["teacher"].metrics["params"],
        "score": score.value,
        "score_ci95": list(score.ci95 or ()),
        "baseline": {"name": name, "score": value},
        "rivals": rivals,
        "unbeaten": [model for model in better if model not in references],
        "nothing_to_teach": any(model not in references for model in better),
        "better_references": [model for model in better if model in references],
        "calibration": {
            "metric": ctx.function.head().calibration_metric,
            "value": calibration_of(ctx, table, "teacher@test"),
            "raw": calibration_of(ctx, table, f"{RAW}@test") if RAW in models else None,
        },
        "gap_site": gap("heldout_site"),
        "gap_band": gap("heldout_band"),
    }


def _draw(ctx: StepContext, table: pd.DataFrame, models: dict[str, Predictor], splits: list[str]) -> None:
    folder = ctx.out / "figures"
    folder.mkdir(exist_ok=True)
    features, truth = evaluation_data(ctx.function, ctx.inputs["corpus"], "test")
    for name, picture in figures.scorecard_figures(ctx.function, table, splits, [name for name in models if name != RAW]).items():
        (folder / f"{name}.png").write_bytes(picture)
    for name, picture in (*ctx.function.figures(models, features, truth), *ctx.function.table_figures(table)):
        (folder / f"{name}.png").write_bytes(picture)
