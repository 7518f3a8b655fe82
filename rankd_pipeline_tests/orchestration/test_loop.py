"""The loop under the real daemon, over HTTP: materialized, watched, re-distilled, cut off by a power cut, promoted, walked back."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankd_pipeline.orchestration.field import SITE_TAG, WHY_TAG
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.runtime.bundle import MODEL, load_bundle
from rankd_pipeline.runtime.onnx_export import export_onnx
from rankd_pipeline.settings import Settings, settings
from rankd_pipeline.spec import PipelineSpec, load_pipeline
from rankd_pipeline.steps.runner import inputs_of, open_store, recipe_of
from rankd_pipeline.steps.triggers import drift_tick
from rankd_pipeline.store.artifact import Artifact
from rankd_pipeline.store.ledger import open_ledger
from rankd_pipeline_tests.orchestration.planted import plant, plant_redistilled, plant_shadow_run
from rankd_pipeline_tests.orchestration.servers import PIPELINE, REPOSITORY, Servers
from rankd_pipeline_tests.telemetry.made import columns, write

CONFIG = load_pipeline(PIPELINE)
SWITCH_SENSOR = """
mutation Switch($selector: SensorSelector!) {
  startSensor(sensorSelector: $selector) { __typename ... on PythonError { message } }
}"""
SENSOR = """
query Sensor($selector: SensorSelector!) {
  sensorOrError(sensorSelector: $selector) {
    ... on Sensor { sensorState { status ticks(limit: 50) { status skipReason runIds error { message } } } }
  }
}"""
SWITCH_SCHEDULE = """
mutation Switch($selector: ScheduleSelector!) {
  startSchedule(scheduleSelector: $selector) { __typename ... on PythonError { message } }
}"""
SCHEDULE = """
query Schedule($selector: ScheduleSelector!) {
  scheduleOrError(scheduleSelector: $selector) {
    ... on Schedule { cronSchedule executionTimezone scheduleState { status } futureTicks(limit: 1) { results { timestamp } } }
  }
}"""
DRY_RUN = """
mutation Try($selector: ScheduleSelector!, $timestamp: Float) {
  scheduleDryRun(selectorData: $selector, timestamp: $timestamp) {
    ... on DryRunInstigationTick { evaluationResult { skipReason error { message } runRequests { tags { key value } } } }
  }
}"""
RUNS = """
query Runs($job: String!) {
  runsOrError(filter: {pipelineName: $job}) { ... on Runs { results { runId status tags { key value } } } }
}"""
NODES = """
query Nodes($keys: [AssetKeyInput!]) {
  assetNodes(assetKeys: $keys) {
    assetKey { path }
    dependencyKeys { path }
    assetMaterializations(limit: 1) {
      runId
      tags { key value }
      metadataEntries { label ... on IntMetadataEntry { intValue } ... on PipelineRunMetadataEntry { runId } }
    }
  }
}"""
POOLS = "{ instance { concurrencyLimits { concurrencyKey activeSlotCount pendingStepCount } } }"


@pytest.fixture
def planted(home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Settings, Artifact, Path]:
    """A home with a planted chain whose bundle really decides; MLflow is down (nobody listens on the discard port)."""
    monkeypatch.setenv("RANKD_MLFLOW_URI", "http://127.0.0.1:9")
    model = tmp_path / MODEL
    untrained_student(model)
    return settings(), plant(CONFIG.at(), home, model=model)["deployment"], model


def untrained_student(path: Path) -> None:
    """The exported graph of a student, as a base station runs it."""
    import torch

    function, steps = load_function(PIPELINE), CONFIG.at().steps
    cfg = function.corpus_config(steps.corpus.simulation)
    torch.manual_seed(0)
    network = function.student(cfg, steps.student.network)
    function.set_statistics(network, function.model_inputs(columns(1000)))
    export_onnx(function.deployable(network, {"temperature": 1.0}), function.signatures(cfg, 100.0)[0], path, {})


@pytest.fixture
def servers(planted: tuple[Settings, Artifact, Path], tmp_path: Path) -> Iterator[list[Servers]]:
    """The servers that run; the last one is the present one."""
    started = [Servers(planted[0], tmp_path / "ui.log")]
    try:
        yield started
    finally:
        started[-1].stop()


def play(home: Settings, champion: Artifact, hour: int, rows: int, labelled: float, broken: bool = False) -> None:
    """An hour of a field made by hand and decided by the champion's bundle."""
    made = columns(rows, hour, labelled, model=np.full(rows, champion.recipe, dtype=object))
    if broken:
        made["l1_rsrp_dbm"][:, 0, 7] -= 12
    function, bundle = load_function(PIPELINE), load_bundle(champion.file("bundle"))
    output = function.deployed_predictor(bundle, bundle.signature)(made)
    made.update(output=output, confidence=output.max(axis=1))
    write(home.telemetry_dir(PIPELINE), f"hour{hour:03d}.parquet", made)


