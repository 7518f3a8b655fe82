"""Keeps each step's stdout and stderr as files for the UI, without a `tail` and a watcher process beside every step."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagster import Field, StringSource
from dagster._core.execution.compute_logs import redirect_to_file
from dagster._core.storage.compute_log_manager import CapturedLogContext
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._serdes import ConfigurableClassData


class FileComputeLogManager(LocalComputeLogManager):
    """Dagster's local log manager, minus the copy to the terminal.

    The copy costs four processes a step; they wake up while a latency is measured and outlive a killed step.
    """

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """base_dir: folder of the logs; default $DAGSTER_HOME/storage, as Dagster has it."""
        return {"base_dir": Field(StringSource, is_required=False)}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> "FileComputeLogManager":
        base_dir = config_value.get("base_dir") or os.path.join(os.environ["DAGSTER_HOME"], "storage")
        return cls(base_dir=base_dir, inst_data=inst_data)

    @contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
        """Both streams go to their files until the step ends; an empty `.complete` file tells the UI that it has."""
        out, err = (Path(self.get_captured_local_path(log_key, kind)) for kind in ("out", "err"))
        out.parent.mkdir(parents=True, exist_ok=True)
        with redirect_to_file(sys.stdout, str(out)), redirect_to_file(sys.stderr, str(err)):
            yield CapturedLogContext(log_key)
        Path(self.complete_artifact_path(log_key)).touch()
