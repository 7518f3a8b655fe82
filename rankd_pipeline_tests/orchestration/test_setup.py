"""Setting up a home: once, whoever comes first, however it is interrupted; embedded databases or a real PostgreSQL."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml

from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.execute import child_environment, execute_chain
from rankd_pipeline.orchestration.liveness import PROCESS_TAG, is_alive, process_tag, reap_orphans
from rankd_pipeline.orchestration.setup import STAMP, initialise, pool_name
from rankd_pipeline.settings import TELEMETRY_OFF, Settings, prepare_environment, settings
from rankd_pipeline.spec import load_pipeline, pipeline_files
from rankd_pipeline_tests.orchestration.planted import plant

INITIALISE = "from rankd_pipeline.orchestration.setup import initialise; from rankd_pipeline.settings import settings; "
BINARIES = [shutil.which("initdb"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]


def test_a_home_has_its_instance_pools_and_databases(home: Settings) -> None:
    document = yaml.safe_load((home.dagster_home / "dagster.yaml").read_text())
    assert document["telemetry"] == {"enabled": False}
    assert document["run_retries"]["retry_on_asset_or_op_failure"] is False
    with dg.DagsterInstance.get() as instance:
        assert instance.telemetry_enabled is False
        assert instance.run_retries_enabled and instance.run_monitoring_enabled
        for pipeline in pipeline_files():
            assert instance.event_log_storage.get_concurrency_info(pool_name(pipeline)).slot_count == 1
    assert Path(home.mlflow_uri.removeprefix("sqlite:///")).is_file()
    assert json.loads((home.home / STAMP).read_text())["pipelines"] == sorted(pipeline_files())


def test_the_template_at_the_top_is_the_packaged_one() -> None:
    from rankd_pipeline.orchestration.setup import TEMPLATE

    top = Path(__file__).parents[2] / "dagster.yaml"
    assert top.resolve() == TEMPLATE.resolve()


def test_a_second_time_imports_neither_dagster_nor_mlflow(home: Settings) -> None:
    code = INITIALISE + "print(initialise(settings())); import sys; print('dagster' in sys.modules, 'mlflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False", "False"]


def _initialise(_: int) -> bool:
    return initialise(settings())


def test_killed_or_raced_it_is_whole_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKD_HOME", str(tmp_path / "home"))
    killed = subprocess.Popen([sys.executable, "-c", INITIALISE + "initialise(settings())"])
    time.sleep(3)  # anywhere in its work: databases are half made
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not settings().initialised
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert sorted(pool.map(_initialise, range(2))) == [False, True]
    current = prepare_environment()
    plant(load_pipeline("beam_management").at("smoke"), current)
    outcome = execute_chain("beam_management", "smoke", 0, "default", current)
    assert outcome.status == "success", outcome.message


def test_a_home_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKD_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(RankdError, match="set RANKD_HOME to a folder you can write"):
        initialise(settings())


def test_a_new_pipeline_gets_its_pool(home: Settings) -> None:
    stamp = json.loads((home.home / STAMP).read_text())
    (home.home / STAMP).write_text(json.dumps({**stamp, "pipelines": []}))
    assert initialise(home) is True
    assert initialise(home) is False


# -- liveness ---------------------------------------------------------------------------------------------------------
def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    tag = process_tag()[PROCESS_TAG]
    state = json.loads(tag)
    assert is_alive(tag) is True
    assert is_alive(json.dumps({**state, "started": state["started"] - 60})) is False
    assert is_alive(json.dumps({**state, "boot": "another"})) is False
    assert is_alive(json.dumps({**state, "pid": 2**22 + 1})) is False
    assert is_alive(json.dumps({**state, "host": "elsewhere"})) is None


def test_only_runs_without_a_process_are_reaped(home: Settings) -> None:
    state = json.loads(process_tag()[PROCESS_TAG])
    dead = json.dumps({**state, "started": 1.0})
    elsewhere = json.dumps({**state, "host": "elsewhere", "started": 1.0})
    with dg.DagsterInstance.get() as instance:

        def started(tags: dict[str, str], status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED) -> str:
            run = dg.DagsterRun(job_name="beam_management", run_id=str(uuid.uuid4()), status=status, tags=tags)
            return instance.add_run(run).run_id

        orphans = {
            started({PROCESS_TAG: dead}),
            started({PROCESS_TAG: dead}, dg.DagsterRunStatus.STARTING),
            started({PROCESS_TAG: dead}, dg.DagsterRunStatus.CANCELING),
        }
        kept = {
            started(process_tag()),
            started({PROCESS_TAG: elsewhere}),
            started({}),  # its executor has not begun yet: seconds old
            started({PROCESS_TAG: dead}, dg.DagsterRunStatus.SUCCESS),
        }
        assert set(reap_orphans(instance)) == orphans
        assert reap_orphans(instance) == []
        for run_id in orphans:
            found = instance.get_run_by_id(run_id)
            assert found is not None and found.status == dg.DagsterRunStatus.FAILURE
        for run_id in kept:
            found = instance.get_run_by_id(run_id)
            assert found is not None and found.status != dg.DagsterRunStatus.FAILURE


# -- servers ----------------------------------------------------------------------------------------------------------
def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """A real PostgreSQL of this test's own, as Debian packages it; the URL of an empty database."""
    binaries = Path(next(found for found in BINARIES if found)).resolve().parent
    folder = tmp_path / "postgres"
    folder.mkdir()
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres")
        for parent in folder.parents:  # pytest's folders are closed to others
            if parent != Path("/") and parent.stat().st_uid == 0 and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o011)
    data, port = folder / "data", _free_port()
    subprocess.run(
        [*as_user, str(binaries / "initdb"), "-D", data, "-A", "trust", "-U", "rankd"], check=True, capture_output=True, cwd="/"
    )
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [*as_user, str(binaries / "pg_ctl"), "-D", str(data), "-w"]
    subprocess.run([*control, "-o", options, "-l", str(folder / "log"), "start"], check=True, capture_output=True, cwd="/")
    try:
        yield f"postgresql://rankd@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd="/")


