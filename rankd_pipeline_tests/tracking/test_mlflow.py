"""MLflow mirrors the store and the ledger: once per recipe, byte for byte, and never in the way of a training."""

import hashlib
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from rankd_pipeline.orchestration.setup import initialise
from rankd_pipeline.settings import Settings, settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.runner import open_store
from rankd_pipeline.store.artifact import Artifact
from rankd_pipeline.store.ledger import Entry
from rankd_pipeline.tracking.mlflow import BUNDLE_MODEL, RECIPE_TAG, TRACKED, Tracked, Tracker
from rankd_pipeline_tests.orchestration.planted import HISTORY, plant

PIPELINE = "beam_management"
SPEC = load_pipeline(PIPELINE).at("laptop")


@pytest.fixture
def tracker(home: Settings) -> Tracker:
    return Tracker(home.mlflow_uri, home.mlflow_dir)


@pytest.fixture
def client(home: Settings) -> MlflowClient:
    return MlflowClient(tracking_uri=home.mlflow_uri, registry_uri=home.mlflow_uri)


def track(tracker: Tracker, artifact: Artifact) -> Tracked:
    tracked = tracker.track(artifact, "dagster-run", f"{PIPELINE}/{artifact.step}")
    assert tracked is not None and tracked.problem == "", tracked
    return tracked


def runs(client: MlflowClient) -> list:
    experiment = client.get_experiment_by_name(PIPELINE)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def forget(home: Settings) -> Tracker:
    """A tracker that remembers nothing of its own, as after a kill before it could note what it did."""
    for path in (home.mlflow_dir / "tracked").rglob("*.json"):
        path.unlink()
    return Tracker(home.mlflow_uri, home.mlflow_dir)


def test_one_run_per_trained_model_with_all_that_leads_back(home: Settings, tracker: Tracker, client: MlflowClient) -> None:
    made = plant(SPEC, home)
    for artifact in made.values():
        tracker.track(artifact, "dagster-run", f"{PIPELINE}/{artifact.step}")
    found = {run.data.tags["rankd.step"]: run for run in runs(client)}
    assert set(found) == set(TRACKED)
    teacher = found["teacher"]
    assert teacher.info.status == "FINISHED"
    wanted = {RECIPE_TAG: made["teacher"].recipe, "rankd.version": made["teacher"].version, "rankd.scale": "laptop"}
    wanted |= {"rankd.seed": "0", "rankd.variant": "default", "dagster.run_id": "dagster-run"}
    wanted |= {"dagster.asset_key": "beam_management/teacher", "rankd.input.corpus": made["corpus"].recipe}
    assert {name: teacher.data.tags[name] for name in wanted} == wanted
    assert teacher.data.params["network.width"] == str(SPEC.steps.teacher.network["width"])
    assert teacher.data.metrics["params"] == 1234
    assert teacher.data.metrics["scores.teacher.top1"] == 0.71
    curve = client.get_metric_history(teacher.info.run_id, "epoch.validation")
    assert [(point.step, point.value) for point in curve] == [(row["epoch"], row["validation"]) for row in HISTORY]
    location = client.get_experiment_by_name(PIPELINE).artifact_location
    assert location == (home.mlflow_dir / "artifacts" / PIPELINE).as_uri()


def test_a_rerun_adds_nothing_and_needs_no_mlflow(home: Settings, tracker: Tracker, client: MlflowClient) -> None:
    teacher = plant(SPEC, home, upto="teacher")["teacher"]
    first = track(tracker, teacher)
    started = time.perf_counter()
    assert track(Tracker(home.mlflow_uri, home.mlflow_dir), teacher) == first
    assert time.perf_counter() - started < 0.05
    assert len(runs(client)) == 1


@pytest.mark.parametrize("step", ["teacher", "deployment"])
def test_a_kill_at_any_point_leaves_one_whole_run(home: Settings, client: MlflowClient, step: str) -> None:
    """What was logged before the kill is found again by its recipe, finished, and not written twice."""
    artifact = plant(SPEC, home)[step]
    first = track(forget(home), artifact)
    client.update_run(first.run_id, status="RUNNING")
    assert track(forget(home), artifact) == first
    (run,) = runs(client)
    assert run.info.status == "FINISHED"
    if step == "teacher":
        assert len(client.get_metric_history(run.info.run_id, "epoch.train")) == len(HISTORY)
    else:
        assert len(client.search_model_versions(f"name = '{PIPELINE}'")) == 1


def _track_in_child(_: int) -> str:
    current = settings()
    (teacher,) = open_store(current).artifacts(PIPELINE, "teacher")
    return track(Tracker(current.mlflow_uri, current.mlflow_dir), teacher).run_id


