"""Step 8: the student, distilled, against two controls over paired seeds; the better one on validation goes on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from rankd_pipeline.distillation.heads import Calibration, parameter_count
from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.paired import paired_gain
from rankd_pipeline.evaluation.table import write_table
from rankd_pipeline.report import figures
from rankd_pipeline.spec import validated
from rankd_pipeline.steps.data import features_of, labelled_inputs, present_splits, split_is, training_columns
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.scoring import (
    calibration_of,
    evaluate_splits,
    fitted_calibrations,
    headline,
    network_predictor,
    score_table,
)
from rankd_pipeline.steps.soft_labels import SOFT
from rankd_pipeline.steps.students import load_student, score_job, student_job, write_student_data
from rankd_pipeline.steps.teacher import WEIGHTS, load_teacher
from rankd_pipeline.store.tensors import read_columns, rows_of
from rankd_pipeline.training.fit import FitConfig
from rankd_pipeline.training.parallel import Workers
from rankd_pipeline.training.seeds import derive_seed
from rankd_pipeline.training.weights import save_weights


@dataclass(frozen=True)
class _Compared:
    """One candidate's students, trained: its temperature sweep, and every arm under every paired seed."""

    name: str
    temperature: float
    sweep: list[dict[str, Any]]
    paired: list[dict[str, Any]]

    def of(self, arm: str) -> list[dict[str, Any]]:
        return [job for job in self.paired if job["arm"] == arm]

    @property
    def validation(self) -> dict[str, float]:
        """Mean score of the two arms that may be deployed."""
        return {arm: float(np.mean([job["validation_score"] for job in self.of(arm)])) for arm in ("distilled", "scratch")}

    @property
    def arm(self) -> str:
        return max(self.validation, key=lambda arm: self.validation[arm])

    @property
    def chosen(self) -> dict[str, Any]:
        """The one that goes on."""
        return max(self.of(self.arm), key=lambda job: job["validation_score"])


def student(ctx: StepContext) -> None:
    """Write `<candidate>/` with weights, comparison and evaluation of each candidate, `scores.json` and figures.

    metrics are those of the candidate with the best validation score; `candidates` holds those of all.
    """
    _lay_out(ctx)
    with Workers(ctx.workers) as workers:
        compared = _trained(ctx, workers)
        models = {item.name: load_student(ctx.function, item.chosen) for item in compared}
        calibrations = fitted_calibrations(ctx, models)
        scores = _seed_scores(ctx, workers, compared, calibrations)
    made = {item.name: _published(ctx, item, models[item.name], calibrations[item.name], scores) for item in compared}
    best = max(compared, key=lambda item: item.validation[item.arm]).name
    ctx.metrics.update(made[best][0], candidate=best, candidates={name: metrics for name, (metrics, _) in made.items()})
    ctx.write_json("scores.json", [row for _, rows in made.values() for row in rows])
    _draw_networks(ctx, models)


def _trained(ctx: StepContext, workers: Workers) -> list[_Compared]:
    """Sweep the temperature, then train all arms under paired seeds: all candidates side by side, so that no worker waits."""
    head, students = ctx.function.head(), ctx.spec.students
    for name, config in students.items():
        validated(FitConfig, config.fit, f"pipeline {ctx.spec.pipeline}, steps.student.fit of {name}")
    temperatures = ctx.config.temperatures if head.tempered else (1.0,)
    sweep = []
    if len(temperatures) > 1:  # a single one is no choice
        sweep = _train(
            ctx, workers, [_job(ctx, name, "distilled", T, 0) for name in students for T in temperatures], "temperature sweep"
        )  # fmt: skip
    swept = {name: [job for job in sweep if job["candidate"] == name] for name in students}
    chosen = {
        name: max(jobs, key=lambda job: job["validation_score"])["temperature"] if jobs else temperatures[0]
        for name, jobs in swept.items()
    }
    seeds = range(1, ctx.config.paired_seeds + 1)
    paired = _train(
        ctx, workers, [_job(ctx, name, arm, chosen[name], seed) for name in students for seed in seeds for arm in head.arms],
        "paired seeds",
    )  # fmt: skip
    return [_Compared(name, chosen[name], swept[name], [job for job in paired if job["candidate"] == name]) for name in students]


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


