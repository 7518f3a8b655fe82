"""Homes of the tests' own: one is initialised per session, and each test that wants one gets a copy of it."""

import os
import shutil
from pathlib import Path

import pytest

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


def _moved(template: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    shutil.copytree(template, folder)
    monkeypatch.setenv("RANKD_HOME", str(folder))
    current = settings()
    monkeypatch.setenv("DAGSTER_HOME", str(current.dagster_home))
    return current


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_postgres: runs against Debian's PostgreSQL, and is left out where it is missing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, and say so, what this host has not got."""
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
