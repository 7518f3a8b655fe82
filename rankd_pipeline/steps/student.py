"""Step 8: the student, distilled, against two controls over paired seeds; the better one on validation goes on."""

from typing import Any

import numpy as np
import pandas as pd

from rankd_pipeline.distillation.heads import Calibration, parameter_count
from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.paired import PairedGain, paired_gain
from rankd_pipeline.evaluation.table import write_table
from rankd_pipeline.report import figures
from rankd_pipeline.spec import StudentCandidate, validated
from rankd_pipeline.steps.data import features_of, labelled_inputs, present_splits, split_is, training_columns
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.scoring import (
    calibration_of,
    evaluate_splits,
    fitted_calibration,
    headline,
    network_predictor,
    score_table,
)
from rankd_pipeline.steps.soft_labels import SOFT
from rankd_pipeline.steps.students import load_student, score_job, student_job, write_student_data
from rankd_pipeline.steps.teacher import WEIGHTS, load_teacher
from rankd_pipeline.store.tensors import read_columns, rows_of
from rankd_pipeline.training.fit import FitConfig
from rankd_pipeline.training.parallel import map_processes
from rankd_pipeline.training.seeds import derive_seed
from rankd_pipeline.training.weights import load_weights, save_weights


def student(ctx: StepContext) -> None:
    """Write `<candidate>/` with weights, comparison and evaluation of each candidate, `scores.json` and figures.

    metrics are those of the candidate with the best validation score; `candidates` holds those of all.
    """
    _lay_out(ctx)
    made = {name: _candidate(ctx, name, config) for name, config in ctx.spec.students.items()}
    best = max(made, key=lambda name: made[name][0]["validation"][made[name][0]["arm"]])
    ctx.metrics.update(made[best][0], candidate=best, candidates={name: metrics for name, (metrics, _) in made.items()})
    ctx.write_json("scores.json", [row for _, rows in made.values() for row in rows])


def _candidate(ctx: StepContext, name: str, config: StudentCandidate) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sweep, compare and publish one candidate: its metrics, and its rows for the table of scores."""
    validated(FitConfig, config.fit, f"pipeline {ctx.spec.pipeline}, steps.student.fit of {name}")
    head = ctx.function.head()
    temperatures = ctx.config.temperatures if head.tempered else (1.0,)
    of = "" if len(ctx.spec.students) == 1 else f"{name}: "
    sweep = []
    if len(temperatures) > 1:  # a single one is no choice
        sweep = _train(ctx, [_job(ctx, name, config, "distilled", T, 0) for T in temperatures], of + "temperature sweep")
    temperature = max(sweep, key=lambda job: job["validation_score"])["temperature"] if sweep else temperatures[0]
    seeds = range(1, ctx.config.paired_seeds + 1)
    trained = _train(
        ctx, [_job(ctx, name, config, arm, temperature, seed) for seed in seeds for arm in head.arms], of + "paired seeds"
    )  # fmt: skip
    by_arm = {arm: [job for job in trained if job["arm"] == arm] for arm in head.arms}
    mean_validation = {arm: float(np.mean([job["validation_score"] for job in by_arm[arm]])) for arm in ("distilled", "scratch")}
    winner = max(mean_validation, key=lambda arm: mean_validation[arm])
    chosen = max(by_arm[winner], key=lambda job: job["validation_score"])
    folder = ctx.out / name
    folder.mkdir(exist_ok=True)
    comparison = {"sweep": _told(sweep), "paired": _told(trained), "chosen": chosen["name"]}
    ctx.write_json(f"{name}/comparison.json", comparison)
    ctx.write_json(f"{name}/history.json", chosen["history"])
    metrics = {"temperature": temperature, "arm": winner, "validation": mean_validation, "sweep": [_row(job) for job in sweep]}
    taught = max(by_arm["distilled"], key=lambda job: job["validation_score"])
    if taught["distillation"]:
        metrics["distillation"] = {**taught["distillation"], "history": taught["history"]}
    judged, rows = _judge(ctx, name, chosen, by_arm)
    metrics |= judged
    _draw(ctx, name, metrics, chosen["history"])
    return metrics, rows


def _told(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What came out of each job, without where it was trained: a path would make equal students differ."""
    kept = ("name", "arm", "temperature", "seed", "validation_loss", "validation_score", "divergence", "best_epoch", "history",
            "distillation")  # fmt: skip
    return [{key: job[key] for key in kept} for job in jobs]


def _row(job: dict[str, Any]) -> dict[str, Any]:
    return {key: job[key] for key in ("temperature", "validation_score", "validation_loss", "divergence")}


def _lay_out(ctx: StepContext) -> None:
    """Write the arrays of the comparison once, for the workers to map."""
    corpus, labels = ctx.inputs["corpus"], ctx.inputs["oracle_labels"]
    ids, train = training_columns(ctx.function, corpus, labels)
    val_ids, val, val_label = labelled_inputs(ctx.function, corpus, labels, "val")
    val = {**val, "label": val_label}
    if ctx.inputs["soft_labels"].skipped is None:
        soft = read_columns(ctx.inputs["soft_labels"].file(SOFT), ["sample_id", "teacher"])
        train["teacher"], val["teacher"] = (soft["teacher"][rows_of(soft["sample_id"], rows)] for rows in (ids, val_ids))
    write_student_data(ctx.scratch / "data", train, val)