def switch_on(server: Servers, name: str) -> None:
    answer = server.graphql(SWITCH_SENSOR, selector={**REPOSITORY, "sensorName": name})["startSensor"]
    assert answer["__typename"] == "Sensor", answer


def ticks(server: Servers, name: str) -> list[dict[str, Any]]:
    found = server.graphql(SENSOR, selector={**REPOSITORY, "sensorName": name})["sensorOrError"]["sensorState"]
    assert found["status"] == "RUNNING"
    return found["ticks"]


def started_by(server: Servers, name: str) -> str:
    """The run that a sensor starts."""

    def run() -> str:
        return next((tick["runIds"][0] for tick in ticks(server, name) if tick["runIds"]), "")

    return server.until(run, 120)


def redistillations(server: Servers) -> dict[str, Mapping[str, Any]]:
    found = server.graphql(RUNS, job=f"{PIPELINE}_redistill")["runsOrError"]["results"]
    return {run["runId"]: {**run, "tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in found}


def nodes(server: Servers, names: list[str]) -> dict[str, Any]:
    found = server.graphql(NODES, keys=[{"path": [PIPELINE, name]} for name in names])["assetNodes"]
    return {node["assetKey"]["path"][-1]: node for node in found}


def walk_back(server: Servers) -> dict[str, Any]:
    """Every asset on the way from the champion up, with its newest materialization, as one clicks through the graph."""
    seen: dict[str, Any] = {}
    waiting = ["champion"]
    while waiting:
        found = nodes(server, waiting)
        seen |= found
        above = {key["path"][-1] for node in found.values() for key in node["dependencyKeys"]}
        waiting = sorted(above - set(seen))
    return seen


@pytest.mark.xdist_group("servers")
def test_the_loop_over_http_and_through_a_power_cut(
    planted: tuple[Settings, Artifact, Path], servers: list[Servers], tmp_path: Path
) -> None:
    """One test, because starting the daemon is what costs."""
    home, first, model = planted
    server, store, ledger = servers[0], open_store(home), open_ledger(home, PIPELINE)

    # the whole chain from the UI: the first champion
    assert server.ended(server.start(PIPELINE, "laptop")) == "SUCCESS"
    assert [entry.event for entry in ledger.entries()] == ["registered", "champion"]

    # one asset alone, before anything came back from the field: a clear word, no traceback, and it is not tried again
    alone = server.start(f"{PIPELINE}_drift", "laptop", ["telemetry"])
    assert server.ended(alone) == "FAILURE"

    # telemetry comes, rubbish with it; the sensor sees it and has the field judged
    for hour in range(5):
        play(home, first, hour, 1000, 0.2)
    play(home, first, 5, 2500, 1.0, broken=True)
    (home.telemetry_dir(PIPELINE) / "notes.parquet").write_bytes(b"PAR1 this is not telemetry PAR1")
    switch_on(server, f"{PIPELINE}_telemetry")
    assert server.ended(started_by(server, f"{PIPELINE}_telemetry")) == "SUCCESS"
    assert (home.telemetry_dir(PIPELINE) / ".quarantine" / "notes.parquet.reason.txt").is_file()

    # the nightly can be tried and switched on in the UI
    selector = {**REPOSITORY, "scheduleName": f"{PIPELINE}_nightly"}
    tried = server.graphql(DRY_RUN, selector=selector, timestamp=time.time())["scheduleDryRun"]["evaluationResult"]
    assert tried["error"] is None
    (request,) = tried["runRequests"]
    assert {tag["key"]: tag["value"] for tag in request["tags"]}[WHY_TAG] == "nightly"
    assert server.graphql(SWITCH_SCHEDULE, selector=selector)["startSchedule"]["__typename"] == "ScheduleStateResult"
    schedule = server.graphql(SCHEDULE, selector=selector)["scheduleOrError"]
    assert schedule["scheduleState"]["status"] == "RUNNING" and schedule["futureTicks"]["results"][0]["timestamp"] > time.time()

    # the drift sensor starts a re-distillation, which is held up in the teacher; a second one by hand waits in the queue
    tick = drift_tick(CONFIG, store, home, None, None, [], time.time())
    assert tick.start and tick.site is not None, tick.why
    again = CONFIG.at(site=tick.site)
    second = plant_redistilled(again, home, model=model)
    plant_shadow_run(again, home, first, reason="better: planted")
    with store.lock(_lock_of_teacher(again, home)):
        switch_on(server, f"{PIPELINE}_drift")
        killed = started_by(server, f"{PIPELINE}_drift")
        by_hand = server.start(f"{PIPELINE}_redistill", "laptop", tags={SITE_TAG: tick.site.model_dump_json(), WHY_TAG: "by hand"})
        server.until(lambda: server.status(killed) == "STARTED" and _materialized(server, "corpus", killed), 90)
        assert server.status(by_hand) == "QUEUED"

        # a power cut
        server.kill()
    assert ledger.entries()[-1].event == "champion" and len(ledger.entries()) == 2, "nothing is half promoted"
    server = Servers(home, tmp_path / "again.log")
    servers.append(server)
    assert server.status(killed) == "FAILURE" and "1 run(s) as failed whose process is gone" in server.log.read_text()
    assert server.ended(by_hand) == "SUCCESS"
    (retry,) = server.until(lambda: [run for run in redistillations(server) if run not in (killed, by_hand)], 60)
    assert server.ended(retry) == "SUCCESS"
    events = [(entry.event, entry.version) for entry in ledger.entries()]
    assert events == [("registered", 1), ("champion", 1), ("registered", 2), ("champion", 2)], "decided once"
    assert all(not limit["activeSlotCount"] and not limit["pendingStepCount"] for limit in _pools(server)), "pools are free"

    # the sensor goes on, and says why it starts nothing more
    server.until(lambda: "judged for another champion" in str(ticks(server, f"{PIPELINE}_drift")[0]["skipReason"]), 90)

    # from the champion back to the corpus, and to the window of telemetry that caused it
    seen = walk_back(server)
    assert {"champion", "shadow_run", "deployment", "student", "teacher", "corpus", "telemetry"} <= set(seen)
    (champion,) = seen["champion"]["assetMaterializations"]
    entries = {entry["label"]: entry for entry in champion["metadataEntries"]}
    assert entries["version"]["intValue"] == 2
    tags = redistillations(server)[entries["made_by"]["runId"]]["tags"]
    assert json.loads(tags[SITE_TAG])["windows"] == [list(window) for window in tick.site.windows]
    shown = {name: _tag(seen[name], "rankd/recipe") for name in ("deployment", "corpus", "telemetry")}
    assert shown == {**{name: second[name].recipe for name in ("deployment", "corpus")}, "telemetry": tick.site.telemetry}


def _lock_of_teacher(spec: PipelineSpec, home: Settings) -> str:
    store = open_store(home)
    return f"{PIPELINE}-teacher-{recipe_of('teacher', spec, inputs_of('teacher', spec, store)).digest}"


def _materialized(server: Servers, step: str, run_id: str) -> bool:
    """Whether a run has come past a step."""
    made = nodes(server, [step])[step]["assetMaterializations"]
    return bool(made) and made[0]["runId"] == run_id


def _tag(node: Mapping[str, Any], key: str) -> str:
    return {tag["key"]: tag["value"] for tag in node["assetMaterializations"][0]["tags"]}[key]


def _pools(server: Servers) -> list[dict[str, Any]]:
    return server.graphql(POOLS)["instance"]["concurrencyLimits"]
