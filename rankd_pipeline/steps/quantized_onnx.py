"""Step 9: the deployable files, FP32 and INT8, with their lineage inside; parity and score drop are a gate."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rankd_pipeline.compression.quantization import quantize_int8
from rankd_pipeline.distillation.heads import Calibration
from rankd_pipeline.evaluation.gates import GateResult, verdict_of
from rankd_pipeline.evaluation.table import concat_tables, write_table
from rankd_pipeline.ran_functions.contract import Predictor, Run
from rankd_pipeline.runtime import c_export, parity
from rankd_pipeline.runtime.c_export import CForm, CSource
from rankd_pipeline.runtime.onnx_export import export_onnx, load_session, run_batches
from rankd_pipeline.runtime.signature import ModelSignature
from rankd_pipeline.steps.data import calls_of_rows, present_splits
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.scoring import evaluate_splits, judge_gates, score_of, score_table
from rankd_pipeline.steps.teacher import WEIGHTS
from rankd_pipeline.store.artifact import Artifact
from rankd_pipeline.training.weights import load_weights

PRECISIONS = ("fp32", "int8")
C_FOLDER = "c"


def model_file(candidate: str, precision: str) -> str:
    """The ONNX file of a student candidate in `quantized_onnx`, and, less its ending, the name of its C."""
    return f"{candidate}_{precision}.onnx"


def c_form(files: Artifact, candidate: str, precision: str) -> CForm:
    """The C that the step wrote for a file, or why it did not."""
    name = Path(model_file(candidate, precision)).stem
    source = files.path / C_FOLDER / f"{name}.c"
    if source.is_file():
        return CForm(CSource(name, source, source.with_suffix(".h")))
    return CForm(None, files.metrics["candidates"][candidate]["parity"][f"c_onnx_{precision}"]["note"])


@dataclass(frozen=True)
class _Exported:
    """One student as files, and the module that they must agree with."""

    files: dict[str, Path]
    module: torch.nn.Module
    signature: ModelSignature


def quantized_onnx(ctx: StepContext) -> None:
    """Write both ONNX files of every student candidate, their C under `c/`, `parity.json` and `evaluation.parquet`.

    A candidate that misses a gate leaves the race (with `int8_optional`, one that only INT8 misses takes its INT8 out of
    it); the step passes if one is left. metrics (gates and verdict among them) are those of the student step's favourite,
    or of the best candidate left; `candidates` holds those of all.
    """
    students = ctx.inputs["student"].metrics["candidates"]
    exported = {name: _exported(ctx, name, metrics["calibration_parameters"]) for name, metrics in students.items()}
    ctx.progress(0, 1, "C")
    libraries = _libraries(ctx, {path.stem: path for item in exported.values() for path in item.files.values()})
    made = {name: _judged(ctx, name, item, libraries) for name, item in exported.items()}
    write_table(concat_tables([table for _, table in made.values()]), ctx.out / "evaluation.parquet")
    models = [str(model) for _, table in made.values() for model in table["model"].unique()]
    ctx.write_json("scores.json", [
        row for _, table in made.values() for row in score_table(ctx, table, sorted(set(table["model"]), key=models.index),
                                                                  present_splits(ctx.inputs["corpus"]))
    ])  # fmt: skip
    ctx.write_json("parity.json", {name: metrics["parity"] for name, (metrics, _) in made.items()})
    order = sorted(students, key=lambda name: -max(students[name]["validation"].values()))
    best = next((name for name in order if made[name][0]["verdict"] == "pass"), order[0])
    ctx.metrics.update(made[best][0], candidate=best, candidates={name: metrics for name, (metrics, _) in made.items()})


def _exported(ctx: StepContext, name: str, calibration: Calibration) -> _Exported:
    """Write both files of one student."""
    files = {precision: ctx.out / model_file(name, precision) for precision in PRECISIONS}
    module = ctx.function.student(ctx.corpus_config, ctx.spec.students[name].network)
    load_weights(module, ctx.inputs["student"].file(f"{name}/{WEIGHTS}"))
    deployable = ctx.function.deployable(module, calibration).eval()
    signature = ctx.function.student_signature(
        ctx.corpus_config, ctx.spec.students[name].network, ctx.spec.steps.latency_profile.budget_us
    )
    about = {**lineage_of(ctx), "rankd.student": name}
    ctx.progress(0, 2, f"{name}: ONNX")
    export_onnx(deployable, signature, files["fp32"], {**about, "rankd.precision": "fp32"})
    ctx.progress(1, 2, f"{name}: INT8")
    batches = _calibration_batches(ctx, signature, parity.onnx_runner(files["fp32"]))
    quantize_int8(files["fp32"], files["int8"], batches, {**about, "rankd.precision": "int8"})
    return _Exported(files, deployable, signature)


def _libraries(ctx: StepContext, files: dict[str, Path]) -> dict[str, tuple[Path | None, str]]:
    """The files as C under `c/` and compiled, by name: (library, "") or (None, why not)."""
    if not ctx.spec.steps.latency_profile.generated_c:
        return dict.fromkeys(files, (None, "switched off (steps.latency_profile.generated_c)"))
    forms = c_export.generate_all(files, ctx.out / C_FOLDER)
    if c_export.compiler() is None:
        return {name: (None, form.reason or c_export.NO_COMPILER) for name, form in forms.items()}
    sources = [form.source for form in forms.values() if form.source is not None]
    with ThreadPoolExecutor(ctx.workers) as pool:
        built = dict(zip((source.name for source in sources), pool.map(partial(c_export.build_shared, out_dir=ctx.scratch / "lib"),
                                                                      sources), strict=True))  # fmt: skip
    return {name: (built.get(name), form.reason) for name, form in forms.items()}


def _judged(
    ctx: StepContext, name: str, exported: _Exported, libraries: dict[str, tuple[Path | None, str]]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """One student's metrics, and its evaluation."""
    corpus, files, signature = ctx.inputs["corpus"], exported.files, exported.signature
    ctx.progress(0, 2, f"{name}: parity")
    checks = _parity(ctx, exported, libraries)
    ctx.progress(1, 2, f"{name}: scores")
    models = {precision: onnx_predictor(ctx, path, signature) for precision, path in files.items()}
    table = evaluate_splits(ctx, corpus, models, present_splits(corpus), list(models))
    gates = judge_gates(ctx, ctx.spec.gates.quantized_onnx, table, [], ctx.spec.steps.calibration_scorecard.resamples)
    metrics = _metrics(ctx, files, table, checks, gates)
    if len(ctx.spec.students) > 1:
        table = concat_tables([table.assign(model=f"{name}_" + table["model"].astype(str))])
    return metrics, table


