"""Creates a rankd home once: Dagster's instance and pools, MLflow's database. Both migrate badly when raced or killed."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.lifeline import die_with
from rankd_pipeline.settings import TELEMETRY_OFF, Settings

TEMPLATE = Path(__file__).with_name("dagster.yaml")
DEFS = Path(__file__).parents[1] / "defs"
STAMP = "rankd.json"


def pool_name(pipeline: str) -> str:
    """The Dagster pool that keeps the runs of one pipeline apart."""
    return f"rankd_{pipeline}"


def initialise(current: Settings) -> bool:
    """Make the home usable, once; True if there was something to do.

    Idempotent, safe to run from several processes, and safe to kill: databases are migrated beside their place and
    renamed into it, and `rankd.json` is written last. It is done again when a version, a server or a pipeline changed.

    Raises: RankdError if the home cannot be written or a database refuses.
    """
    wanted = _fingerprint(current)
    if _stamp(current) == wanted:
        return False
    try:
        current.home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(current.home / ".init.lock")
        with lock:
            if _stamp(current) == wanted:
                return False
            mlflow = _start_mlflow_migration(current)
            _prepare_dagster(current)
            _finish_mlflow_migration(mlflow, current)
            _write_atomically(current.home / STAMP, json.dumps(wanted, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise RankdError(
            f"{current.home}: cannot be set up as rankd's home ({error}); set RANKD_HOME to a folder you can write."
        ) from None
    return True


def _fingerprint(current: Settings) -> dict[str, Any]:
    """What the set-up depends on; a home may be moved. Servers appear as hashes: their URLs may hold a password."""
    return {
        "template": hashlib.sha256(TEMPLATE.read_bytes()).hexdigest()[:16],
        "pipelines": sorted(path.parent.name for path in DEFS.glob("*/defs.yaml")),
        "dagster": version("dagster"),
        "mlflow": version("mlflow"),
        "postgres": _short_hash(current.postgres_url),
        "mlflow_uri": _short_hash(current.mlflow_uri.replace(str(current.home), "")),
    }


def _stamp(current: Settings) -> dict[str, Any] | None:
    """The fingerprint of the last set-up; None if there was none, or if what it made was taken away."""
    database = current.mlflow_uri.removeprefix("sqlite:///")
    if database != current.mlflow_uri and not Path(database).is_file():
        return None
    if not (current.dagster_home / "dagster.yaml").is_file():
        return None
    try:
        return json.loads((current.home / STAMP).read_text())
    except (OSError, ValueError):
        return None


def _short_hash(text: str | None) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


# -- Dagster ------------------------------------------------------------------------------------------------------
def _prepare_dagster(current: Settings) -> None:
    """dagster.yaml, the instance's tables and its pools; a first SQLite instance is made beside its place."""
    home = current.dagster_home
    fresh = not (home / "dagster.yaml").exists()
    folder = home.with_name(".dagster-new") if fresh else home
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    _write_atomically(folder / "dagster.yaml", _instance_yaml(current))
    _migrate_instance(folder)
    if fresh:
        shutil.rmtree(home, ignore_errors=True)
        folder.rename(home)


def _instance_yaml(current: Settings) -> str:
    text = TEMPLATE.read_text()
    if current.postgres_url:
        url = {"postgres_url": {"env": "RANKD_DAGSTER_POSTGRES_URL"}}
        custom = {"module": "rankd_pipeline.orchestration.postgres", "class": "PostgresStorage", "config": url}
        text += yaml.safe_dump({"storage": {"custom": custom}})
    return text


def _migrate_instance(folder: Path) -> None:
    """Create or upgrade the tables and set one slot per pipeline: a pool that Dagster first meets in a run is not enforced."""
    os.environ.update(TELEMETRY_OFF)
    text = (folder / "dagster.yaml").read_text()
    before = os.environ.get("DAGSTER_HOME")
    os.environ["DAGSTER_HOME"] = str(folder)
    try:
        import dagster as dg

        with contextlib.redirect_stdout(io.StringIO()), dg.DagsterInstance.from_config(str(folder)) as instance:
            instance.upgrade()
            for pipeline in sorted(path.parent.name for path in DEFS.glob("*/defs.yaml")):
                instance.event_log_storage.set_concurrency_slots(pool_name(pipeline), 1)
    except ImportError as error:
        raise RankdError(f"Dagster's storage: {error}; pip install 'rankd-pipeline[postgres]' and run again.") from None
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        where = "the database of RANKD_DAGSTER_POSTGRES_URL" if "PostgresStorage" in text else str(folder)
        raise RankdError(f"Dagster's storage cannot be set up in {where} ({type(error).__name__}: {detail}).") from error
    finally:
        if before is None:
            del os.environ["DAGSTER_HOME"]
        else:
            os.environ["DAGSTER_HOME"] = before


# -- MLflow -------------------------------------------------------------------------------------------------------
def _start_mlflow_migration(current: Settings) -> "tuple[subprocess.Popen[bytes], Path | None] | None":
    """`mlflow db upgrade` in its own process while Dagster migrates; nothing to do for a tracking server."""
    if current.mlflow_uri.startswith(("http://", "https://", "databricks")):
        return None
    scheme, _, path = current.mlflow_uri.partition(":///")
    working: Path | None = None
    uri = current.mlflow_uri
    if scheme == "sqlite":
        database = Path(path)
        database.parent.mkdir(parents=True, exist_ok=True)
        for left in database.parent.glob(".mlflow-new-*"):
            left.unlink(missing_ok=True)
        working = database.with_name(f".mlflow-new-{os.getpid()}.db")
        if database.exists():
            shutil.copyfile(database, working)
        else:
            shutil.rmtree(current.mlflow_dir / "tracked", ignore_errors=True)  # what a lost database knew
        uri = f"sqlite:///{working}"
    environment = {**os.environ, **TELEMETRY_OFF}
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=die_with(os.getpid())
    )
    return process, working


def _finish_mlflow_migration(started: "tuple[subprocess.Popen[bytes], Path | None] | None", current: Settings) -> None:
    if started is None:
        return
    process, working = started
    output = process.communicate()[0].decode(errors="replace").strip()
    if process.returncode != 0:
        last = output.splitlines()[-1] if output else f"exit code {process.returncode}"
        raise RankdError(f"MLflow's database cannot be set up ({last}); check RANKD_MLFLOW_URI.")
    if working is not None:
        working.replace(current.mlflow_uri.partition(":///")[2])
