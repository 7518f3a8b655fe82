"""Homes of the tests' own: one is initialised per session, and each test that wants one gets a copy of it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

from rankd_pipeline.orchestration.setup import initialise
from rankd_pipeline.settings import TELEMETRY_OFF, Settings, settings

# Generated cases are judged by what they find, not by how busy the host is.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

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


def _has_postgres() -> bool:
    return bool(shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb")))


def _has_compiler() -> bool:
    from rankd_pipeline.runtime.c_export import compiler

    return compiler() is not None


def _has_mount_namespace() -> bool:
    return bool(shutil.which("unshare")) and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode


NEEDS: dict[str, tuple[str, Callable[[], bool], str]] = {
    "needs_postgres": ("Debian's PostgreSQL", _has_postgres, "`apt-get install postgresql` and run again"),
    "needs_compiler": ("a C compiler", _has_compiler, "`apt-get install gcc` and run again"),
    "needs_mount_namespace": ("a mount namespace of its own", _has_mount_namespace, "this host gives none to an ordinary user"),
}
"""Markers of what a host may lack: what it is, whether it is here, and what can be done. Their tests are left out without it."""


def pytest_configure(config: pytest.Config) -> None:
    for marker, (what, _, _) in NEEDS.items():
        config.addinivalue_line("markers", f"{marker}: runs with {what}, and is left out where that is missing")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One worker takes all tests of the smoke chain, so that the other need not wait for it; leave out what this host lacks."""
    for item in items:
        if "smoke_chain" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("smoke_chain"))
    for marker, (_, here, _) in NEEDS.items():
        asking = [item for item in items if item.get_closest_marker(marker)]
        if asking and not here():
            config.hook.pytest_deselected(items=asking)
            items[:] = [item for item in items if item not in asking]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Said from the host, because with workers it is they who leave tests out and not this process."""
    for marker, (what, here, cure) in NEEDS.items():
        if not here():
            terminalreporter.write_line(f"Left out: the tests marked {marker}, for want of {what}; {cure}.")
