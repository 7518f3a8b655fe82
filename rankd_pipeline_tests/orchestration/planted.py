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
from rankd_pipeline.steps.chain import CHAIN, GATED
from rankd_pipeline.steps.runner import open_store, recipe_of
from rankd_pipeline.store.artifact import Artifact, Draft

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
HISTORY = [{"epoch": 1, "epochs": 2, "train": 0.9, "validation": 0.8}, {"epoch": 2, "epochs": 2, "train": 0.5, "validation": 0.6}]


def plant(
    spec: PipelineSpec, current: Settings, verdicts: Mapping[str, str] | None = None, upto: str = "deployment", score: float = 0.7
) -> dict[str, Artifact]:
    """Publish the chain of `spec` up to a step; `verdicts` plants others than "pass"."""
    store, made = open_store(current), {}
    for info in CHAIN:
        inputs = {name: made[name] for name in info.inputs}
        draft = store.draft(recipe_of(info.name, spec, inputs))
        fill(draft, spec, (verdicts or {}).get(info.name, "pass"), score)
        made[info.name] = store.publish(draft, inputs)
        if info.name == upto:
            break
    return made


def gate(verdict: str) -> dict[str, Any]:
    """A gate's result as a step stores it."""
    return {
        "name": "margin", "metric": "top1", "value": 0.031, "ci95": [0.012, 0.049], "threshold": 0.05, "comparator": ">=",
        "unit": "fraction", "verdict": verdict, "resolved": {}, "n_units": 40, "next_step": "more labels",
    }  # fmt: skip


def fill(draft: Draft, spec: PipelineSpec, verdict: str, score: float) -> None:
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
        save_model(draft.scratch / "model.onnx", scale=score)
        write_bundle(draft.out / "bundle", {MODEL: draft.scratch / "model.onnx"}, {"recipe": draft.recipe.digest}, "<p>toy</p>")
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
