"""One run summed up: the scorecard object, and the page that shows it, from whatever steps have been reached."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rankd_pipeline.errors import GateStopped
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.report.page import render_report
from rankd_pipeline.report.scorecard import TargetResult, check_targets, scorecard_json
from rankd_pipeline.spec import PipelineSpec
from rankd_pipeline.steps.chain import GATED, STEPS
from rankd_pipeline.steps.runner import recipe_of, require_passed
from rankd_pipeline.store.artifact import Artifact, Store
from rankd_pipeline.store.ledger import Entry


@dataclass(frozen=True)
class Summary:
    """The artifacts a run has reached, its scorecard (rankd report --json), its gates and what a reader must not miss."""

    artifacts: Mapping[str, Artifact]
    scorecard: dict[str, Any]
    gates: list[dict[str, Any]]
    targets: Sequence[TargetResult]
    notes: list[str]
    stopped: str | None


def reached(spec: PipelineSpec, store: Store) -> dict[str, Artifact]:
    """The stored artifacts of `spec`, in chain order, as far as the chain has come."""
    found: dict[str, Artifact] = {}
    for step, info in STEPS.items():
        if all(name in found for name in info.inputs):
            artifact = store.get(spec.pipeline, step, recipe_of(step, spec, {name: found[name] for name in info.inputs}).digest)
            if artifact is not None:
                found[step] = artifact
    return found


def summarise(spec: PipelineSpec, artifacts: Mapping[str, Artifact], entry: Entry | None = None) -> Summary:
    """Sum up a run; `entry` is the ledger's last word on its deployment."""
    metric = load_function(spec.function).metric
    metrics = {step: dict(artifact.metrics) for step, artifact in artifacts.items()}
    if "latency_profile" in metrics:  # of several students, the report is about the one that the race chose
        chosen = metrics["latency_profile"]["candidate"]
        for step in ("student", "quantized_onnx"):
            metrics[step].update(metrics[step]["candidates"][chosen])
    if "deployment" in artifacts and entry is not None:
        alias = "champion" if entry.event == "champion" else None
        metrics["deployment"].update(version=entry.version, alias=alias, bundle=entry.bundle)
    scorecard = scorecard_json(
        spec.function,
        spec.scale,
        {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better},
        metrics,
        {step: artifacts[step].observed.get("seconds") if step in artifacts else None for step in STEPS},
    )
    gates = [gate for step in GATED if step in artifacts for gate in artifacts[step].metrics.get("gates", [])]
    targets = check_targets(scorecard, spec.targets, _scores(artifacts))
    return Summary(artifacts, scorecard, gates, targets, _notes(spec, artifacts, entry), _stopped(spec, artifacts))


SCORED = {
    "calibration_scorecard": "Teacher and baselines",
    "student": "Student",
    "quantized_onnx": "Deployable files",
    "deployment": "What is shipped",
}
"""Steps that leave a table of scores, and how it is called."""


def _scores(artifacts: Mapping[str, Artifact]) -> dict[str, dict[str, float]]:
    """``MODEL@SPLIT`` -> metric -> value over every step's table."""
    found: dict[str, dict[str, float]] = {}
    for step in SCORED:
        for row in _score_rows(artifacts, step):
            found.setdefault(f"{row['model']}@{row['split']}", {})[row["metric"]] = row["value"]
    return found


def _score_rows(artifacts: Mapping[str, Artifact], step: str) -> list[dict[str, Any]]:
    if step not in artifacts or not (artifacts[step].path / "scores.json").exists():
        return []
    return json.loads(artifacts[step].file("scores.json").read_text())


def tables_of(artifacts: Mapping[str, Artifact]) -> dict[str, pd.DataFrame]:
    """The tables of a report: scores of every model on every split, and the race."""
    tables = {}
    for step, title in SCORED.items():
        rows = _score_rows(artifacts, step)
        if rows:
            wide = pd.DataFrame(rows).pivot_table(index=["split", "model"], columns="metric", values="value", sort=False)
            tables[title] = wide.reset_index()
    if "latency_profile" in artifacts:
        tables["The race (us)"] = pd.DataFrame(
            [
                {"runtime": item["runtime"], "verdict": item["verdict"], "note": item["reason"] or "", **_tail(item)}
                for item in artifacts["latency_profile"].metrics["candidates"]
            ]
        )
        late = artifacts["latency_profile"].metrics.get("deadlines", [])
        if late:
            tables["Is the answer in time? (paced p99.9, one sample)"] = pd.DataFrame(
                [
                    {"case": item["name"], "deadline (us)": item["deadline_us"], "in time": "LATE" if item["late"] else "yes"}
                    for item in late
                ]
            )
    return tables


def figures_of(artifacts: Mapping[str, Artifact]) -> dict[str, bytes]:
    """Every picture of the chain by name, in chain order."""
    return {
        path.stem: path.read_bytes()
        for step in STEPS
        if step in artifacts
        for path in sorted((artifacts[step].path / "figures").glob("*.png"))
    }


def write_report(summary: Summary, path: Path) -> Path:
    """Write the page of a run; the file appears whole."""
    page = render_report(
        summary.scorecard, figures_of(summary.artifacts), tables_of(summary.artifacts), summary.notes, summary.gates,
        summary.targets,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page)
    temporary.replace(path)
    return path


def _tail(item: Mapping[str, Any]) -> dict[str, Any]:
    paced, back = item["paced"] or {}, item["back_to_back"] or {}
    return {
        "paced p50": paced.get("p50_us"),
        "paced p99.9": paced.get("p999_us"),
        "paced max": paced.get("max_us"),
        "back to back p50": back.get("p50_us"),
        "control p99.9": item["control_p999_us"],
    }


def _notes(spec: PipelineSpec, artifacts: Mapping[str, Artifact], entry: Entry | None) -> list[str]:
    notes = []
    if not spec.enforced:
        notes.append(f"{spec.scale} scale: gates are shown, not enforced; the bundle is not deployable.")
    stopped = _stopped(spec, artifacts)
    if stopped:
        notes.append(f"Stopped: {stopped}")
    card = artifacts.get("calibration_scorecard")
    if card is not None and card.metrics["nothing_to_teach"]:
        notes.append("The teacher has nothing to teach: it does not beat " + ", ".join(card.metrics["unbeaten"]) + ".")
    if card is not None and card.metrics.get("better_references"):
        names = ", ".join(card.metrics["better_references"])
        notes.append(f"Better than the teacher, with more than it is given: {names}.")
    student = artifacts.get("student")
    if student is not None and student.metrics["verdict"] == "KD not useful":
        notes.append("KD not useful: distillation is not proven better than training from scratch on the labels.")
    if student is not None and student.metrics["arm"] != "distilled":
        notes.append("The student trained from scratch goes on: it was better on validation than the distilled one.")
    latency = artifacts.get("latency_profile")
    if latency is not None and latency.metrics["verdict"] == "inconclusive":
        notes.append(f"Latency unproven on this host: {latency.metrics['why']}.")
    if entry is not None:
        notes.append(f"Version {entry.version}: {entry.event} ({entry.reason}).")
    return notes


def _stopped(spec: PipelineSpec, artifacts: Mapping[str, Artifact]) -> str | None:
    """Why the chain cannot go past a gate it has reached, or None."""
    for step in GATED:
        if step in artifacts:
            try:
                require_passed(artifacts[step], spec.enforced)
            except GateStopped as error:
                return str(error)
    return None
