"""The real YAML as Dagster definitions: keys, checks, job, schedule; what is refused, and how light loading is."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest
import yaml

import rankd_pipeline
from rankd_pipeline.definitions import check_home, defs
from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.component import RanFunctionComponent
from rankd_pipeline.orchestration.setup import pool_name
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import load_pipeline, pipeline_files
from rankd_pipeline.steps.chain import CHAIN, GATED

PACKAGE = Path(rankd_pipeline.__file__).parent
STEPS = (
    "corpus", "audit_report", "ssl_weights", "oracle_labels", "teacher", "calibration_scorecard", "soft_labels", "student",
    "quantized_onnx", "latency_profile", "deployment",
)  # fmt: skip


FIELD = ("telemetry", "drift_report", "shadow_run")


def attributes() -> dict:
    return yaml.safe_load(pipeline_files()["beam_management"].read_text())["attributes"]


def test_the_real_yaml_loads_with_the_keys_that_history_hangs_on(home: Settings) -> None:
    graph = defs().resolve_asset_graph()
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == {
        f"{pipeline}/{name}" for pipeline in pipeline_files() for name in (*STEPS, *FIELD, "champion")
    }
    assert [info.name for info in CHAIN] == list(STEPS)
    assert {(key.asset_key.path[-1], key.name) for key in graph.asset_check_keys} == {(step, "gates") for step in GATED}


def test_every_asset_says_what_it_is(home: Settings) -> None:
    repository = defs().get_repository_def()
    graph = repository.asset_graph
    for info in CHAIN:
        node = graph.get(dg.AssetKey(["beam_management", info.name]))
        assert node.description == info.title
        assert node.group_name == "beam_management"
        joins = {"telemetry"} if info.name == "corpus" else set()  # a champion leads back to the telemetry behind it
        assert {key.path[-1] for key in node.parent_keys} == set(info.inputs) | joins
        assert node.code_version and node.code_version.startswith(info.code_version)
        assert node.pools == {pool_name("beam_management")}
        assert node.kinds
    champion = graph.get(dg.AssetKey(["beam_management", "champion"]))
    assert not champion.is_materializable
    assert {key.path[-1] for key in champion.parent_keys} == {"deployment", "shadow_run"}
    for name in FIELD:
        assert graph.get(dg.AssetKey(["beam_management", name])).pools == {pool_name("beam_management")}


def test_checks_block(home: Settings) -> None:
    graph = defs().get_repository_def().asset_graph
    for key in graph.asset_check_keys:
        assert graph.get(key).blocking


def test_job_covers_the_chain_and_its_checks(home: Settings) -> None:
    job = defs().resolve_job_def("beam_management")
    assert {key.path[-1] for key in job.asset_layer.executable_asset_keys} == set(STEPS)
    assert {key.asset_key.path[-1] for key in job.asset_layer.asset_graph.asset_check_keys} == set(GATED)


def test_schedule_is_what_the_yaml_says(home: Settings) -> None:
    schedule = defs().resolve_schedule_def("beam_management_nightly")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 2 * * *", "UTC")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    switched_on = component(schedule={"cron": "15 3 * * 1", "timezone": "Europe/Berlin", "enabled": True})
    other = built(switched_on).resolve_schedule_def("beam_management_nightly")
    assert (other.cron_schedule, other.execution_timezone) == ("15 3 * * 1", "Europe/Berlin")
    assert other.default_status == dg.DefaultScheduleStatus.RUNNING


def test_jobs_look_at_the_field_and_redistill(home: Settings) -> None:
    definitions = defs()
    for name, steps in (
        ("beam_management_drift", {"telemetry", "drift_report"}),
        ("beam_management_redistill", {*STEPS, "shadow_run"}),
    ):
        job = definitions.resolve_job_def(name)
        assert {key.path[-1] for key in job.asset_layer.executable_asset_keys} == steps
    assert definitions.resolve_schedule_def("beam_management_nightly").job_name == "beam_management_redistill"


def test_sensors_are_what_the_yaml_says(home: Settings) -> None:
    switches = {"telemetry": {"enabled": True, "interval_s": 7}, "drift": {"enabled": True, "interval_s": 9}}
    for definitions, status, seconds in (
        (defs(), dg.DefaultSensorStatus.STOPPED, (30, 30)),
        (built(component(sensors=switches)), dg.DefaultSensorStatus.RUNNING, (7, 9)),
    ):
        look, drift = (definitions.resolve_sensor_def(f"beam_management_{name}") for name in ("telemetry", "drift"))
        assert (look.job_name, drift.job_name) == ("beam_management_drift", "beam_management_redistill")
        assert look.default_status == drift.default_status == status
        assert (look.minimum_interval_seconds, drift.minimum_interval_seconds) == seconds
    assert defs().resolve_sensor_def("beam_management_mirrors").default_status == dg.DefaultSensorStatus.RUNNING


def component(**changes: object) -> RanFunctionComponent:
    return RanFunctionComponent(**{**attributes(), **changes})


def built(instance: RanFunctionComponent) -> dg.Definitions:
    from rankd_pipeline.orchestration.resources import common

    return dg.Definitions.merge(dg.build_defs_for_component(instance), common())


def test_component_reads_the_yaml_as_the_command_line_does() -> None:
    loaded = load_pipeline("beam_management")
    assert component().config() == loaded
    # Dagster resolves templates and types on its own way from YAML to the component
    resolved = RanFunctionComponent.resolve_from_yaml(yaml.safe_dump(attributes()))
    assert resolved.config() == loaded


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": {**attributes()["steps"], "teacher": {"nettwork": {}}}}, "nettwork"),
        ({"scales": {"huge": {}}}, "huge"),
        ({"gates": {"calibration_scorecard": [{"name": "x"}]}}, "metric"),
        ({"schedule": {"cronn": "1"}}, "cronn"),
        ({"sensors": {"drift": {"cooldown": 1}}}, "cooldown"),
        ({"redistill": {"corpus": {}}}, "cannot change 'corpus'"),
        ({"steps": {**attributes()["steps"], "drift_report": {"causes": {"weather": "harmless"}}}}, "weather"),
        ({"steps": {**attributes()["steps"], "latency_profile": {"budget_us": -1}}}, "budget_us"),
    ],
)
def test_a_wrong_key_is_named(changes: dict, named: str) -> None:
    with pytest.raises(RankdError, match=named):
        config = component(**changes).config()
        config.at()


def test_refuses_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKD_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(RankdError, match="rankd init"):
        check_home()


@pytest.mark.parametrize("found", [None, "/tmp/other"])
def test_refuses_beside_another_instance(home: Settings, monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    if found is None:
        monkeypatch.delenv("DAGSTER_HOME")
    else:
        monkeypatch.setenv("DAGSTER_HOME", found)
    with pytest.raises(RankdError, match=f"DAGSTER_HOME={home.dagster_home}"):
        check_home()


def test_loading_is_light(home: Settings) -> None:
    code = """
