"""Step 3: self-supervised weights for the teacher, by masked modelling over the whole training corpus."""

from dataclasses import asdict

import numpy as np
import torch

from rankd_pipeline.spec import validated
from rankd_pipeline.steps.data import inputs_of_rows, split_is
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.training.fit import EpochRecord, FitConfig, fit
from rankd_pipeline.training.seeds import derive_seed
from rankd_pipeline.training.weights import save_weights

WEIGHTS = "weights.safetensors"


def ssl_weights(ctx: StepContext) -> None:
    """Write `weights.safetensors` and `history.json`, or publish why there is nothing to do."""
    corpus = ctx.inputs["corpus"]
    share = corpus.metrics["train_labelled_share"]
    if "last_teacher" in ctx.inputs:
        return ctx.skip("the teacher goes on from its last weights")
    if not ctx.config.enabled:
        return ctx.skip("switched off in the YAML (steps.ssl_weights.enabled)")
    if share >= ctx.config.skip_labelled_share:
        return ctx.skip(f"{share:.0%} of the training samples carry labels, at or above {ctx.config.skip_labelled_share:.0%}")
    _, train = inputs_of_rows(ctx.function, corpus, split_is("train"))
    _, val = inputs_of_rows(ctx.function, corpus, split_is("val"))
    config = validated(FitConfig, ctx.config.fit, f"pipeline {ctx.spec.pipeline}, steps.ssl_weights.fit")
    seed = derive_seed(ctx.spec.seed, "ssl_weights")
    torch.manual_seed(seed)
    model = ctx.function.teacher(ctx.corpus_config, ctx.spec.steps.teacher.network)
    ctx.function.set_statistics(model, train)
    history: list[EpochRecord] = []

    def on_epoch(record: EpochRecord) -> None:
        ctx.progress(record.epoch, record.epochs, f"masked loss {record.train_loss:.3f}")

    def loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return ctx.function.ssl_loss(module, batch, ctx.config.mask_share)

    def validate(module: torch.nn.Module) -> float:
        # The same masks at every validation, so that epochs compare.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _mean_loss(module, loss, val)

    result = fit(model, train, loss, validate, config, seed, ctx.scratch, on_epoch)
    history.extend(result.history)
    save_weights(model, ctx.out / WEIGHTS)
    ctx.write_json("history.json", [asdict(record) for record in history])
    ctx.metrics.update(best_epoch=result.best_epoch, masked_loss=result.best_value, labelled_share=share)
    ctx.observed["samples_per_s"] = result.samples_per_s
    return None


def _mean_loss(module: torch.nn.Module, loss, inputs: dict[str, np.ndarray], batch: int = 2048) -> float:
    count = len(next(iter(inputs.values())))
    total = 0.0
    for start in range(0, count, batch):
        chunk = {name: torch.as_tensor(value[start : start + batch]) for name, value in inputs.items()}
        total += float(loss(module, chunk)) * len(next(iter(chunk.values())))
    return total / count
