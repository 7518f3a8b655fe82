"""Training one student, in a worker process: the unit of the temperature sweep and of the paired comparison."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankd_pipeline.distillation.distiller import Apprentice, DistillationConfig
from rankd_pipeline.distillation.heads import outputs_of
from rankd_pipeline.distillation.teacher_view import TeacherView
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.steps.data import evaluation_data, read_npy, write_npy
from rankd_pipeline.steps.scoring import score_of
from rankd_pipeline.training.fit import FitConfig, fit
from rankd_pipeline.training.seeds import derive_seed
from rankd_pipeline.training.weights import load_if_they_fit, load_weights, save_weights

EXTRA = ("label", "has_label", "target", "teacher", "group")


def student_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train the student of one arm, temperature and seed; returns its validation figures.

    job: name, function, corpus (raw configuration), network, fit, loss (augmentation options), arm, temperature,
    alpha, seed, data (folder with train/, val/), out (folder of results); for the distilled arm also distillation
    (DistillationConfig) and, where the teacher runs online, teacher (its weights) and teacher_network. A finished job is
    read back, not redone.
    """
    out, name = Path(job["out"]), job["name"]
    result_path = out / f"{name}.json"
    if result_path.exists():
        return json.loads(result_path.read_text())
    function = load_function(job["function"])
    head = function.head()
    train, val = read_npy(Path(job["data"]) / "train"), read_npy(Path(job["data"]) / "val")
    names = [key for key in val if key not in EXTRA]
    val_inputs = {key: np.asarray(val[key]) for key in names}
    model = new_student(function, job, {key: np.asarray(train[key]) for key in train if key not in EXTRA})
    config = FitConfig.model_validate(job["fit"])
    columns, config = _arm_data(job["arm"], train, config)
    groups = columns.pop("group", None)
    apprentice = _apprentice(function, job, model, names, config)

    def respond(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        views = function.views(batch, **job["loss"])
        outputs = [module(**{key: view[key] for key in names}) for view in views]
        losses = [head.student_loss(job["arm"], output, view, job["temperature"], job["alpha"])
                  for output, view in zip(outputs, views, strict=True)]  # fmt: skip
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def learn_beside(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert isinstance(module, Apprentice)
        views = function.views(batch, **job["loss"])
        losses = [head.supervised_loss(output, view) if taught is None else head.supervised_loss(output, view) + taught
                  for (output, taught), view in zip(module.losses(views), views, strict=True)]  # fmt: skip
        return torch.stack(losses).mean()

    def validate(module: torch.nn.Module) -> float:
        return head.validation_loss(outputs_of(module, val_inputs), np.asarray(val["label"]))

    if apprentice is None:
        fitted = fit(model, columns, respond, validate, config, job["seed"], out / f"{name}.work", groups=groups)
    else:
        fitted = fit(
            apprentice, columns, learn_beside, lambda module: validate(module.get_submodule("student")), config, job["seed"],
            out / f"{name}.work", groups=groups,
            before_epoch=lambda history: apprentice.before_epoch([record.validation for record in history]),
        )  # fmt: skip
    outputs = outputs_of(model, val_inputs)
    teacher = np.asarray(val["teacher"], np.float32) if "teacher" in val else None
    result = {
        "name": name, "arm": job["arm"], "temperature": job["temperature"], "seed": job["seed"],
        "validation_loss": fitted.best_value, "validation_score": head.task_score(outputs, np.asarray(val["label"])),
        "divergence": None if teacher is None else head.divergence(outputs, teacher), "best_epoch": fitted.best_epoch,
        "history": [asdict(record) for record in fitted.history],
        "distillation": None if apprentice is None else apprentice.record(),
    }  # fmt: skip
    save_weights(model, out / f"{name}.safetensors")
    temporary = out / f"{name}.json.tmp"
    temporary.write_text(json.dumps(result))
    temporary.replace(result_path)
    return result


def _apprentice(
    function: Any, job: Mapping[str, Any], student: torch.nn.Module, names: list[str], config: FitConfig
) -> Apprentice | None:
    """The student beside its frozen teacher, where the arm's method runs the teacher online."""
    method = DistillationConfig.model_validate(job.get("distillation", {}))
    if job["arm"] != "distilled" or not method.online:
        return None
    teacher = function.teacher(function.corpus_config(job["corpus"]), job["teacher_network"])
    load_weights(teacher, Path(job["teacher"]))
    return Apprentice(student, TeacherView(None, teacher), names, config.epochs, method)


def new_student(function: Any, job: Mapping[str, Any], train_inputs: Mapping[str, np.ndarray]) -> torch.nn.Module:
    """The student to be trained, the same in every arm: from the weights that the job names, else new by its seed."""
    torch.manual_seed(derive_seed(job["seed"], "init"))
    model = function.student(function.corpus_config(job["corpus"]), job["network"])
    if job.get("start") is None or load_if_they_fit(model, Path(job["start"])):
        function.set_statistics(model, train_inputs)
    return model


def load_student(function: Any, job: Mapping[str, Any]) -> torch.nn.Module:
    """The trained student of a finished job."""
    model = function.student(function.corpus_config(job["corpus"]), job["network"])
    load_weights(model, Path(job["out"]) / f"{job['name']}.safetensors")
    return model.eval()


def score_job(job: Mapping[str, Any]) -> dict[str, float]:
    """Score trained students on the test split, in a worker process: the headline metric by name.

    job: students (finished jobs of one function, each with the `calibration` to use), corpus (Artifact).
    """
    function = load_function(job["students"][0]["function"])
    features, truth = evaluation_data(function, job["corpus"], "test")
    models = {student["name"]: function.network_predictor(load_student(function, student), student["calibration"])
              for student in job["students"]}  # fmt: skip
    table = function.evaluate(models, features, truth, "test", frozenset(models))
    return {name: score_of(table, f"{name}@test", function.metric) for name in models}


def write_student_data(folder: Path, train: Mapping[str, np.ndarray], val: Mapping[str, np.ndarray]) -> None:
    """Lay the arrays of a comparison where its workers map them; each job sees the very same rows."""
    write_npy(folder / "train", dict(train))
    write_npy(folder / "val", dict(val))


def _arm_data(arm: str, train: Mapping[str, np.ndarray], config: FitConfig) -> tuple[dict[str, np.ndarray], FitConfig]:
    """What an arm trains on. Labels alone are fewer rows: their arm gets as many optimizer steps as the others."""
    if arm != "scratch":
        return {name: np.asarray(values) for name, values in train.items()}, config
    rows = np.flatnonzero(train["has_label"])
    columns = {name: np.asarray(values)[rows] for name, values in train.items() if name != "teacher"}
    longer = max(1, round(config.epochs * len(train["has_label"]) / max(1, len(rows))))
    every = max(1, round(config.validate_every * longer / config.epochs))
    return columns, config.model_copy(update={"epochs": longer, "validate_every": every})
