"""Homes of the tests' own: one is initialised per session, and each test that wants one gets a copy of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from rankd_pipeline.orchestration.setup import initialise
from rankd_pipeline.settings import TELEMETRY_OFF, Settings, settings

WITHOUT_POSTGRES = pytest.StashKey[int]()
SERVERS = ("RANKD_STORE", "RANKD_MLFLOW_URI", "RANKD_DAGSTER_POSTGRES_URL", "RANKD_WORKERS", "RANKD_MLFLOW_PORT")


@pytest.fixture(scope="session", autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test touches ./data, whatever the shell that started it has set; no test phones home."""
    for name in SERVERS:
        os.environ.pop(name, None)
    os.environ.update(TELEMETRY_OFF)
    os.environ["RANKD_HOME"] = str(tmp_path_factory.mktemp("no-home"))


@pytest.fixture(scope="session")
def template_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised home, made once for all workers (its set-up holds a lock)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    home = shared / "template-home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKD_HOME", str(home))
        initialise(settings())
    return home


@pytest.fixture
def home(template_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of a fresh, initialised home, which the environment points to."""
    return _moved(template_home, tmp_path / "home", monkeypatch)


@pytest.fixture(scope="session")
def smoke_chain(template_home: Path) -> Settings:
    """A home in which `rankd run beam_management --scale smoke` has run once, with outbound connections refused.

    Made once for all workers; tests only read it or run the same again. Where the kernel allows it, the run has a network
    namespace of its own without any interface; everywhere, each of its processes notes what it tries (`connections.log`).
    """
    home = template_home.with_name("smoke-home")
    with FileLock(template_home.with_name("smoke-home.lock")):
        if not (home / "smoke-run.txt").exists():
            shutil.copytree(template_home, home)
            _run_smoke_chain(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKD_HOME", str(home))
        return settings()


def _run_smoke_chain(home: Path) -> None:
    guard = Path(__file__).with_name("no_network")
    environment = {
        **os.environ, "RANKD_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(guard),
        "RANKD_TEST_CONNECTIONS": str(home / "connections.log"),
    }  # fmt: skip
    alone = ["unshare", "-rn"] if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0 else []
    command = [*alone, sys.executable, "-m", "rankd_pipeline.cli", "run", "beam_management", "--scale", "smoke"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (home / "smoke-run.txt").write_text(done.stdout)


def _moved(template: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    shutil.copytree(template, folder)
    monkeypatch.setenv("RANKD_HOME", str(folder))
    current = settings()
    monkeypatch.setenv("DAGSTER_HOME", str(current.dagster_home))
    return current


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_postgres: runs against Debian's PostgreSQL, and is left out where it is missing")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One worker takes all tests of the smoke chain, so that the other need not wait for it; leave out what this host lacks."""
    for item in items:
        if "smoke_chain" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("smoke_chain"))
    if shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return
    missing = [item for item in items if item.get_closest_marker("needs_postgres")]
    if missing:
        config.hook.pytest_deselected(items=missing)
        items[:] = [item for item in items if item not in missing]
        config.stash[WITHOUT_POSTGRES] = len(missing)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(WITHOUT_POSTGRES, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out} test(s) left out: no PostgreSQL here; `apt-get install postgresql` and run again.")
