"""Step 9: the deployable files, FP32 and INT8, with their lineage inside; parity and score drop are a gate."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rankd_pipeline.compression.quantization import quantize_int8
from rankd_pipeline.evaluation.gates import verdict_of
from rankd_pipeline.evaluation.table import concat_tables, write_table
from rankd_pipeline.ran_functions.contract import Predictor
from rankd_pipeline.runtime import c_export, parity
from rankd_pipeline.runtime.onnx_export import export_onnx, load_session, run_batches
from rankd_pipeline.runtime.signature import ModelSignature
from rankd_pipeline.steps.data import inputs_of_rows, present_splits, split_is
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.scoring import evaluate_splits, judge_gates, network_predictor, score_of, score_table
from rankd_pipeline.steps.teacher import WEIGHTS
from rankd_pipeline.training.weights import load_weights

FP32, INT8 = "model_fp32.onnx", "model_int8.onnx"
C_NAMES = {FP32: "model_fp32", INT8: "model_int8"}


def quantized_onnx(ctx: StepContext) -> None:
    """Write both ONNX files, `parity.json`, `evaluation.parquet`; metrics carry gates and verdict."""
    corpus, fp32, int8 = ctx.inputs["corpus"], ctx.out / FP32, ctx.out / INT8
    module = ctx.function.student(ctx.corpus_config, ctx.spec.steps.student.network)
    load_weights(module, ctx.inputs["student"].file(WEIGHTS))
    calibration = ctx.inputs["student"].metrics["calibration_parameters"]
    deployable = ctx.function.deployable(module, calibration).eval()
    signature = ctx.function.signatures(ctx.corpus_config, ctx.spec.steps.latency_profile.budget_us)[0]
    export_onnx(deployable, signature, fp32, {**lineage_of(ctx), "rankd.precision": "fp32"})
    ctx.progress(1, 5, "INT8")
    quantize_int8(fp32, int8, _calibration_batches(ctx), {**lineage_of(ctx), "rankd.precision": "int8"})
    ctx.progress(2, 5, "parity")
    checks = _parity(ctx, deployable, signature)
    ctx.write_json("parity.json", checks)
    splits = present_splits(corpus)
    models: dict[str, Predictor] = {
        "student": network_predictor(ctx, module, calibration),
        "fp32": onnx_predictor(ctx, fp32, signature),
        "int8": onnx_predictor(ctx, int8, signature),
    }
    table = concat_tables([evaluate_splits(ctx, corpus, models, splits, list(models))])
    write_table(table, ctx.out / "evaluation.parquet")
    ctx.write_json("scores.json", score_table(ctx, table, list(models), splits))
    gates = judge_gates(ctx, ctx.spec.gates.quantized_onnx, table, [], ctx.spec.steps.calibration_scorecard.resamples)
    broken = [name for name, check in checks.items() if not check["ok"]]
    metric = ctx.function.metric
    scores = {name: score_of(table, f"{name}@test", metric) for name in ("fp32", "int8")}
    sign = 1.0 if metric.higher_is_better else -1.0
    ctx.metrics.update(
        score=scores["int8"], drop=sign * (scores["fp32"] - scores["int8"]), bytes_fp32=fp32.stat().st_size,
        bytes_int8=int8.stat().st_size, parity=checks, gates=[gate.model_dump(mode="json") for gate in gates],
        verdict="fail" if broken else verdict_of(gates),
        reason="; ".join([f"parity {name} is broken: {checks[name]}" for name in broken]
                         + [gate.sentence() for gate in gates if gate.verdict != "pass"]),
    )  # fmt: skip


def lineage_of(ctx: StepContext) -> dict[str, str]:
    """What the file says of itself: pipeline, scale, seed, and recipe and version of everything it comes from."""
    recipe = ctx.draft.recipe
    upstream: dict[str, Any] = {}

    def walk(name: str, inputs: Any) -> None:
        for step, artifact in inputs.items():
            if step not in upstream:
                upstream[step] = {"recipe": artifact["recipe"], "version": artifact["version"]}

    walk(recipe.step, {name: {"recipe": item.recipe, "version": item.version} for name, item in ctx.inputs.items()})
    for artifact in ctx.inputs.values():
        walk(artifact.step, artifact.manifest["inputs"])
    return {
        "rankd.pipeline": recipe.pipeline, "rankd.function": ctx.spec.function, "rankd.scale": recipe.scale,
        "rankd.seed": str(recipe.seed), "rankd.variant": recipe.variant, "rankd.recipe": recipe.digest,
        "rankd.code_version": recipe.code_version, "rankd.lineage": json.dumps(upstream, sort_keys=True),
        "rankd.deployable": "yes" if ctx.spec.enforced else "no: smoke scale",
    }  # fmt: skip


def onnx_predictor(ctx: StepContext, path: Path, signature: ModelSignature) -> Predictor:
    """The very file, on onnxruntime, as a predictor over feature columns."""
    session = load_session(path)
    return ctx.function.deployed_predictor(lambda inputs: run_batches(session, inputs), signature)


def _calibration_batches(ctx: StepContext, batch: int = 64) -> Iterator[dict[str, np.ndarray]]:
    """Training inputs spread evenly over the corpus, batch by batch."""
    _, inputs = inputs_of_rows(ctx.function, ctx.inputs["corpus"], split_is("train"))
    count = len(next(iter(inputs.values())))
    rows = np.linspace(0, count - 1, min(ctx.config.calibration_samples, count)).astype(int)
    for start in range(0, len(rows), batch):
        yield {name: values[rows[start : start + batch]] for name, values in inputs.items()}


def _parity(ctx: StepContext, deployable: Any, signature: ModelSignature) -> dict[str, dict[str, Any]]:
    """torch against ONNX, C against ONNX, for the bounds of the contract."""
    _, inputs = inputs_of_rows(ctx.function, ctx.inputs["corpus"], split_is("test"))
    inputs = {name: values[: ctx.config.parity_samples] for name, values in inputs.items()}
    fp32, int8 = parity.onnx_runner(ctx.out / FP32), parity.onnx_runner(ctx.out / INT8)
    found = {"torch_onnx_fp32": parity.parity(parity.torch_runner(deployable, signature), fp32, inputs)}
    not_built = {}
    for key, file, reference in (("c_onnx_fp32", FP32, fp32), ("c_onnx_int8", INT8, int8)):
        source, why = c_export.is_buildable(ctx.out / file, ctx.scratch / "c", C_NAMES[file])
        if source is None:
            not_built[key] = {"ok": True, "note": why}
            continue
        library = c_export.build_shared(source, ctx.scratch / "lib")
        found[key] = parity.parity(reference, c_export.CModel(library, signature), inputs)
    # Classes are decided by their order; other heads by the values themselves.
    agreement = "argmax_agreement" if ctx.function.head().kind == "classification" else "close_agreement"
    holds = {
        "torch_onnx_fp32": lambda check: check.max_abs <= parity.ONNX_MAX_ABS,
        "c_onnx_fp32": lambda check: check.max_abs <= parity.C_MAX_ABS,
        "c_onnx_int8": lambda check: getattr(check, agreement) >= parity.INT8_AGREEMENT,
    }
    return {**{key: {**check.model_dump(), "ok": holds[key](check)} for key, check in found.items()}, **not_built}
