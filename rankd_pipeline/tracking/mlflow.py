"""MLflow: one run per trained model, one registered model per pipeline; a mirror of the store and the ledger, never the truth.

MLflow is imported inside functions: definitions load without it, and a stored chain is run again without it.
"""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from rankd_pipeline.settings import TELEMETRY_OFF
from rankd_pipeline.store.artifact import Artifact, sha256_text
from rankd_pipeline.store.ledger import Entry

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRACKED = ("ssl_weights", "teacher", "student", "quantized_onnx", "deployment")
"""Steps that train or ship a model; each of their artifacts is one MLflow run."""
RECIPE_TAG, BUNDLE_MODEL = "rankd.recipe", "bundle/model.onnx"
IMPATIENT = {
    # A tracking server that is down must not hold up a training: one attempt, a few seconds.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
LOCAL_UI = "http://127.0.0.1:{port}"
MAX_ARTIFACT_BYTES = 5_000_000


@dataclass(frozen=True)
class Tracked:
    """Where an artifact is in MLflow; `problem` says why it is not."""

    run_id: str = ""
    url: str = ""
    model_version: str = ""
    problem: str = ""


class Tracker:
    """Logs artifacts to the MLflow at `uri`; `folder` (in the home) holds the artifacts of a local one and what was tracked."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self._folder = uri, folder
        self._is_server = uri.startswith(("http://", "https://"))

    # -- what a step calls ----------------------------------------------------------------------------------------
    def track(self, artifact: Artifact, dagster_run_id: str, asset_key: str) -> Tracked | None:
        """Log one artifact once; None if its step trains nothing or was skipped.

        A rerun finds the recipe's run and finishes it, so that neither a rerun nor a kill leaves two. Never raises for
        an MLflow that is down or broken: the training counts, and the answer says why it is not tracked.
        """
        if artifact.step not in TRACKED or artifact.skipped:
            return None
        known = self._remembered(artifact.recipe)
        if known is not None:
            return known
        try:
            with self._session() as client:
                tracked = self._log(client, artifact, dagster_run_id, asset_key)
        except Exception as error:  # whatever MLflow, its database or its server raises: training must not fail for it
            return Tracked(problem=f"MLflow at {_without_password(self.uri)}: {_one_line(error)}")
        self._remember(artifact.recipe, tracked)
        return tracked

    def mirror(self, pipeline: str, champion: Entry | None, challenger: Entry | None) -> str:
        """Set the aliases `champion` and `challenger` as the ledger has them; returns why not, or an empty string."""
        wanted = {"champion": champion, "challenger": challenger}
        state = {alias: entry.recipe if entry else None for alias, entry in wanted.items()}
        key = f"aliases-{pipeline}"
        if self._recall(key) == state:
            return ""
        try:
            with self._session() as client:
                unknown = [alias for alias, entry in wanted.items() if not self._set_alias(client, pipeline, alias, entry)]
        except Exception as error:  # as in track()
            return f"MLflow at {_without_password(self.uri)}: {_one_line(error)}"
        if unknown:
            return f"MLflow at {_without_password(self.uri)}: the {unknown[0]} is not registered there"
        self._write_memory(key, state)
        return ""

    # -- one run per recipe -----------------------------------------------------------------------------------------
    def _log(self, client: "MlflowClient", artifact: Artifact, dagster_run_id: str, asset_key: str) -> Tracked:
        experiment = self._experiment(client, artifact.pipeline)
        tags = _tags(artifact, dagster_run_id, asset_key)
        run_id = self._run_of(client, experiment, artifact, tags)
        _log_params(client, run_id, artifact)
        _log_metrics(client, run_id, artifact)
        for path in _small_files(artifact):
            folder = path.relative_to(artifact.path).parent.as_posix()
            client.log_artifact(run_id, str(path), None if folder == "." else folder)
        version = ""
        if artifact.step == "deployment" and (artifact.path / BUNDLE_MODEL).is_file():
            version = self._register(client, run_id, artifact, tags)
        client.set_terminated(run_id, "FINISHED", end_time=_finished_ms(artifact))
        return Tracked(run_id, self._url(experiment, run_id), version)

    def _experiment(self, client: "MlflowClient", pipeline: str) -> str:
        """The pipeline's experiment; a local one keeps its artifacts in the home, wherever the process was started."""
        found = client.get_experiment_by_name(pipeline)
        if found is not None:
            return found.experiment_id
        location = None if self._is_server else (self._folder / "artifacts" / pipeline).as_uri()
        return client.create_experiment(pipeline, artifact_location=location)

    def _run_of(self, client: "MlflowClient", experiment: str, artifact: Artifact, tags: Mapping[str, str]) -> str:
        found = client.search_runs([experiment], f"tags.`{RECIPE_TAG}` = '{artifact.recipe}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
            if found[0].info.status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
            return run_id
        seconds = float(artifact.observed.get("seconds") or 0.0)
        name = f"{artifact.step}-{tags['rankd.scale']}-{artifact.recipe[:8]}"
        started = _finished_ms(artifact) - int(1000 * seconds)
        return client.create_run(experiment, start_time=started, tags=dict(tags), run_name=name).info.run_id

    def _url(self, experiment: str, run_id: str) -> str:
        base = self.uri.rstrip("/") if self._is_server else LOCAL_UI.format(port=os.environ.get("RANKD_MLFLOW_PORT", "5000"))
        return f"{_without_password(base)}/#/experiments/{experiment}/runs/{run_id}"

    # -- registered models ------------------------------------------------------------------------------------------
    def _register(self, client: "MlflowClient", run_id: str, artifact: Artifact, tags: Mapping[str, str]) -> str:
        """A version of the pipeline's registered model whose ONNX file is, byte for byte, the bundle's."""
        from mlflow.exceptions import MlflowException

        name = artifact.pipeline
        try:
            client.create_registered_model(name, description=f"Deployed students of {name}; the ledger in the rankd home decides.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in client.search_model_versions(f"name = '{name}'"):
            if version.tags.get(RECIPE_TAG) == artifact.recipe:
                return str(version.version)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            _write_flavour(artifact, folder)
            client.log_artifacts(run_id, str(folder), "model")
        source = f"{client.get_run(run_id).info.artifact_uri}/model"
        made = client.create_model_version(name, source, run_id, tags=dict(tags), description=f"recipe {artifact.recipe}")
        return str(made.version)

    def _set_alias(self, client: "MlflowClient", pipeline: str, alias: str, entry: Entry | None) -> bool:
        """Point the alias at the version of `entry`, or at none; False if MLflow does not have that version."""
        versions = client.search_model_versions(f"name = '{pipeline}'")
        target = next((item for item in versions if entry and item.tags.get(RECIPE_TAG) == entry.recipe), None)
        if target is not None:
            client.set_registered_model_alias(pipeline, alias, str(target.version))
        elif versions and alias in client.get_registered_model(pipeline).aliases:
            client.delete_registered_model_alias(pipeline, alias)
        return target is not None or entry is None

    # -- the connection ---------------------------------------------------------------------------------------------
    @contextmanager
    def _session(self) -> "Iterator[MlflowClient]":
        """A client; one process of this host at a time, so that two cannot both find that a run is missing."""
        os.environ.update(TELEMETRY_OFF)
        for name, value in IMPATIENT.items():
            os.environ.setdefault(name, value)
        if self._is_server:
            _reachable(self.uri)
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / ".tracking.lock", timeout=120):
            from mlflow import MlflowClient

            yield MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    # -- what was tracked, so that a stored chain needs no MLflow -----------------------------------------------------
    def _remembered(self, recipe: str) -> Tracked | None:
        known = self._recall(recipe)
        return Tracked(**known) if known else None

    def _remember(self, recipe: str, tracked: Tracked) -> None:
        self._write_memory(recipe, asdict(tracked))

    def _memory(self, key: str) -> Path:
        return self._folder / "tracked" / sha256_text(self.uri)[:12] / f"{key}.json"

    def _recall(self, key: str) -> Any:
        if self.uri.startswith("sqlite:///") and not Path(self.uri.removeprefix("sqlite:///")).is_file():
            return None  # the database was taken away: what it knew is gone
        try:
            return json.loads(self._memory(key).read_text())
        except (OSError, ValueError):
            return None

    def _write_memory(self, key: str, value: Any) -> None:
        path = self._memory(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{key}.{os.getpid()}")
        temporary.write_text(json.dumps(value, sort_keys=True))
        temporary.replace(path)


# -- what is logged ---------------------------------------------------------------------------------------------------
def _tags(artifact: Artifact, dagster_run_id: str, asset_key: str) -> dict[str, str]:
    """The same on runs and model versions: the way from MLflow back to Dagster and to the store."""
    recipe = artifact.manifest["recipe"]
    return {
        RECIPE_TAG: artifact.recipe,
        "rankd.version": artifact.version,
        "rankd.step": artifact.step,
        "rankd.scale": recipe["scale"],
        "rankd.seed": str(recipe["seed"]),
        "rankd.variant": recipe["variant"],
        "dagster.run_id": str(artifact.observed.get("run_id") or dagster_run_id),
        "dagster.asset_key": asset_key,
        **{f"rankd.input.{name}": entry["recipe"] for name, entry in artifact.manifest["inputs"].items()},
    }


def _log_params(client: "MlflowClient", run_id: str, artifact: Artifact) -> None:
    from mlflow.entities import Param

    recipe = artifact.manifest["recipe"]
    config = {key: value for key, value in recipe["config"].items() if key != "gates"}
    values = {**dict(_flat(config)), "code_version": recipe["code_version"], "seed": recipe["seed"]}
    params = [Param(name, str(value)[:500]) for name, value in values.items()]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])


def _log_metrics(client: "MlflowClient", run_id: str, artifact: Artifact) -> None:
    """The artifact's numbers, and its history by epoch. Time stamps come from the artifact, so that logging twice adds nothing."""
    from mlflow.entities import Metric

    at = _finished_ms(artifact)
    metrics = [Metric(name, float(value), at, 0) for name, value in _flat(artifact.metrics) if _is_number(value)]
    history = artifact.path / "history.json"
    for row in json.loads(history.read_text()) if history.is_file() else []:
        step = int(row.get("epoch", 0))
        numbers = {name: value for name, value in row.items() if _is_number(value) and name not in ("epoch", "epochs")}
        metrics += [Metric(f"epoch.{name}", float(value), at, step) for name, value in numbers.items()]
    for start in range(0, len(metrics), 500):
        client.log_batch(run_id, metrics=metrics[start : start + 500])


def _small_files(artifact: Artifact) -> Iterator[Path]:
    """Pictures, pages and JSON; data and weights stay in the store, which has their hashes."""
    for pattern in ("figures/*.png", "*.html", "*.json", "bundle/*.json", "bundle/*.html"):
        for path in sorted(artifact.path.glob(pattern)):
            if path.stat().st_size <= MAX_ARTIFACT_BYTES:
                yield path


def _write_flavour(artifact: Artifact, folder: Path) -> None:
    """An MLflow model folder that `mlflow.onnx` and `mlflow.pyfunc` load, around the shipped file itself."""
    import onnx
    from mlflow.onnx import save_model

    model = artifact.file(BUNDLE_MODEL)
    requirements = ["onnx", "onnxruntime"]
    save_model(onnx.load(model), str(folder), pip_requirements=requirements, onnx_execution_providers=["CPUExecutionProvider"])
    # MLflow writes the graph anew; the file that was profiled is the file that is delivered.
    shutil.copyfile(model, folder / "model.onnx")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (dotted name, value); lists are leaves."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{_metric_name(key)}" if name else _metric_name(key))
    elif name:
        yield name, value


def _metric_name(key: Any) -> str:
    """MLflow allows letters, digits, and _ - . space : / in names."""
    return "".join(char if char.isalnum() or char in "_-. :/" else "_" for char in str(key))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finished_ms(artifact: Artifact) -> int:
    return int(1000 * float(artifact.observed.get("finished") or 0.0))


# -- a server that is down --------------------------------------------------------------------------------------------
def _reachable(uri: str) -> None:
    """Raise OSError within 2 s if nobody listens, before any HTTP client starts to retry."""
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), timeout=2).close()


def _without_password(uri: str) -> str:
    scheme, found, rest = uri.partition("://")
    return f"{scheme}://{rest.rsplit('@', 1)[-1]}" if found else uri


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
