"""Where rankd keeps its things: one setting, RANKD_HOME, and one more for each part that can live on a server."""

import os
from dataclasses import dataclass
from pathlib import Path

from rankd_pipeline.errors import RankdError

TELEMETRY_OFF = {
    "DAGSTER_DISABLE_TELEMETRY": "yes",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Settings:
    """Resolved settings.

    home: folder that holds the Dagster instance, the databases, the store (RANKD_HOME, default ./data).
    store_uri: fsspec URI of the artifact store (RANKD_STORE, default <home>/store).
    mlflow_uri: MLflow tracking and registry URI (RANKD_MLFLOW_URI, default SQLite under <home>/mlflow).
    postgres_url: libpq URL of Dagster's storage (RANKD_DAGSTER_POSTGRES_URL); None means SQLite under <home>/dagster.
    workers: processes that a step may use for shards and seeds (RANKD_WORKERS, default the CPUs this process may use).
    """

    home: Path
    store_uri: str
    mlflow_uri: str
    postgres_url: str | None
    workers: int

    @property
    def dagster_home(self) -> Path:
        return self.home / "dagster"

    @property
    def mlflow_dir(self) -> Path:
        return self.home / "mlflow"

    @property
    def progress_dir(self) -> Path:
        return self.home / "progress"

    @property
    def serving_dir(self) -> Path:
        """`<pipeline>/bundle` in it is what a consumer reads; `<pipeline>/ledger.jsonl` says since when and why."""
        return self.home / "serving"

    def telemetry_dir(self, pipeline: str) -> Path:
        """Where a pipeline's telemetry is dropped."""
        return self.home / "telemetry" / pipeline

    @property
    def initialised(self) -> bool:
        return (self.home / "rankd.json").is_file()


def settings() -> Settings:
    """Read the settings from the environment, each time anew, so that tests and child processes agree."""
    home = Path(os.environ.get("RANKD_HOME", "data")).expanduser().resolve()
    return Settings(
        home=home,
        store_uri=os.environ.get("RANKD_STORE", str(home / "store")),
        mlflow_uri=with_driver(os.environ.get("RANKD_MLFLOW_URI", f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")),
        postgres_url=with_driver(os.environ.get("RANKD_DAGSTER_POSTGRES_URL", "")) or None,
        workers=_workers(),
    )


def with_driver(url: str) -> str:
    """A libpq URL with the driver named that dagster-postgres works with; any other URL as it is."""
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg2://{rest}" if separator and scheme in ("postgres", "postgresql") else url


def _workers() -> int:
    text = os.environ.get("RANKD_WORKERS", "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise RankdError(f"RANKD_WORKERS: found {text!r}, expected a whole number of processes from 1 up.")
    return int(text) if text else len(os.sched_getaffinity(0))


def prepare_environment() -> Settings:
    """Set what every entry point needs before Dagster or MLflow is imported: telemetry off, DAGSTER_HOME."""
    os.environ.update(TELEMETRY_OFF)
    current = settings()
    os.environ["RANKD_HOME"] = str(current.home)
    os.environ["DAGSTER_HOME"] = str(current.dagster_home)
    return current


def inside(root: Path, name: str, where: str) -> Path:
    """`name` as a path inside `root`, links followed.

    Raises: RankdError if it leads out of `root`.
    """
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise RankdError(f"{where}: {name!r} leads out of {root}; give a path inside it.")
    return path
