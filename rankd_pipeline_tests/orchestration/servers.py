"""`rankd ui` of a home of its own, as a user started it, spoken to over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from rankd_pipeline.orchestration.lifeline import die_with
from rankd_pipeline.settings import Settings

SERVE = """
import sys
from rankd_pipeline.orchestration.ui import serve
from rankd_pipeline.settings import prepare_environment
sys.exit(serve(prepare_environment(), int(sys.argv[1]), int(sys.argv[2])))
"""
PIPELINE = "beam_management"
REPOSITORY = {"repositoryName": "__repository__", "repositoryLocationName": "rankd_pipeline.definitions"}
LAUNCH = """
mutation Launch($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}"""
STATUS = "query Status($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Servers:
    """Both servers of one home (only Dagster's where MLflow is elsewhere), ready to answer."""

    def __init__(self, current: Settings, log: Path) -> None:
        self.port, self.mlflow_port, self.log = free_port(), free_port(), log
        with log.open("wb") as output:
            command = [sys.executable, "-c", SERVE, str(self.port), str(self.mlflow_port)]
            ends = die_with(os.getpid(), signal.SIGTERM)  # also where the tests are killed
            self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=current.home, preexec_fn=ends)
        self.until(lambda: "Ctrl-C stops both" in log.read_text(), 180)

    def until(self, done: Callable[[], Any], seconds: float) -> Any:
        """The first true answer of `done`."""
        end = time.monotonic() + seconds
        while not (found := done()):
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.3)
        return found

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
        assert "errors" not in found, found
        return found["data"]

    def start(self, job: str, scale: str, steps: Sequence[str] = (), tags: Mapping[str, str] | None = None) -> str:
        """Launch a job, or some of its assets, as the Launchpad does, through the daemon's queue; the run's id."""
        selector: dict[str, Any] = {**REPOSITORY, "pipelineName": job}
        if steps:
            selector |= {"assetSelection": [{"path": [PIPELINE, step]} for step in steps], "assetCheckSelection": []}
        config = {"resources": {"rankd": {"config": {"scale": scale, "seed": 0, "variant": "default"}}}}
        told = [{"key": key, "value": value} for key, value in (tags or {}).items()]
        params = {"selector": selector, "runConfigData": json.dumps(config), "mode": "default", "executionMetadata": {"tags": told}}
        started = self.graphql(LAUNCH, params=params)["launchRun"]
        assert started["__typename"] == "LaunchRunSuccess", started
        return started["run"]["runId"]

    def status(self, run_id: str) -> str:
        return self.graphql(STATUS, id=run_id)["runOrError"]["status"]

    def ended(self, run_id: str, seconds: float = 240) -> str:
        """The status that a run ends with."""

        def over() -> str:
            status = self.status(run_id)
            return status if status in ("SUCCESS", "FAILURE", "CANCELED") else ""

        return self.until(over, seconds)

    def kill(self) -> None:
        """SIGKILL everything at once, as a power cut does: servers, daemon, runs and their steps."""
        tree = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in tree:
            process.kill()
        self.process.wait(30)
        _, alive = psutil.wait_procs(tree, timeout=30)
        assert [item for item in alive if item.is_running() and item.status() != psutil.STATUS_ZOMBIE] == []

    def stop(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
            self.process.wait(60)
