"""`rankd ui` for real: both servers over HTTP, the Launchpad's defaults, a launch through the daemon, and the end of it all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.ui import serve
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline_tests.orchestration.planted import plant

SERVE = """
import sys
from rankd_pipeline.orchestration.ui import serve
from rankd_pipeline.settings import prepare_environment
sys.exit(serve(prepare_environment(), int(sys.argv[1]), int(sys.argv[2])))
"""
SELECTOR = {"repositoryName": "__repository__", "repositoryLocationName": "rankd_pipeline.definitions"}
DEFAULTS = """
query Defaults($selector: PipelineSelector!) {
  runConfigSchemaOrError(selector: $selector) { ... on RunConfigSchema { rootDefaultYaml } ... on PythonError { message } }
}"""
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
    """Both servers of one home, as a user started them."""

    def __init__(self, current: Settings, log: Path) -> None:
        self.port, self.mlflow_port, self.log = free_port(), free_port(), log
        with log.open("wb") as output:
            command = [sys.executable, "-c", SERVE, str(self.port), str(self.mlflow_port)]
            self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=current.home)
        self._until(lambda: "Ctrl-C stops both" in log.read_text(), 180)

    def _until(self, done: Any, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.3)

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
        assert "errors" not in found, found
        return found["data"]

    def launch(self, steps: list[str], scale: str) -> str:
        """Launch assets as the Launchpad does, through the daemon's queue; the run's final status."""
        selector = {**SELECTOR, "pipelineName": "beam_management", "assetSelection": [_key(step) for step in steps]}
        selector["assetCheckSelection"] = []
        config = {"resources": {"rankd": {"config": {"scale": scale, "seed": 0, "variant": "default"}}}}
        params = {"selector": selector, "runConfigData": json.dumps(config), "mode": "default"}
        started = self.graphql(LAUNCH, params=params)["launchRun"]
        assert started["__typename"] == "LaunchRunSuccess", started
        run_id = started["run"]["runId"]
        status = ""

        def ended() -> bool:
            nonlocal status
            status = self.graphql(STATUS, id=run_id)["runOrError"]["status"]
            return status in ("SUCCESS", "FAILURE", "CANCELED")

        self._until(ended, 240)
        return status


def _key(step: str) -> dict[str, list[str]]:
    return {"path": ["beam_management", step]}


@pytest.fixture
def servers(home: Settings, tmp_path: Path) -> Iterator[Servers]:
    plant(load_pipeline("beam_management").at("smoke"), home)
    running = Servers(home, tmp_path / "ui.log")
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.terminate()
            running.process.wait(60)


@pytest.mark.xdist_group("servers")
def test_the_ui_from_start_to_end(servers: Servers) -> None:
    """One test, because starting two servers is what costs."""
    # the Launchpad shows scale, seed and variant once, with their defaults
    selector = {**SELECTOR, "pipelineName": "beam_management"}
    text = servers.graphql(DEFAULTS, selector=selector)["runConfigSchemaOrError"]["rootDefaultYaml"]
    config = yaml.safe_load(text)
    assert config["resources"]["rankd"]["config"] == {"scale": "laptop", "seed": 0, "variant": "default"}
    assert text.count("scale:") == 1

    # a launch goes through the daemon's queue and the multiprocess executor
    assert servers.launch(["corpus", "audit_report"], "smoke") == "SUCCESS"

    # MLflow answers, and only to this machine's names
    mlflow = f"http://127.0.0.1:{servers.mlflow_port}/"
    with urllib.request.urlopen(mlflow, timeout=30) as answer:
        assert answer.status == 200
    rebound = urllib.request.Request(mlflow, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(rebound, timeout=30)

    # listens on this machine only, phones nobody, and one signal ends every process
    tree = psutil.Process(servers.process.pid).children(recursive=True)
    assert len(tree) >= 5
    listening = [entry for child in tree for entry in child.net_connections("inet") if entry.status == psutil.CONN_LISTEN]
    assert listening and {entry.laddr.ip for entry in listening} == {"127.0.0.1"}
    environments = [child.environ() for child in tree if child.is_running()]
    assert all(item["DAGSTER_DISABLE_TELEMETRY"] == "yes" and item["MLFLOW_DISABLE_TELEMETRY"] == "true" for item in environments)
    os.kill(servers.process.pid, signal.SIGINT)
    assert servers.process.wait(60) == 0
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert [child for child in alive if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


def test_a_taken_port_is_one_sentence(home: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(RankdError, match=f"port {port} on 127.0.0.1 is taken"):
            serve(home, port, free_port())