def test_two_processes_at_once_make_one_run(home: Settings, client: MlflowClient) -> None:
    plant(SPEC, home, upto="teacher")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(_track_in_child, range(2)))) == 1
    assert len(runs(client)) == 1


def test_the_registered_model_is_the_bundle_s_file(home: Settings, tracker: Tracker, client: MlflowClient, tmp_path: Path) -> None:
    import mlflow

    deployment = plant(SPEC, home, score=0.5)["deployment"]
    tracked = track(tracker, deployment)
    assert tracked.model_version == "1"
    version = client.get_model_version(PIPELINE, "1")
    assert version.run_id == tracked.run_id
    assert version.tags[RECIPE_TAG] == deployment.recipe and version.tags["dagster.asset_key"] == f"{PIPELINE}/deployment"
    mlflow.set_tracking_uri(home.mlflow_uri)
    mlflow.set_registry_uri(home.mlflow_uri)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{PIPELINE}/1", dst_path=str(tmp_path / "got")))
    shipped, registered = (path.read_bytes() for path in (deployment.file(BUNDLE_MODEL), folder / "model.onnx"))
    assert hashlib.sha256(registered).digest() == hashlib.sha256(shipped).digest()
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    predicted = mlflow.pyfunc.load_model(f"models:/{PIPELINE}/1").predict({"x": x})
    np.testing.assert_allclose(predicted["y"], 0.5 * x)


def entry(artifact: Artifact, version: int) -> Entry:
    return Entry("champion", version, artifact.recipe, "", "laptop", 0.5, "test", "", None, 0.0)


def test_aliases_follow_the_ledger(home: Settings, tracker: Tracker, client: MlflowClient) -> None:
    old = plant(SPEC, home, score=0.5)["deployment"]
    new = plant(load_pipeline(PIPELINE).at("laptop", seed=1), home, score=0.6)["deployment"]
    for artifact in (old, new):
        track(tracker, artifact)

    def aliases() -> dict[str, str]:
        return {alias: str(version) for alias, version in client.get_registered_model(PIPELINE).aliases.items()}

    assert tracker.mirror(PIPELINE, entry(old, 1), None) == ""
    assert aliases() == {"champion": "1"}
    assert tracker.mirror(PIPELINE, entry(old, 1), entry(new, 2)) == ""
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert tracker.mirror(PIPELINE, entry(new, 2), None) == ""
    assert aliases() == {"champion": "2"}


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "http://user:hunter2@127.0.0.1:9/x"])
def test_a_server_that_is_down_costs_seconds_and_a_sentence(home: Settings, uri: str) -> None:
    teacher = plant(SPEC, home, upto="teacher")["teacher"]
    started = time.perf_counter()
    tracked = Tracker(uri, home.mlflow_dir).track(teacher, "r", "k")
    assert time.perf_counter() - started < 5
    assert tracked is not None and "127.0.0.1:9" in tracked.problem and "hunter2" not in tracked.problem
    assert Tracker(uri, home.mlflow_dir).mirror(PIPELINE, entry(teacher, 1), None) != ""


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers: worse than down."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_hangs_is_given_up(home: Settings, silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    teacher = plant(SPEC, home, upto="teacher")["teacher"]
    started = time.perf_counter()
    tracked = Tracker(silent_server, home.mlflow_dir).track(teacher, "r", "k")
    assert tracked is not None and tracked.problem
    assert time.perf_counter() - started < 30


def test_what_could_not_be_tracked_is_tracked_by_the_next_run(home: Settings, tracker: Tracker, client: MlflowClient) -> None:
    teacher = plant(SPEC, home, upto="teacher")["teacher"]
    down = Tracker("http://127.0.0.1:9", home.mlflow_dir).track(teacher, "r", "k")
    assert down is not None and down.problem
    assert track(tracker, teacher).run_id == runs(client)[0].info.run_id


def test_a_lost_database_is_made_and_filled_again(home: Settings, tracker: Tracker) -> None:
    teacher = plant(SPEC, home, upto="teacher")["teacher"]
    first = track(tracker, teacher)
    Path(home.mlflow_uri.removeprefix("sqlite:///")).unlink()
    assert initialise(home) is True
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # this process still holds the lost file open
        assert pool.map(_track_in_child, [0]) != [first.run_id]


def test_a_skipped_step_and_data_are_no_runs(home: Settings, tracker: Tracker, client: MlflowClient) -> None:
    made = plant(SPEC, home, upto="oracle_labels")
    assert tracker.track(made["corpus"], "r", "k") is None
    skipped = Artifact(made["ssl_weights"].path, {**made["ssl_weights"].manifest, "skipped": "labels are plenty"})
    assert tracker.track(skipped, "r", "k") is None
    assert runs(client) == []