def _job(ctx: StepContext, candidate: str, arm: str, temperature: float, seed: int) -> dict[str, Any]:
    config = ctx.spec.students[candidate]
    return {
        "name": f"{candidate}-{arm}-T{temperature:g}-seed{seed}", "candidate": candidate, "function": ctx.spec.function,
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


def _train(ctx: StepContext, workers: Workers, jobs: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    (ctx.scratch / "students").mkdir(exist_ok=True)
    done = 0
    ctx.progress(0, len(jobs), what)

    def on_done(_: int, __: Any) -> None:
        nonlocal done
        done += 1
        ctx.progress(done, len(jobs), what)

    results = workers.map(student_job, jobs, on_done)
    if not all(np.isfinite(job["validation_loss"]) for job in results):
        raise RankdError("student: a training diverged (its validation loss is not finite); lower steps.student.fit.lr.")
    return [{**job, **result} for job, result in zip(jobs, results, strict=True)]


def _seed_scores(
    ctx: StepContext, workers: Workers, compared: list[_Compared], calibrations: Mapping[str, Calibration]
) -> dict[str, float]:  # fmt: skip
    """The headline score of every student on the test split, by name; each worker reads the split once.

    Calibration changes no estimate and hardly a decision, so all are scored with that of the one that is deployed.
    """
    students = [{**job, "calibration": calibrations[item.name]} for item in compared for job in item.paired]
    shares = [students[start :: ctx.workers] for start in range(min(ctx.workers, len(students)))]
    jobs = [{"students": share, "corpus": ctx.inputs["corpus"]} for share in shares]
    ctx.progress(0, 1, "scoring every seed")
    return {name: score for scores in workers.map(score_job, jobs) for name, score in scores.items()}


def _published(
    ctx: StepContext, item: _Compared, model: torch.nn.Module, calibration: Calibration, found: Mapping[str, float]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write a candidate's folder and figures: its metrics, and its rows for the table of scores."""
    name, chosen, corpus, folder = item.name, item.chosen, ctx.inputs["corpus"], ctx.out / item.name
    folder.mkdir(exist_ok=True)
    save_weights(model, folder / WEIGHTS)
    ctx.write_json(
        f"{name}/comparison.json", {"sweep": _told(item.sweep), "paired": _told(item.paired), "chosen": chosen["name"]}
    )  # fmt: skip
    ctx.write_json(f"{name}/history.json", chosen["history"])
    splits = present_splits(corpus)
    table = evaluate_splits(ctx, corpus, {name: network_predictor(ctx, model, calibration)}, splits, [name])
    write_table(table, folder / "evaluation.parquet")
    metrics = {
        "temperature": item.temperature, "arm": item.arm, "validation": item.validation, "sweep": [_row(job) for job in item.sweep],
        "params": parameter_count(model), "calibration_parameters": calibration, **_summary(ctx, name, table),
        **_gains(ctx, item, found),
    }  # fmt: skip
    taught = max(item.of("distilled"), key=lambda job: job["validation_score"])
    if taught["distillation"]:
        metrics["distillation"] = {**taught["distillation"], "history": taught["history"]}
    folder = ctx.out / "figures"
    folder.mkdir(exist_ok=True)
    for title, picture in figures.student_figures(metrics, chosen["history"], metrics["temperature"]).items():
        (folder / f"{_prefix(ctx, name)}{title}.png").write_bytes(picture)
    return metrics, score_table(ctx, table, [name], splits)


def _gains(ctx: StepContext, item: _Compared, found: Mapping[str, float]) -> dict[str, Any]:
    """What distilling was worth over the paired seeds: `kd_gain` over the labels alone, `dark_gain` over hard labels."""
    sign = 1.0 if ctx.function.metric.higher_is_better else -1.0
    scores = {arm: [sign * found[job["name"]] for job in item.of(arm)] for arm in dict.fromkeys(job["arm"] for job in item.paired)}
    kd = paired_gain(scores["distilled"], scores["scratch"])
    dark = paired_gain(scores["distilled"], scores["hard"]) if "hard" in scores else None
    return {
        "scratch_score": sign * float(np.mean(scores["scratch"])),
        "kd_gain": kd.mean,
        "kd_gain_ci95": list(kd.ci95),
        "kd_p": kd.p_one_sided,
        "dark_gain": None if dark is None else dark.mean,
        "dark_gain_ci95": None if dark is None else list(dark.ci95),
        "verdict": "KD useful" if kd.useful else "KD not useful",
        "seed_scores": {arm: [sign * s for s in values] for arm, values in scores.items()},
    }


def _draw_networks(ctx: StepContext, models: Mapping[str, torch.nn.Module]) -> None:
    """What the function has to show of each student beside the teacher."""
    features = features_of(ctx.inputs["corpus"], ctx.function.feature_columns, split_is("test"))
    few, teacher = {column: values[:4] for column, values in features.items()}, load_teacher(ctx)
    for name, model in models.items():
        for title, picture in ctx.function.network_figures({"teacher": teacher, "student": model}, few):
            (ctx.out / "figures" / f"{_prefix(ctx, name)}{title}.png").write_bytes(picture)


def _prefix(ctx: StepContext, name: str) -> str:
    """What goes before the names of a candidate's figures, where there are several candidates."""
    return "" if len(ctx.spec.students) == 1 else f"{name}_"


def _summary(ctx: StepContext, name: str, table: pd.DataFrame) -> dict[str, Any]:
    """Its score, held against the teacher's."""
    metric, teacher = ctx.function.metric, ctx.inputs["calibration_scorecard"].metrics
    score = headline(ctx, table, name)
    base = teacher["baseline"]["score"]
    gained = teacher["score"] - base
    return {
        "score": score.value,
        "score_ci95": list(score.ci95 or ()),
        "retention": score.value / teacher["score"] if metric.is_rate and teacher["score"] else None,
        "gain_retention": (score.value - base) / gained if gained else None,
        "calibration": {"metric": ctx.function.head().calibration_metric, "value": calibration_of(ctx, table, f"{name}@test")},
    }
