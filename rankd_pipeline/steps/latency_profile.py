"""Step 10: every runtime of the deployable files against the budget, paced as a DU calls them; a gate."""

import numpy as np

from rankd_pipeline.report import figures
from rankd_pipeline.runtime.latency import LatencyConfig, line_up, profile
from rankd_pipeline.spec import validated
from rankd_pipeline.steps.data import inputs_of_rows, split_is
from rankd_pipeline.steps.quantized_onnx import FP32, INT8
from rankd_pipeline.steps.runner import StepContext

SAMPLES = 512


def latency_profile(ctx: StepContext) -> None:
    """Write `latency.json`, the raced C sources under `c/` and a histogram; metrics carry the winner and the verdict.

    A candidate whose INT8 missed its gate never gets here: the quantization gate stops the chain before.
    """
    files = ctx.inputs["quantized_onnx"]
    where = f"pipeline {ctx.spec.pipeline}, steps.latency_profile.race"
    config = validated(LatencyConfig, ctx.config.race, where)
    signature = ctx.function.signatures(ctx.corpus_config, ctx.config.budget_us)[0]
    _, inputs = inputs_of_rows(ctx.function, ctx.inputs["corpus"], split_is("test"))
    rows = np.linspace(0, len(next(iter(inputs.values()))) - 1, SAMPLES).astype(int)
    samples = {name: values[rows] for name, values in inputs.items()}
    (ctx.out / "c").mkdir(exist_ok=True)
    report = profile(
        line_up(files.file(FP32), files.file(INT8), ctx.out / "c", native=True), signature, config, samples, ctx.scratch / "race",
        lambda text, share: ctx.progress(share, 1.0, text), ctx.function.latency_cases(samples),
    )  # fmt: skip
    (ctx.out / "latency.json").write_text(report.to_json())
    (ctx.out / "figures").mkdir(exist_ok=True)
    winner = next(item for item in report.candidates if item.runtime == report.winner)
    for name, picture in figures.latency_figures(report.model_dump(mode="json")).items():
        (ctx.out / "figures" / f"{name}.png").write_bytes(picture)
    ctx.metrics.update(report.headline())
    ctx.metrics.update(precision=winner.precision, why=report.why, reason=report.why, host=report.host)
