"""The real chain at smoke scale through Dagster, made once for the session with outbound connections refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from mlflow import MlflowClient

import rankd_pipeline_tests
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.chain import CHAIN, GATED
from rankd_pipeline.steps.runner import open_store, resolve
from rankd_pipeline.store.artifact import Artifact
from rankd_pipeline.tracking.mlflow import BUNDLE_MODEL, RECIPE_TAG, TRACKED

PIPELINE = "beam_management"


@pytest.fixture
def instance(smoke_chain: Settings, monkeypatch: pytest.MonkeyPatch) -> dg.DagsterInstance:
    monkeypatch.setenv("RANKD_HOME", str(smoke_chain.home))
    monkeypatch.setenv("DAGSTER_HOME", str(smoke_chain.dagster_home))
    return dg.DagsterInstance.get()


def made(current: Settings) -> dict[str, Artifact]:
    spec, store = load_pipeline(PIPELINE).at("smoke"), open_store(current)
    found = {info.name: resolve(info.name, spec, store) for info in CHAIN}
    return {step: artifact for step, artifact in found.items() if artifact is not None}


def test_nothing_tried_to_leave_this_machine(smoke_chain: Settings, tmp_path: Path) -> None:
    log = smoke_chain.home / "connections.log"
    assert not log.exists(), log.read_text()
    # the guard is no placebo: the same guard notes and refuses what does try
    guard = Path(rankd_pipeline_tests.__file__).parent / "no_network"
    environment = {**os.environ, "PYTHONPATH": str(guard), "RANKD_TEST_CONNECTIONS": str(tmp_path / "log")}
    for code in (
        "import socket; socket.create_connection(('192.0.2.1', 80))",
        "import urllib.request as r; r.urlopen('http://example.org')",
    ):
        assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode != 0
    assert [line.split()[1:] for line in (tmp_path / "log").read_text().splitlines()] == [
        ["look-up", "192.0.2.1"],
        ["look-up", "example.org"],
    ]
    assert socket.gethostname()


def test_every_asset_is_materialized_with_its_artifact_s_version(smoke_chain: Settings, instance: dg.DagsterInstance) -> None:
    artifacts = made(smoke_chain)
    assert set(artifacts) == {info.name for info in CHAIN}
    for step, artifact in artifacts.items():
        event = instance.get_latest_materialization_event(dg.AssetKey([PIPELINE, step]))
        assert event is not None and event.asset_materialization is not None
        tags = event.asset_materialization.tags or {}
        assert tags["dagster/data_version"] == artifact.version and tags["rankd/recipe"] == artifact.recipe


def test_gates_are_shown_at_smoke_and_stop_nothing(smoke_chain: Settings, instance: dg.DagsterInstance) -> None:
    for step in GATED:
        key = dg.AssetCheckKey(dg.AssetKey([PIPELINE, step]), "gates")
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
        assert record.event is not None and record.event.dagster_event is not None
        check = record.event.dagster_event.asset_check_evaluation_data
        assert check.severity == dg.AssetCheckSeverity.WARN
        assert check.metadata["enforced"].value is False
        assert check.metadata["verdict"].value in ("pass", "fail", "inconclusive")


def test_what_a_person_wants_to_see_is_in_the_metadata(smoke_chain: Settings, instance: dg.DagsterInstance) -> None:
    def metadata(step: str) -> dict:
        event = instance.get_latest_materialization_event(dg.AssetKey([PIPELINE, step]))
        assert event is not None and event.asset_materialization is not None
        return dict(event.asset_materialization.metadata)

    card = metadata("calibration_scorecard")
    assert card["gates"].records
    pictures = [name for name in card if name.startswith("figure_")]
    assert pictures and all(card[name].value.startswith("![") for name in pictures)
    assert metadata("teacher")["metric_params"].value > 0
    assert metadata("teacher")["mlflow_run"].value.startswith("http://127.0.0.1:5000/#/experiments/")
    assert metadata("deployment")["mlflow_model_version"].value == "1"
    assert metadata("audit_report")["report"].value.endswith("report.html")


def test_mlflow_has_one_run_per_model_and_the_shipped_file(smoke_chain: Settings) -> None:
    artifacts = made(smoke_chain)
    client = MlflowClient(tracking_uri=smoke_chain.mlflow_uri, registry_uri=smoke_chain.mlflow_uri)
    experiment = client.get_experiment_by_name(PIPELINE)
    assert experiment is not None
    runs = {run.data.tags["rankd.step"]: run for run in client.search_runs([experiment.experiment_id])}
    expected = {step for step in TRACKED if artifacts[step].skipped is None}
    assert set(runs) == expected
    for step in expected:
        assert runs[step].info.status == "FINISHED"
        assert runs[step].data.tags[RECIPE_TAG] == artifacts[step].recipe
    epochs = json.loads((artifacts["teacher"].path / "history.json").read_text())
    assert len(client.get_metric_history(runs["teacher"].info.run_id, "epoch.lr")) == len(epochs)
    (version,) = client.search_model_versions(f"name = '{PIPELINE}'")
    assert version.tags["dagster.run_id"] == artifacts["deployment"].observed["run_id"]
    model = Path(str(version.source).removeprefix("file://")) / "model.onnx"
    assert model.read_bytes() == artifacts["deployment"].file(BUNDLE_MODEL).read_bytes()
    assert not client.get_registered_model(PIPELINE).aliases, "smoke takes no alias"
