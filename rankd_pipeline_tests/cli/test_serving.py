"""`rankd history` and `rankd rollback` on planted versions: with Dagster and MLflow up, down, and back again."""

import json

import dagster as dg
import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from rankd_pipeline.cli import rankd
from rankd_pipeline.errors import ArtifactDamaged, RankdError
from rankd_pipeline.orchestration.mirrors import LINE_TAG, reconcile
from rankd_pipeline.runtime.bundle import verify_bundle
from rankd_pipeline.settings import Settings, settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.store.ledger import open_ledger
from rankd_pipeline.tracking.mlflow import Tracker
from rankd_pipeline_tests.orchestration.planted import plant

PIPELINE = "beam_management"
CHAMPION = dg.AssetKey([PIPELINE, "champion"])


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(rankd, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def two(home: Settings) -> Settings:
    """Version 1 served, version 2 serves, a third was refused."""
    ledger = open_ledger(home, PIPELINE)
    for seed, event in ((0, "champion"), (1, "champion"), (2, "refused")):
        artifact = plant(load_pipeline(PIPELINE).at("laptop", seed), home, score=0.6 + seed / 100)["deployment"]
        score = artifact.metrics["score"]
        entry = ledger.register(artifact.recipe, str(artifact.path / "bundle"), "laptop", score, "t", None)
        ledger.decide(entry, event, f"because {seed}", verify_bundle)
    return home


def test_history_tells_who_served_and_who_was_refused(two: Settings) -> None:
    text = call("history", PIPELINE).output
    rows = [line.split() for line in text.splitlines() if line.startswith(("v1", "v2", "v3"))]
    assert [row[:2] for row in rows] == [["v1", "served"], ["v2", "served"], ["v3", "refused"]]
    assert "now" in text.splitlines()[2] and "because 2" in text and "pending: MLflow alias" in text
    document = json.loads(call("history", PIPELINE, "--json").output)
    assert [line["event"] for line in document["entries"]].count("champion") == 2
    assert set(document["pending"]) == {"MLflow alias", "Dagster asset"}


def test_a_clock_that_was_set_back_is_told(two: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankd_pipeline.store.ledger.time.time", lambda: 1_000_000_000.0)
    open_ledger(two, PIPELINE).roll_back(None, "")
    text = call("history", PIPELINE).output
    assert "clock was set back" in text and text.splitlines()[-4].startswith("v1") and "served (rollback)" in text


def test_rollback_with_everything_up_leaves_nothing_pending(two: Settings) -> None:
    text = call("rollback", PIPELINE, "--why", "too many misses").output
    assert "v1 serves, v2 does not any more" in text and "pending" not in text
    client = MlflowClient(tracking_uri=two.mlflow_uri, registry_uri=two.mlflow_uri)
    serving = client.get_model_version_by_alias(PIPELINE, "champion")
    champion = open_ledger(two, PIPELINE).champion()
    assert champion is not None and serving.tags["rankd.recipe"] == champion.recipe
    assert "rolled back from v2: too many misses" in call("history", PIPELINE).output
    with dg.DagsterInstance.from_config(str(two.dagster_home)) as instance:
        event = instance.get_latest_materialization_event(CHAMPION)
    assert event is not None and event.asset_materialization is not None
    assert event.asset_materialization.metadata["version"].value == 1


def test_rollback_works_with_both_down_and_the_mirrors_follow_later(two: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = two.dagster_home / "dagster.yaml"
    text = broken.read_text()
    broken.write_text("storage: {postgres: 1}\n")
    monkeypatch.setenv("RANKD_MLFLOW_URI", "http://127.0.0.1:9")
    output = call("rollback", PIPELINE).output
    assert output.count("pending:") == 2 and "v1 serves" in output
    assert (two.serving_dir / PIPELINE / "bundle" / "model.onnx").is_file()
    broken.write_text(text)
    monkeypatch.delenv("RANKD_MLFLOW_URI")
    current = settings()
    tracker = Tracker(current.mlflow_uri, current.mlflow_dir)
    reported: list[dg.AssetMaterialization] = []
    with dg.DagsterInstance.from_config(str(two.dagster_home)) as instance:

        def report(event: dg.AssetMaterialization) -> None:
            reported.append(event)
            instance.report_runless_asset_event(event)

        assert reconcile(PIPELINE, current, tracker, instance, report) == {}
        assert reconcile(PIPELINE, current, tracker, instance, report) == {}
    ledger = open_ledger(two, PIPELINE)
    assert [event.tags[LINE_TAG] for event in reported if event.tags] == [str(ledger.serving_line())], "told once"
    assert ledger.pending() == {} and "pending" not in call("history", PIPELINE).output


def test_a_damaged_earlier_bundle_is_not_put_back(two: Settings) -> None:
    ledger = open_ledger(two, PIPELINE)
    (old,) = ledger.states.glob("bundles/v0001-*/model.onnx")
    old.write_bytes(old.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactDamaged, match="was changed"):
        CliRunner().invoke(rankd, ["rollback", PIPELINE], catch_exceptions=False)
    champion = ledger.champion()
    assert champion is not None and champion.version == 2


def test_an_unknown_function_and_version_are_one_sentence(two: Settings) -> None:
    with pytest.raises(RankdError, match="expected one of"):
        CliRunner().invoke(rankd, ["history", "nope"], catch_exceptions=False)
    with pytest.raises(RankdError, match="version 3 has not served"):
        CliRunner().invoke(rankd, ["rollback", PIPELINE, "--to", "3"], catch_exceptions=False)
