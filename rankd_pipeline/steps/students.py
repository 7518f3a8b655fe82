"""Training one student, in a worker process: the unit of the temperature sweep and of the paired comparison."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankd_pipeline.distillation.heads import outputs_of
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.steps.data import read_npy, write_npy
from rankd_pipeline.training.fit import FitConfig, fit
from rankd_pipeline.training.seeds import derive_seed
from rankd_pipeline.training.weights import load_weights, save_weights

EXTRA = ("label", "has_label", "target", "teacher")


def student_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train the student of one arm, temperature and seed; returns its validation figures.

    job: name, function, corpus (raw configuration), network, fit, loss (augmentation options), arm, temperature,
    alpha, seed, data (folder with train/, val/), out (folder of results). A finished job is read back, not redone.
    """
    out, name = Path(job["out"]), job["name"]
    result_path = out / f"{name}.json"
    if result_path.exists():
        return json.loads(result_path.read_text())
    function = load_function(job["function"])
    head = function.head()
    train, val = read_npy(Path(job["data"]) / "train"), read_npy(Path(job["data"]) / "val")
    names = [key for key in train if key not in EXTRA]
    val_inputs = {key: np.asarray(val[key]) for key in names}
    model = new_student(function, job, {key: np.asarray(train[key]) for key in names})
    config = FitConfig.model_validate(job["fit"])
    columns, config = _arm_data(job["arm"], train, config)

    def loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = function.augment(batch, **job["loss"])
        return head.student_loss(job["arm"], module(**{key: batch[key] for key in names}), batch, job["temperature"], job["alpha"])

    fitted = fit(
        model, columns, loss, lambda module: head.validation_loss(outputs_of(module, val_inputs), np.asarray(val["label"])),
        config, job["seed"], out / f"{name}.work",
    )  # fmt: skip
    outputs = outputs_of(model, val_inputs)
    teacher = np.asarray(val["teacher"], np.float32) if "teacher" in val else None
    result = {
        "name": name, "arm": job["arm"], "temperature": job["temperature"], "seed": job["seed"],
        "validation_loss": fitted.best_value, "validation_score": head.task_score(outputs, np.asarray(val["label"])),
        "divergence": None if teacher is None else head.divergence(outputs, teacher), "best_epoch": fitted.best_epoch,
        "history": [asdict(record) for record in fitted.history],
    }  # fmt: skip
    save_weights(model, out / f"{name}.safetensors")
    temporary = out / f"{name}.json.tmp"
    temporary.write_text(json.dumps(result))
    temporary.replace(result_path)
    return result


def new_student(function: Any, job: Mapping[str, Any], train_inputs: Mapping[str, np.ndarray]) -> torch.nn.Module:
    """The untrained student: the same seed gives the same start in every arm."""
    torch.manual_seed(derive_seed(job["seed"], "init"))
    model = function.student(function.corpus_config(job["corpus"]), job["network"])
    function.set_statistics(model, train_inputs)
    return model


def load_student(function: Any, job: Mapping[str, Any]) -> torch.nn.Module:
    """The trained student of a finished job."""
    model = function.student(function.corpus_config(job["corpus"]), job["network"])
    load_weights(model, Path(job["out"]) / f"{job['name']}.safetensors")
    return model.eval()


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