@pytest.mark.needs_postgres
def test_dagster_and_mlflow_on_a_real_postgresql(tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg2

    connection = psycopg2.connect(postgres)
    connection.autocommit = True
    connection.cursor().execute("CREATE DATABASE mlflow")
    monkeypatch.setenv("RANKD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RANKD_DAGSTER_POSTGRES_URL", postgres)
    monkeypatch.setenv("RANKD_MLFLOW_URI", postgres.replace("/postgres", "/mlflow"))
    monkeypatch.setenv("DAGSTER_HOME", "")
    current = prepare_environment()
    assert initialise(current) is True and initialise(current) is False
    assert not list(current.home.rglob("*.db"))
    assert postgres not in (current.home / STAMP).read_text() + (current.dagster_home / "dagster.yaml").read_text()
    plant(load_pipeline("beam_management").at("smoke"), current)
    outcome = execute_chain("beam_management", "smoke", 0, "default", current)
    assert outcome.status == "success", outcome.message
    with dg.DagsterInstance.get() as instance, dg.DagsterInstance.from_ref(instance.get_ref()) as elsewhere:
        assert elsewhere.get_runs_count() == 1  # as a step's process sees it
    cursor = connection.cursor()
    cursor.execute("SELECT status FROM runs WHERE run_id = %s", (outcome.run_id,))
    assert cursor.fetchall() == [("SUCCESS",)]
    with dg.DagsterInstance.get() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(["beam_management", "deployment"]))
        assert event is not None and event.asset_materialization is not None
        assert event.asset_materialization.metadata["mlflow_model_version"].value == "1"
        assert instance.event_log_storage.get_concurrency_info(pool_name("beam_management")).slot_count == 1
    connection.close()


def test_a_postgres_that_is_down_is_one_sentence_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RANKD_DAGSTER_POSTGRES_URL", "postgresql://rankd:hunter2@127.0.0.1:9/none")
    with pytest.raises(RankdError, match="RANKD_DAGSTER_POSTGRES_URL") as caught:
        initialise(settings())
    assert "hunter2" not in str(caught.value)
    assert not settings().initialised


def test_every_child_process_has_telemetry_off_and_the_same_settings(home: Settings) -> None:
    environment = child_environment(home)
    assert {name: environment[name] for name in TELEMETRY_OFF} == TELEMETRY_OFF
    assert environment["DAGSTER_HOME"] == str(home.dagster_home)
    code = "from rankd_pipeline.settings import settings; print(settings())"
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == str(home)


def test_a_store_on_an_object_store_uri(home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's caching interface over a folder is used as a remote one: uploads, downloads, no place to write in directly."""
    monkeypatch.setenv("RANKD_STORE", f"simplecache::file://{tmp_path / 'bucket'}")
    current = settings()
    plant(load_pipeline("beam_management").at("smoke"), current)
    outcome = execute_chain("beam_management", "smoke", 0, "default", current)
    assert outcome.status == "success", outcome.message
    assert list((tmp_path / "bucket" / "beam_management").iterdir()) and not (home.home / "store").exists()
