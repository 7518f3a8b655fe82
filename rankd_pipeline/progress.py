"""How a running step tells its progress: a small file beside the work, which the CLI draws as bars."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


class Progress:
    """Writes {step, done, total, text, started, pid} to one file per step, at most five times a second.

    A file rather than a pipe: the step may run in the CLI, in a Dagster child or under the daemon, and whoever
    wants to watch can. The file is removed when the step ends.
    """

    def __init__(self, path: Path | None, step: str) -> None:
        self._path, self._step = path, step
        self._started, self._last = time.time(), 0.0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, done: float, total: float, text: str = "") -> None:
        now = time.monotonic()
        if self._path is None or (now - self._last < 0.2 and done < total):
            return
        self._last = now
        state = {
            "step": self._step,
            "done": done,
            "total": total,
            "text": text,
            "started": self._started,
            "pid": os.getpid(),
        }
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(self._path)


@contextmanager
def progress_of(folder: Path | None, pipeline: str, step: str) -> Iterator[Progress]:
    """Progress of one step under `folder` (None: silent); the file goes away with the step."""
    path = folder / pipeline / f"{step}.json" if folder is not None else None
    try:
        progress = Progress(path, step)
        progress(0, 0)  # seen to run before its first unit of work is done
        yield progress
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def read_progress(folder: Path, pipeline: str) -> list[dict[str, Any]]:
    """What the steps of `pipeline` last said, oldest first; what a killed step left is skipped."""
    states = []
    for path in sorted((folder / pipeline).glob("*.json")):
        try:
            state = json.loads(path.read_text())
            if psutil.pid_exists(state["pid"]):  # else its step was killed and could not take the file away
                states.append(state)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(states, key=lambda state: state["started"])
