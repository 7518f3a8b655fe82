"""Homes of the tests' own: one is initialised per session, and each test that wants one gets a copy of it."""

import os
import shutil
from pathlib import Path

import pytest

from rankd_pipeline.orchestration.setup import initialise
from rankd_pipeline.settings import TELEMETRY_OFF, Settings, settings

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
