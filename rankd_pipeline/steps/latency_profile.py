"""Step 10: every runtime of the deployable files against the budget, paced as a DU calls them; a gate."""

from rankd_pipeline.report import figures
from rankd_pipeline.runtime.latency import Candidate, LatencyConfig, line_up, profile
from rankd_pipeline.runtime.onnx_export import read_signature
from rankd_pipeline.runtime.parity import onnx_runner
from rankd_pipeline.spec import validated
from rankd_pipeline.steps.data import calls_of_rows
from rankd_pipeline.steps.quantized_onnx import PRECISIONS, c_form, model_file
from rankd_pipeline.steps.runner import StepContext

SAMPLES = 512


def latency_profile(ctx: StepContext) -> None:
    """Write `latency.json` and a histogram; metrics carry the winner and the verdict.

    Student candidates that missed their quantization gate do not race (at smoke scale all do).
    """
    files, students = ctx.inputs["quantized_onnx"], ctx.inputs["student"].metrics["candidates"]
    racing = [
        name for name, made in files.metrics["candidates"].items() if made["verdict"] == "pass" or not ctx.spec.enforced
    ]  # fmt: skip
    where = f"pipeline {ctx.spec.pipeline}, steps.latency_profile.race"
    config = validated(LatencyConfig, ctx.config.race, where)
    first = files.file(model_file(racing[0], "fp32"))
    signature = read_signature(first)
    samples = calls_of_rows(ctx.function, ctx.inputs["corpus"], "test", SAMPLES, signature, onnx_runner(first))
    # Carried state starts at zero in the race, as in the field: students may differ in it.
    samples = {name: values for name, values in samples.items() if name not in signature.state}
    line = [entry for name in racing for entry in _line_up(ctx, name, name if len(racing) > 1 else "")]
    report = profile(
        line, signature, config, samples, ctx.scratch / "race", lambda text, share: ctx.progress(share, 1.0, text),
        ctx.function.latency_cases(samples), {name: max(students[name]["validation"].values()) for name in racing},
        ctx.config.limit_us,
    )  # fmt: skip
    (ctx.out / "latency.json").write_text(report.to_json())
    (ctx.out / "figures").mkdir(exist_ok=True)
    winner = next(item for item in report.candidates if item.runtime == report.winner)
    for name, picture in figures.latency_figures(report.model_dump(mode="json")).items():
        (ctx.out / "figures" / f"{name}.png").write_bytes(picture)
    ctx.metrics.update(report.headline())
    ctx.metrics.update(
        candidate=winner.model or racing[0],
        engine=winner.engine,
        precision=winner.precision,
        why=report.why,
        reason=report.why,
        host=report.host,
    )
    tail_us = ctx.metrics["p999_us"]
    ctx.metrics["deadlines"] = [
        {"name": name, "deadline_us": deadline, "late": tail_us is None or tail_us > deadline}
        for name, deadline in ctx.function.deadlines(ctx.corpus_config).items()
    ]


def _line_up(ctx: StepContext, name: str, prefix: str) -> list[Candidate]:
    """What a student candidate races as; INT8 that was left out for its score stays out of the race."""
    files = ctx.inputs["quantized_onnx"]
    made = files.metrics["candidates"][name]
    precisions = PRECISIONS if not ctx.spec.enforced else made["precisions"]
    models = {precision: files.file(model_file(name, precision)) for precision in precisions}
    forms = {precision: c_form(files, name, precision) for precision in precisions if ctx.config.generated_c}
    return line_up(models["fp32"], models.get("int8"), forms, True, prefix)