def _job(
    ctx: StepContext, candidate: str, config: StudentCandidate, arm: str, temperature: float, seed: int
) -> dict[str, Any]:  # fmt: skip
    return {
        "name": f"{candidate}-{arm}-T{temperature:g}-seed{seed}", "function": ctx.spec.function,
        "corpus": ctx.spec.steps.corpus.simulation, "network": config.network, "fit": config.fit, "loss": config.loss,
        "arm": arm, "temperature": temperature, "alpha": ctx.config.alpha, "seed": derive_seed(ctx.spec.seed, "student", seed),
        "distillation": ctx.config.distillation, "teacher": str(ctx.inputs["teacher"].file(WEIGHTS)),
        "teacher_network": ctx.spec.steps.teacher.network, "start": _start(ctx, candidate),
        "data": str(ctx.scratch / "data"), "out": str(ctx.scratch / "students"),
    }  # fmt: skip


def _start(ctx: StepContext, candidate: str) -> str | None:
    """Weights that a re-distillation goes on from; a candidate that the last student did not have begins anew."""
    last = ctx.inputs.get("last_student")
    path = last.path / candidate / WEIGHTS if last is not None else None
    return str(path) if path is not None and path.is_file() else None


def _train(ctx: StepContext, jobs: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    (ctx.scratch / "students").mkdir(exist_ok=True)
    done = 0
    ctx.progress(0, len(jobs), what)

    def on_done(_: int, __: Any) -> None:
        nonlocal done
        done += 1
        ctx.progress(done, len(jobs), what)

    results = map_processes(student_job, jobs, ctx.workers, on_done)
    if not all(np.isfinite(job["validation_loss"]) for job in results):
        raise RankdError("student: a training diverged (its validation loss is not finite); lower steps.student.fit.lr.")
    return [{**job, **result} for job, result in zip(jobs, results, strict=True)]


def _judge(
    ctx: StepContext, name: str, chosen: dict[str, Any], by_arm: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Calibrate the chosen student, write it down, and score it and every seed on the test splits."""
    corpus, model = ctx.inputs["corpus"], load_student(ctx.function, chosen)
    calibration = fitted_calibration(ctx, model)
    save_weights(model, ctx.out / name / WEIGHTS)
    splits = present_splits(corpus)
    deployed = evaluate_splits(ctx, corpus, {name: network_predictor(ctx, model, calibration)}, splits, [name])
    write_table(deployed, ctx.out / name / "evaluation.parquet")
    sign = 1.0 if ctx.function.metric.higher_is_better else -1.0
    found = _seed_scores(ctx, [job for jobs in by_arm.values() for job in jobs], calibration)
    scores = {arm: [sign * found[job["name"]] for job in jobs] for arm, jobs in by_arm.items()}
    kd = paired_gain(scores["distilled"], scores["scratch"])
    dark = paired_gain(scores["distilled"], scores["hard"]) if "hard" in scores else None
    metrics = _summary(ctx, name, deployed, parameter_count(model), sign * float(np.mean(scores["scratch"])), kd, dark)
    metrics |= {"calibration_parameters": calibration, "seed_scores": {arm: [sign * s for s in scores[arm]] for arm in scores}}
    return metrics, score_table(ctx, deployed, [name], splits)


def _seed_scores(ctx: StepContext, students: list[dict[str, Any]], calibration: Calibration) -> dict[str, float]:
    """The headline score of every student on the test split, by name; each worker reads the split once.

    Calibration changes no estimate and hardly a decision, so all are scored with that of the one that is deployed.
    """
    shares = [students[start :: ctx.workers] for start in range(min(ctx.workers, len(students)))]
    jobs = [{"students": share, "corpus": ctx.inputs["corpus"], "calibration": calibration} for share in shares]
    ctx.progress(0, 1, "scoring every seed")
    return {name: score for scores in map_processes(score_job, jobs, ctx.workers) for name, score in scores.items()}


def _draw(ctx: StepContext, name: str, metrics: dict[str, Any], history: list[dict[str, Any]]) -> None:
    folder = ctx.out / "figures"
    folder.mkdir(exist_ok=True)
    prefix = "" if len(ctx.spec.students) == 1 else f"{name}_"
    for title, picture in figures.student_figures(metrics, history, metrics["temperature"]).items():
        (folder / f"{prefix}{title}.png").write_bytes(picture)
    student_network = ctx.function.student(ctx.corpus_config, ctx.spec.students[name].network)
    load_weights(student_network, ctx.out / name / WEIGHTS)
    features = features_of(ctx.inputs["corpus"], ctx.function.feature_columns, split_is("test"))
    few = {column: values[:4] for column, values in features.items()}
    networks = {"teacher": load_teacher(ctx), "student": student_network.eval()}
    for title, picture in ctx.function.network_figures(networks, few):
        (folder / f"{prefix}{title}.png").write_bytes(picture)


def _summary(
    ctx: StepContext, name: str, table: pd.DataFrame, params: int, scratch: float, kd: PairedGain, dark: PairedGain | None
) -> dict[str, Any]:
    """The `student` part of the report."""
    metric, teacher = ctx.function.metric, ctx.inputs["calibration_scorecard"].metrics
    score = headline(ctx, table, name)
    base = teacher["baseline"]["score"]
    gained = teacher["score"] - base
    return {
        "params": params,
        "score": score.value,
        "score_ci95": list(score.ci95 or ()),
        "retention": score.value / teacher["score"] if metric.is_rate and teacher["score"] else None,
        "gain_retention": (score.value - base) / gained if gained else None,
        "scratch_score": scratch,
        "kd_gain": kd.mean,
        "kd_gain_ci95": list(kd.ci95),
        "kd_p": kd.p_one_sided,
        "dark_gain": None if dark is None else dark.mean,
        "dark_gain_ci95": None if dark is None else list(dark.ci95),
        "verdict": "KD useful" if kd.useful else "KD not useful",
        "calibration": {"metric": ctx.function.head().calibration_metric, "value": calibration_of(ctx, table, f"{name}@test")},
    }
