"""Step 5: the teacher, trained from the self-supervised weights on the labelled share of the training split."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankd_pipeline.distillation.heads import outputs_of, parameter_count
from rankd_pipeline.ran_functions.contract import Arrays, RanFunction
from rankd_pipeline.spec import validated
from rankd_pipeline.steps.data import inputs_of_rows, labelled_inputs, split_is, training_columns
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.ssl_weights import WEIGHTS
from rankd_pipeline.training.fit import EpochRecord, FitConfig, FitResult, fit
from rankd_pipeline.training.seeds import derive_seed
from rankd_pipeline.training.weights import load_if_they_fit, load_weights, save_weights


def teacher(ctx: StepContext) -> None:
    """Write `weights.safetensors` (input scaling included) and `history.json`."""
    model, seed = new_teacher(ctx), derive_seed(ctx.spec.seed, "teacher")
    corpus, labels = ctx.inputs["corpus"], ctx.inputs["oracle_labels"]
    _, train = training_columns(ctx.function, corpus, labels, labelled_only=True)
    _, val, val_label = labelled_inputs(ctx.function, corpus, labels, "val")
    config = validated(FitConfig, ctx.config.fit, f"pipeline {ctx.spec.pipeline}, steps.teacher.fit")

    def on_epoch(record: EpochRecord) -> None:
        text = "" if record.validation is None else f"validation {record.validation:.4f}"
        ctx.progress(record.epoch, record.epochs, text)

    result = fit_teacher(
        ctx.function, model, train, val, val_label, config, ctx.config.loss, seed, ctx.scratch, on_epoch
    )  # fmt: skip
    save_weights(model, ctx.out / WEIGHTS)
    ctx.write_json("history.json", [asdict(record) for record in result.history])
    ctx.metrics.update(
        params=parameter_count(model), best_epoch=result.best_epoch, validation_loss=result.best_value,
        labelled_samples=len(train["has_label"]), ssl=ctx.inputs["ssl_weights"].skipped is None,
    )  # fmt: skip
    ctx.observed["samples_per_s"] = result.samples_per_s


def fit_teacher(
    function: RanFunction, model: torch.nn.Module, train: Arrays, val: Arrays, val_label: np.ndarray, config: FitConfig,
    loss_options: Mapping[str, Any], seed: int, work: Path, on_epoch: Callable[[EpochRecord], None] | None = None,
) -> FitResult:  # fmt: skip
    """Train `model` in place on labelled rows (`training_columns`): the head's supervised loss over the function's views."""
    head = function.head()

    def loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        views = function.views(batch, **loss_options)
        losses = [head.supervised_loss(module(**{name: view[name] for name in val}), view) for view in views]
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    columns = {name: values for name, values in train.items() if name != "group"}
    return fit(
        model, columns, loss, lambda module: head.validation_loss(outputs_of(module, val), val_label), config, seed, work, on_epoch,
        train.get("group"),
    )  # fmt: skip


def new_teacher(ctx: StepContext) -> torch.nn.Module:
    """The teacher to be trained, with its input scaling: the last one on a re-distillation, else from the self-supervised
    weights where there are any."""
    torch.manual_seed(derive_seed(ctx.spec.seed, "teacher", "init"))
    model = ctx.function.teacher(ctx.corpus_config, ctx.config.network)
    if "last_teacher" in ctx.inputs:
        unfit = load_if_they_fit(model, ctx.inputs["last_teacher"].file(WEIGHTS))
        if not unfit:
            return model
        ctx.note(f"begun anew, not from the last teacher: {unfit}")
    start = ctx.inputs["ssl_weights"]
    if start.skipped is None:
        load_weights(model, start.file(WEIGHTS))
    else:
        _, inputs = inputs_of_rows(ctx.function, ctx.inputs["corpus"], split_is("train"))
        ctx.function.set_statistics(model, inputs)
    return model


def load_teacher(ctx: StepContext) -> torch.nn.Module:
    """The trained teacher of this chain, frozen."""
    model = ctx.function.teacher(ctx.corpus_config, ctx.spec.steps.teacher.network)
    load_weights(model, ctx.inputs["teacher"].file(WEIGHTS))
    return model.eval().requires_grad_(False)