def _metrics(
    ctx: StepContext, files: dict[str, Path], table: pd.DataFrame, checks: dict[str, dict[str, Any]], gates: list[GateResult]
) -> dict[str, Any]:
    broken = [name for name, check in checks.items() if not check["ok"]]
    missed = [gate for gate in gates if gate.verdict != "pass"]
    of_int8 = (
        [gate for gate in missed if any(term.startswith("int8@") for term in gate.resolved)] if ctx.config.int8_optional else []
    )
    metric = ctx.function.metric
    scores = {precision: score_of(table, f"{precision}@test", metric) for precision in PRECISIONS}
    sign = 1.0 if metric.higher_is_better else -1.0
    return {
        "score": scores["int8"], "drop": sign * (scores["fp32"] - scores["int8"]), "bytes_fp32": files["fp32"].stat().st_size,
        "bytes_int8": files["int8"].stat().st_size, "parity": checks, "gates": [gate.model_dump(mode="json") for gate in gates],
        "precisions": ["fp32"] if of_int8 else list(PRECISIONS),
        "verdict": "fail" if broken else verdict_of([gate for gate in gates if gate not in of_int8]),
        "reason": "; ".join([f"parity {name} is broken: {checks[name]}" for name in broken]
                            + [gate.sentence() + (", left out" if gate in of_int8 else "") for gate in missed]),
    }  # fmt: skip


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


def _calibration_batches(ctx: StepContext, signature: ModelSignature, run: Run, batch: int = 64) -> Iterator[dict[str, np.ndarray]]:
    """Calls on training samples spread evenly over the corpus, batch by batch."""
    inputs = calls_of_rows(ctx.function, ctx.inputs["corpus"], "train", ctx.config.calibration_samples, signature, run)
    count = len(next(iter(inputs.values())))
    for start in range(0, count, batch):
        yield {name: values[start : start + batch] for name, values in inputs.items()}


def _parity(
    ctx: StepContext, exported: _Exported, libraries: dict[str, tuple[Path | None, str]]
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """torch against ONNX, C against ONNX, for the bounds of the contract."""
    signature = exported.signature
    runners = {precision: parity.onnx_runner(path) for precision, path in exported.files.items()}
    inputs = calls_of_rows(ctx.function, ctx.inputs["corpus"], "test", ctx.config.parity_samples, signature, runners["fp32"])
    found = {"torch_onnx_fp32": parity.parity(parity.torch_runner(exported.module, signature), runners["fp32"], inputs)}
    not_built = {}
    for precision, path in exported.files.items():
        library, why = libraries[path.stem]
        if library is None:
            not_built[f"c_onnx_{precision}"] = {"ok": True, "note": why}
        else:
            found[f"c_onnx_{precision}"] = parity.parity(runners[precision], c_export.CModel(library, signature), inputs)
    # Classes are decided by their order; other heads by the values themselves.
    agreement = "argmax_agreement" if ctx.function.head().kind == "classification" else "close_agreement"
    holds = {
        "torch_onnx_fp32": lambda check: check.max_abs <= parity.ONNX_MAX_ABS,
        "c_onnx_fp32": lambda check: check.max_abs <= parity.C_MAX_ABS,
        "c_onnx_int8": lambda check: getattr(check, agreement) >= parity.INT8_AGREEMENT,
    }
    return {**{key: {**check.model_dump(), "ok": holds[key](check)} for key, check in found.items()}, **not_built}
