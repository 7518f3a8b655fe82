"""Watching the field: takes telemetry in, says what it is held against, and has the drift report made.

Both steps read what is not part of the chain (the telemetry folder, who serves), so their inputs are gathered here and
become part of their recipes. The inbox's record names the artifacts that are current.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineConfig, PipelineSpec
from rankd_pipeline.steps.runner import run_with_inputs
from rankd_pipeline.store.artifact import Artifact, Store
from rankd_pipeline.store.ledger import open_ledger
from rankd_pipeline.telemetry.contract import telemetry_schema
from rankd_pipeline.telemetry.inbox import Inbox, quarantined
from rankd_pipeline.telemetry.rows import windows_of
from rankd_pipeline.telemetry.windows import HOUR_S

Note = Callable[[str], None]
OWN_SHARE = 0.9
"""Share of a window's rows that a model must have decided for the window to show its normal service."""


@dataclass(frozen=True)
class Reference:
    """What the present is held against: windows of a telemetry artifact, and why these."""

    telemetry: Artifact
    windows: tuple[tuple[float, float], ...]
    why: str


def inbox_of(current: Settings, pipeline: str) -> Inbox:
    """The telemetry folder of a pipeline."""
    return Inbox(current.telemetry_dir(pipeline))


def champion_of(pipeline: str, store: Store, current: Settings) -> Artifact | None:
    """The deployment that serves, from the store."""
    entry = open_ledger(current, pipeline).champion()
    return store.get(pipeline, "deployment", entry.recipe) if entry is not None else None


def field_spec(config: PipelineConfig, store: Store, current: Settings) -> PipelineSpec:
    """The configuration that the field is watched under: the champion's own scale, seed and variant."""
    champion = champion_of(config.pipeline, store, current)
    if champion is None:
        return config.at()
    recipe = champion.manifest["recipe"]
    return config.at(recipe["scale"], recipe["seed"], recipe["variant"])


def take_telemetry(spec: PipelineSpec, store: Store, current: Settings, run_id: str | None = None, note: Note = print) -> Artifact:
    """Take in what has arrived and publish the recent part of it; the inbox's record then names the artifact.

    Raises: RankdError if there is no usable row.
    """
    function = load_function(spec.function)
    config = spec.steps.telemetry
    schema = telemetry_schema(
        function, function.corpus_config(spec.steps.corpus.simulation), spec.steps.latency_profile.budget_us
    )  # fmt: skip
    inbox = inbox_of(current, spec.pipeline)
    with store.lock(f"{spec.pipeline}-inbox", wait=note):
        intake = inbox.take(schema, time.time() + config.future_s, note)
        newest = max((taken.last_s for taken in intake.files.values()), default=0.0)
        recent = {name: taken for name, taken in intake.files.items() if taken.last_s >= newest - config.keep_hours * HOUR_S}
        if not recent:
            raise RankdError(
                f"{inbox.folder}: no usable telemetry yet ({len(intake.waiting)} files still being written, "
                f"{len(quarantined(inbox.folder))} set aside); see docs/telemetry.md, or play the field with `rankd field`."
            )
        files = {name: recent[name].sha256 for name in sorted(recent, key=lambda name: (recent[name].first_s, name))}
        artifact = run_with_inputs("telemetry", spec, {}, store, current, run_id, note, {"files": files})
        inbox.commit(intake, artifact.recipe)
    if run_id is not None:
        store.note_use(artifact, run_id)
    return artifact


def report_drift(spec: PipelineSpec, store: Store, current: Settings, run_id: str | None = None, note: Note = print) -> Artifact:
    """Judge every window of the telemetry that was taken in last; the inbox's record then names the report.

    Raises: RankdError if no telemetry was taken in.
    """
    inbox = inbox_of(current, spec.pipeline)
    telemetry = current_telemetry(spec.pipeline, store, current)
    champion = champion_of(spec.pipeline, store, current)
    reference = reference_of(spec, telemetry, champion, store, inbox)
    inputs = {"telemetry": telemetry}
    if champion is not None:
        inputs["deployment"] = champion
    if reference is not None:
        inputs["reference"] = reference.telemetry
    given: dict[str, Any] = {"reference": None if reference is None else [list(span) for span in reference.windows]}
    given["why"] = None if reference is None else reference.why
    artifact = run_with_inputs("drift_report", spec, inputs, store, current, run_id, note, given)
    inbox.note(drift_report=artifact.recipe)
    if run_id is not None:
        store.note_use(artifact, run_id)
    return artifact


def current_telemetry(pipeline: str, store: Store, current: Settings) -> Artifact:
    """The telemetry artifact that was made last. Raises: RankdError if there is none."""
    inbox = inbox_of(current, pipeline)
    recipe = inbox.record()["telemetry"]
    artifact = store.get(pipeline, "telemetry", recipe) if recipe else None
    if artifact is None:
        raise RankdError(f"{pipeline}/telemetry: none was taken in yet; materialize it, or run `rankd drift {pipeline}`.")
    return artifact


def current_report(pipeline: str, store: Store, current: Settings) -> Artifact | None:
    """The drift report that was made last, if there is one."""
    recipe = inbox_of(current, pipeline).record()["drift_report"]
    return store.get(pipeline, "drift_report", recipe) if recipe else None


def reference_of(
    spec: PipelineSpec, telemetry: Artifact, champion: Artifact | None, store: Store, inbox: Inbox
) -> Reference | None:
    """What is normal for the model that serves; None while too few windows have shown it.

    A champion that was re-distilled on telemetry has these windows as its normal. Any other one shows it in the first
    windows of its service, which the inbox's record then keeps.
    """
    if champion is not None:
        corpus = _input_of(champion, "corpus", store)
        site = (corpus.metrics.get("site") or {}) if corpus is not None else {}
        trained_on = _input_of(corpus, "telemetry", store) if corpus is not None and site else None
        if trained_on is not None:
            spans = tuple((float(start), float(end)) for start, end in site["windows"])
            return Reference(trained_on, spans, "the telemetry that the champion was re-distilled on")
    key = champion.recipe if champion is not None else ""
    kept = inbox.record().get("references", {}).get(key)
    if kept is not None:
        artifact = store.get(spec.pipeline, "telemetry", kept["telemetry"])
        if artifact is not None:
            return Reference(artifact, tuple((start, end) for start, end in kept["windows"]), kept["why"])
    return _first_windows(spec, telemetry, key, inbox)


def _first_windows(spec: PipelineSpec, telemetry: Artifact, champion: str, inbox: Inbox) -> Reference | None:
    shares = json.loads(telemetry.file("models.json").read_text())
    wanted = spec.steps.drift_report.reference_windows
    ready = [window for window in windows_of(telemetry) if window.state == "ready"]
    own = [window for window in ready if not champion or shares[window.key].get(champion, 0.0) >= OWN_SHARE]
    if len(own) < wanted:
        return None
    spans = tuple((window.start_s, window.end_s) for window in own[:wanted])
    why = f"the first {wanted} windows of the champion's service" if champion else f"the first {wanted} windows"
    known = inbox.record().get("references", {})
    entry = {"telemetry": telemetry.recipe, "windows": [list(span) for span in spans], "why": why}
    inbox.note(references={**known, champion: entry})
    return Reference(telemetry, spans, why)


def _input_of(artifact: Artifact, step: str, store: Store) -> Artifact | None:
    entry = artifact.manifest["inputs"].get(step)
    return store.get(artifact.pipeline, entry["step"], entry["recipe"]) if entry is not None else None
