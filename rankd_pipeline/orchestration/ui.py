"""Dagster's UI with its daemon and MLflow's UI on this machine; Ctrl-C, or the end of either, ends both."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType

from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.execute import child_environment
from rankd_pipeline.orchestration.lifeline import die_with
from rankd_pipeline.orchestration.setup import initialise
from rankd_pipeline.settings import TELEMETRY_OFF, Settings

HOST = "127.0.0.1"
STOP_WAIT_S = 10.0
QUIET = {"PYTHONWARNINGS": "ignore", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Deprecations inside the two servers are no business of their user; MLflow's job runners have no job here."""


def serve(current: Settings, port: int = 3000, mlflow_port: int = 5000) -> int:
    """Run both servers until one ends or a signal comes; returns the exit code.

    Orphaned runs are reaped first, so that they do not hold a pool. Both listen on 127.0.0.1 only. With an MLflow server
    of its own (RANKD_MLFLOW_URI), only Dagster's is started.

    Raises: RankdError if a port is taken.
    """
    initialise(current)
    local_mlflow = not current.mlflow_uri.startswith(("http://", "https://"))
    for name, number in [("Dagster", port), *([("MLflow", mlflow_port)] if local_mlflow else [])]:
        _require_free(name, number)
    reaped = _reap(current)
    environment = {**child_environment(current), **QUIET, "RANKD_MLFLOW_PORT": str(mlflow_port)}
    servers = {"Dagster": _start(_dagster(port), current, environment)}
    if local_mlflow:
        servers["MLflow"] = _start(_mlflow(current, mlflow_port), current, environment)
    if reaped:
        _say(f"reported {len(reaped)} run(s) as failed whose process is gone: {', '.join(run[:8] for run in reaped)}")
    mlflow = f"http://{HOST}:{mlflow_port}" if local_mlflow else current.mlflow_uri
    ready = f"Dagster: http://{HOST}:{port}   MLflow: {mlflow}   Ctrl-C stops both."
    _say("starting; this takes some seconds")
    return _wait(servers, [port, mlflow_port] if local_mlflow else [port], ready)


def _dagster(port: int) -> list[str]:
    module = "rankd_pipeline.definitions"
    return [sys.executable, "-m", "dagster", "dev", "-m", module, "-h", HOST, "-p", str(port), "--log-level", "warning"]


def _mlflow(current: Settings, port: int) -> list[str]:
    """One worker; Host headers other than this machine's are refused by MLflow itself (against DNS rebinding)."""
    hosts = f"{HOST}:{port},localhost:{port}"
    return [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", current.mlflow_uri, "--host", HOST, "--port", str(port),
        "--workers", "1", "--allowed-hosts", hosts, "--default-artifact-root", (current.mlflow_dir / "artifacts").as_uri(),
    ]  # fmt: skip


def _start(command: list[str], current: Settings, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A server in a process group of its own (a Ctrl-C is passed on once, in order), killed if this process is."""
    return subprocess.Popen(
        command,
        cwd=current.home,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with(os.getpid(), signal.SIGTERM),
    )


def _wait(servers: Mapping[str, subprocess.Popen[bytes]], ports: list[int], ready: str) -> int:
    """Say when all ports answer; stop everything on a signal or when a server ends."""
    asked, waiting = False, list(ports)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    ended = None
    while not asked and ended is None:
        time.sleep(0.2)
        if waiting and _answers(waiting[0]):
            waiting.pop(0)
            if not waiting:
                _say(ready)
        ended = next((name for name, server in servers.items() if server.poll() is not None), None)
    for server in servers.values():
        if server.poll() is None:
            server.send_signal(signal.SIGINT)  # the leader ends its own children in order
    for server in servers.values():
        _wait_or_kill(server)
    if ended is not None:
        _say(f"{ended} ended by itself (exit code {servers[ended].returncode}); the other was stopped")
        return 1
    return 0


def _wait_or_kill(server: subprocess.Popen[bytes]) -> None:
    """Whatever is left of the server's group after 10 s is killed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(timeout=STOP_WAIT_S)
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    server.wait()


def _reap(current: Settings) -> list[str]:
    os.environ.update(TELEMETRY_OFF)
    os.environ["DAGSTER_HOME"] = str(current.dagster_home)
    import dagster as dg

    from rankd_pipeline.orchestration.liveness import reap_orphans

    with dg.DagsterInstance.get() as instance:
        return reap_orphans(instance)


def _require_free(name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise RankdError(f"{name}'s port {port} on {HOST} is taken; stop what listens there or choose another port.") from None


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def _say(text: str) -> None:
    sys.stderr.write(f"rankd: {text}\n")
    sys.stderr.flush()