import sys, time
import dagster
started = time.process_time()
from rankd_pipeline.definitions import defs
defs()
print(time.process_time() - started)
heavy = ("torch", "mlflow", "sionna", "onnxruntime", "sklearn", "matplotlib", "pandas", "scipy")
print([name for name in heavy if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = result.stdout.splitlines()
    assert heavy == "[]"
    assert float(seconds) < 2.0  # 0.6 s on a quiet core


def test_scaffolded_pipeline_is_whole(tmp_path: Path) -> None:
    from rankd_pipeline.orchestration.component import PipelineScaffolder

    request = dg.ScaffoldRequest(
        type_name="RanFunctionComponent",
        target_path=tmp_path / "beams_west", scaffold_format="yaml", project_root=tmp_path, params=None
    )  # fmt: skip
    PipelineScaffolder().scaffold(request)
    config = load_pipeline(tmp_path / "beams_west" / "defs.yaml")
    assert config.pipeline == "beams_west"
    assert config.model_copy(update={"pipeline": "beam_management"}) == load_pipeline("beam_management")


def test_no_module_with_definitions_postpones_annotations() -> None:
    for path in [*(PACKAGE / "orchestration").glob("*.py"), PACKAGE / "definitions.py"]:
        assert "from __future__ import annotations" not in path.read_text(), path


def test_works_as_a_wheel_from_an_empty_folder(home: Settings, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "rankd_pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        path = PACKAGE.parent / name
        (source / name).write_text(path.read_text() if path.exists() else "")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    assert (target / "rankd_pipeline" / "orchestration" / "dagster.yaml").is_file()
    empty = tmp_path / "empty"
    empty.mkdir()
    validate = [sys.executable, "-W", "ignore", "-m", "dagster", "definitions", "validate", "-m", "rankd_pipeline.definitions"]
    # the wheel's own copy, not the source that this interpreter has installed for editing
    environment = {**os.environ, "PYTHONPATH": str(target)}
    good = subprocess.run(validate, cwd=empty, env=environment, capture_output=True, text=True)
    assert good.returncode == 0, good.stdout + good.stderr
    where = "import rankd_pipeline; print(rankd_pipeline.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=empty, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip().startswith(str(target))
    bad = subprocess.run(validate, cwd=empty, env={**environment, "RANKD_HOME": str(empty)}, capture_output=True, text=True)
    assert bad.returncode != 0
    assert "rankd init" in bad.stdout + bad.stderr


def test_initialised_home_costs_nothing(home: Settings) -> None:
    from rankd_pipeline.orchestration.setup import initialise

    started = time.perf_counter()
    assert initialise(home) is False
    assert time.perf_counter() - started < 0.1
