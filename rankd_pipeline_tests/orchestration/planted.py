"""Chains of small planted artifacts, under the recipes that the real chain would ask for: all of Dagster, no training."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from rankd_pipeline.runtime.bundle import MODEL, write_bundle
from rankd_pipeline.runtime.onnx_export import SIGNATURE_KEY
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineSpec
from rankd_pipeline.steps.chain import CHAIN, GATED, STEPS
from rankd_pipeline.steps.runner import inputs_of, open_store, recipe_of, resolve
from rankd_pipeline.store.artifact import Artifact, Draft

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
HISTORY = [{"epoch": 1, "epochs": 2, "train": 0.9, "validation": 0.8}, {"epoch": 2, "epochs": 2, "train": 0.5, "validation": 0.6}]


def plant(
    spec: PipelineSpec, current: Settings, verdicts: Mapping[str, str] | None = None, upto: str = "deployment", score: float = 0.7,
    model: Path | None = None,
) -> dict[str, Artifact]:  # fmt: skip
    """Publish the chain of `spec` up to a step; `verdicts` plants others than "pass"; model: an ONNX file that really works."""
    store, made = open_store(current), {}
    for info in CHAIN:
        inputs = {name: made[name] for name in info.inputs}
        draft = store.draft(recipe_of(info.name, spec, inputs))
        fill(draft, spec, (verdicts or {}).get(info.name, "pass"), score, model)
        made[info.name] = store.publish(draft, inputs)
        if info.name == upto:
            break
    return made


def plant_redistilled(
    spec: PipelineSpec, current: Settings, generation: int = 2, score: float = 0.7, model: Path | None = None
) -> dict[str, Artifact]:
    """Publish the chain of a re-distillation, with everything but its shadow run."""
    store, made = open_store(current), {}
    for step in STEPS:
        inputs = inputs_of(step, spec, store)
        draft = store.draft(recipe_of(step, spec, inputs))
        fill(draft, spec, "pass", score, model)
        draft.metrics["generation"] = generation
        made[step] = store.publish(draft, inputs)
    return made


def plant_shadow_run(spec: PipelineSpec, current: Settings, champion: Artifact, look: int = 1, **metrics: Any) -> Artifact:
    """Publish the shadow run that the challenge of a planted re-distillation will ask for."""
    store, site = open_store(current), spec.site
    assert site is not None
    found = {name: resolve(name, spec, store) for name in ("deployment", "corpus")}
    inputs: dict[str, Any] = {
        "deployment": found["deployment"], "champion": champion, "corpus": found["corpus"],
        "telemetry": store.get(spec.pipeline, "telemetry", site.telemetry),
    }  # fmt: skip
    given = {"windows": [list(window) for window in site.windows], "look": look}
    draft = store.draft(recipe_of("shadow_run", spec, inputs, given))
    draft.metrics.update({"promote": True, "reason": "better: planted", **metrics})
    return store.publish(draft, inputs)


def gate(verdict: str) -> dict[str, Any]:
    """A gate's result as a step stores it."""
    return {
        "name": "margin", "metric": "top1", "value": 0.031, "ci95": [0.012, 0.049], "threshold": 0.05, "comparator": ">=",
        "unit": "fraction", "verdict": verdict, "resolved": {}, "n_units": 40, "next_step": "more labels",
    }  # fmt: skip


def fill(draft: Draft, spec: PipelineSpec, verdict: str, score: float, model: Path | None = None) -> None:
    """The files and metrics that the steps after this one, and Dagster, look at."""
    step = draft.recipe.step
    (draft.out / "data.json").write_text(json.dumps({"step": step, "seed": spec.seed}))
    draft.observed.update(seconds=1.5, finished=1_700_000_000.0, run_id=None)
    draft.metrics["params"] = 1234
    if step in GATED:
        draft.metrics.update(verdict=verdict, gates=[gate(verdict)])
    if step == "teacher":
        (draft.out / "history.json").write_text(json.dumps(HISTORY))
        draft.metrics["scores"] = {"teacher": {"top1": 0.71, "top4": 0.93}, "knn": {"top1": 0.55, "top4": 0.9}}
    if step == "calibration_scorecard":
        (draft.out / "figures").mkdir(exist_ok=True)
        (draft.out / "figures" / "reliability.png").write_bytes(PNG)
    if step == "deployment":
        toy = draft.scratch / "model.onnx"
        save_model(toy, scale=score)
        write_bundle(draft.out / "bundle", {MODEL: model or toy}, {"recipe": draft.recipe.digest}, "<p>toy</p>")
        draft.metrics.update(score=score, test_data="planted")


TOY = ModelSignature(
    name="toy", budget_us=100.0, inputs=(TensorSpec(name="x", axes=("i",), shape=(4,), unit="1"),),
    outputs=(TensorSpec(name="y", axes=("i",), shape=(4,), unit="1"),),
)  # fmt: skip


def save_model(path: Path, scale: float) -> None:
    """y = scale * x, with its signature."""
    value = helper.make_tensor("scale", TensorProto.FLOAT, [1], [scale])
    node = helper.make_node("Mul", ["x", "scale"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    model = helper.make_model(helper.make_graph([node], "toy", [x], [y], [value]), opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    helper.set_model_props(model, {SIGNATURE_KEY: TOY.model_dump_json()})
    onnx.save(model, str(path))
