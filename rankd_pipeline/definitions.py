"""The code location: every pipeline under defs/, the shared resources and the executor. Light: no torch, no MLflow."""

import os
from pathlib import Path

import dagster as dg

from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.resources import common
from rankd_pipeline.settings import TELEMETRY_OFF, settings

os.environ.update(TELEMETRY_OFF)


def check_home() -> None:
    """Refuse to load without a home, or beside another instance: runs would be recorded where nobody looks.

    Raises: RankdError naming the command to run.
    """
    current = settings()
    here = f"RANKD_HOME={current.home} DAGSTER_HOME={current.dagster_home}"
    if not current.initialised:
        raise RankdError(f"{current.home}: not a rankd home yet; run `rankd init`, then `export {here}` and try again.")
    found = os.environ.get("DAGSTER_HOME")
    if found is None or Path(found).resolve() != current.dagster_home:
        raise RankdError(
            f"DAGSTER_HOME is {found or 'not set'}, expected {current.dagster_home} (made by `rankd init`); "
            f"run `export {here}` and try again."
        )


@dg.definitions
def defs() -> dg.Definitions:
    """All pipelines of this installation."""
    check_home()
    return dg.Definitions.merge(dg.load_from_defs_folder(path_within_project=Path(__file__).parent), common())
