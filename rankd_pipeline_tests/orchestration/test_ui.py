"""`rankd ui` for real: both servers over HTTP, the Launchpad's defaults, a launch through the daemon, and the end of it all."""

import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.ui import serve
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline_tests.orchestration.planted import plant
from rankd_pipeline_tests.orchestration.servers import PIPELINE, REPOSITORY, Servers, free_port

DEFAULTS = """
query Defaults($selector: PipelineSelector!) {
  runConfigSchemaOrError(selector: $selector) { ... on RunConfigSchema { rootDefaultYaml } ... on PythonError { message } }
}"""


@pytest.fixture
def servers(home: Settings, tmp_path: Path) -> Iterator[Servers]:
    plant(load_pipeline(PIPELINE).at("smoke"), home)
    running = Servers(home, tmp_path / "ui.log")
    try:
        yield running
    finally:
        running.stop()


@pytest.mark.xdist_group("servers")
def test_the_ui_from_start_to_end(servers: Servers) -> None:
    """One test, because starting two servers is what costs."""
    # the Launchpad shows scale, seed and variant once, with their defaults
    selector = {**REPOSITORY, "pipelineName": PIPELINE}
    text = servers.graphql(DEFAULTS, selector=selector)["runConfigSchemaOrError"]["rootDefaultYaml"]
    config = yaml.safe_load(text)
    assert config["resources"]["rankd"]["config"] == {"scale": "laptop", "seed": 0, "variant": "default"}
    assert text.count("scale:") == 1

    # a launch goes through the daemon's queue and the multiprocess executor
    assert servers.ended(servers.start(PIPELINE, "smoke", ["corpus", "audit_report"])) == "SUCCESS"

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
