"""Planted chains through Dagster, in this process: verdicts, versions, metadata, what runs after what."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from rankd_pipeline.orchestration.assets import build_pipeline
from rankd_pipeline.orchestration.execute import run_config
from rankd_pipeline.orchestration.metadata import MAX_PICTURE_BYTES, step_metadata
from rankd_pipeline.orchestration.resources import MlflowTracking, RankdRun
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineSpec, load_pipeline
from rankd_pipeline.steps.chain import CHAIN, GATED
from rankd_pipeline.steps.runner import open_store
from rankd_pipeline.store.ledger import open_ledger
from rankd_pipeline_tests.orchestration.planted import PNG, plant

NO_MLFLOW = "http://127.0.0.1:9"
"""Nobody listens on the discard port: MLflow is down, which no test here minds."""


def spec(scale: str = "laptop") -> PipelineSpec:
    return load_pipeline("beam_management").at(scale)


def run(scale: str = "laptop", steps: tuple[str, ...] = (), variant: str = "default", instance: Any = None) -> Any:
    """The job in this process, MLflow down."""
    definitions = dg.Definitions.merge(build_pipeline(load_pipeline("beam_management")), _resources())
    job = definitions.resolve_job_def("beam_management")
    return job.execute_in_process(
        instance=instance or dg.DagsterInstance.ephemeral(),
        run_config={"resources": run_config(scale, 0, variant)["resources"]},
        asset_selection=[dg.AssetKey(["beam_management", step]) for step in steps] or None,
        raise_on_error=False,
    )


def _resources() -> dg.Definitions:
    rankd = RankdRun(scale="laptop", seed=0, variant="default")
    return dg.Definitions(resources={"rankd": rankd, "mlflow": MlflowTracking(uri=NO_MLFLOW)})


def materialized(result: Any) -> dict[str, Any]:
    events = result.get_asset_materialization_events()
    return {event.asset_key.path[-1]: event.materialization for event in events}


def evaluations(result: Any) -> dict[str, Any]:
    return {item.asset_key.path[-1]: item for item in result.get_asset_check_evaluations()}


def failure_of(result: Any, step: str) -> Any:
    return result.failure_data_for_node(f"beam_management__{step}").user_failure_data


def test_a_stored_chain_is_materialized_with_the_versions_of_its_content(home: Settings) -> None:
    made = plant(spec(), home)
    result = run()
    assert result.success
    seen = materialized(result)
    assert set(seen) == {*(info.name for info in CHAIN), "champion"}
    for step, artifact in made.items():
        assert seen[step].tags["dagster/data_version"] == artifact.version
        assert seen[step].tags["rankd/recipe"] == artifact.recipe
        assert seen[step].tags["rankd/scale"] == "laptop"
        assert seen[step].metadata["cached"].value is True
    assert all(check.passed for check in evaluations(result).values())
    again = materialized(run())
    for step in made:
        assert again[step].tags["dagster/data_version"] == seen[step].tags["dagster/data_version"]


@pytest.mark.parametrize("step", [name for name in GATED if name != "deployment"])
@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_gate_stops_what_comes_after(home: Settings, step: str, verdict: str) -> None:
    plant(spec(), home, {step: verdict})
    result = run()
    check = evaluations(result)[step]
    seen = materialized(result)
    if step == "latency_profile" and verdict == "inconclusive":  # this host cannot tell: goes on, stamped
        assert check.passed and "deployment" in seen
        return
    assert not result.success
    assert not check.passed and check.severity == dg.AssetCheckSeverity.ERROR
    assert "more labels" in check.description  # the next step
    later = {info.name for info in CHAIN if step in info.needs_pass}
    assert later and not later & set(seen)


@pytest.mark.parametrize("step", ["soft_labels", "student", "deployment"])
def test_past_a_failed_gate_a_step_refuses_also_when_it_is_run_alone(home: Settings, step: str) -> None:
    """A blocking check guards only its own run."""
    gate = "calibration_scorecard" if step != "deployment" else "quantized_onnx"
    before = CHAIN[[info.name for info in CHAIN].index(step) - 1].name
    plant(spec(), home, {gate: "fail"}, upto=before)
    result = run(steps=(step,))
    assert not result.success
    failure = failure_of(result, step)
    assert failure.metadata["exit_code"].value == 3
    assert "verdict fail" in failure.description and "more labels" in failure.description
    assert not [event for event in result.all_events if event.event_type_value == "STEP_UP_FOR_RETRY"]


def test_smoke_shows_its_gates_and_goes_on(home: Settings) -> None:
    plant(spec("smoke"), home, {step: "fail" for step in GATED})
    result = run("smoke")
    assert result.success
    for check in evaluations(result).values():
        assert not check.passed and check.severity == dg.AssetCheckSeverity.WARN
    assert "champion" not in materialized(result)


def test_a_check_shows_its_gates_as_a_table(home: Settings) -> None:
    plant(spec(), home, {"quantized_onnx": "fail"})
    table = evaluations(run())["quantized_onnx"].metadata["gates"]
    (row,) = [record.data for record in table.records]
    assert (row["gate"], row["value"], row["needs"], row["verdict"]) == ("margin", "0.031", ">= 0.05", "fail")


def test_a_missing_input_is_one_sentence(home: Settings) -> None:
    failure = failure_of(run(steps=("teacher",)), "teacher")
    assert "corpus has not been made" in failure.description and "rankd run" in failure.description
    assert failure.metadata["exit_code"].value == 2


def test_an_unknown_variant_is_one_sentence(home: Settings) -> None:
    failure = failure_of(run(steps=("corpus",), variant="nope"), "corpus")
    assert "variant 'nope': unknown" in failure.description


def test_a_champion_is_shown_in_the_graph(home: Settings) -> None:
    first = plant(spec(), home)["deployment"]
    champion = materialized(run())["champion"]
    assert champion.tags["dagster/data_version"] == first.version
    assert champion.metadata["version"].value == 1
    entry = open_ledger(home, "beam_management").champion()
    assert entry is not None and entry.recipe == first.recipe


def test_mlflow_down_is_said_and_stops_nothing(home: Settings) -> None:
    plant(spec(), home)
    result = run()
    assert result.success
    seen = materialized(result)
    for step in ("teacher", "student", "deployment"):
        assert seen[step].metadata["mlflow"].value.startswith("not tracked: MLflow at http://127.0.0.1:9")
    assert "mlflow" not in seen["corpus"].metadata


def test_metadata_shows_numbers_tables_pictures_and_links(home: Settings) -> None:
    made = plant(spec(), home)
    teacher, card = step_metadata(made["teacher"]), step_metadata(made["calibration_scorecard"])
    assert teacher["metric_params"] == 1234
    rows = {record.data["name"]: record.data for record in teacher["metric_scores"].records}
    assert rows["teacher"]["top1"] == "0.71"
    assert teacher["from_corpus"].asset_key == dg.AssetKey(["beam_management", "corpus"])
    assert card["figure_reliability"].value.startswith("![reliability](data:image/png;base64,iVBOR")
    assert card["gates"].records[0].data["verdict"] == "pass"
    assert Path(card["artifact"].value).is_dir()


def test_a_large_picture_stays_in_its_folder(home: Settings) -> None:
    card = plant(spec(), home)["calibration_scorecard"]
    (card.path / "figures" / "large.png").write_bytes(PNG + bytes(MAX_PICTURE_BYTES))
    assert "figure_large" not in step_metadata(card) and "figure_reliability" in step_metadata(card)


def test_scale_seed_and_variant_are_in_the_recipe(home: Settings) -> None:
    config = load_pipeline("beam_management")
    recipes = {plant(config.at(scale, seed), home)["corpus"].recipe for scale in ("smoke", "laptop") for seed in (0, 1)}
    assert len(recipes) == 4
    seen = _scales(open_store(home).artifacts("beam_management", "corpus"))
    assert seen == {("smoke", 0), ("smoke", 1), ("laptop", 0), ("laptop", 1)}


def _scales(artifacts: Any) -> set[tuple[str, int]]:
    recipes: list[Mapping[str, Any]] = [item.manifest["recipe"] for item in artifacts]
    return {(recipe["scale"], recipe["seed"]) for recipe in recipes}
