"""Which Dagster runs are still alive: a run that lost its process is reported as failed, so that it frees its pool.

Dagster's default launcher has no health check: after a power cut a run stays STARTED for ever and the next nightly
stays queued behind it.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from dagster import DagsterInstance, DagsterRun

PROCESS_TAG = "rankd/process"
STARTING_GRACE_S = 60.0
"""A run without a process tag is between its creation and its executor: that takes seconds, unless it was killed."""


def process_tag() -> dict[str, str]:
    """This process as a run tag: host, boot, pid and start time tell it from any later process with the same pid."""
    started = psutil.Process().create_time()
    state = {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "started": round(started, 2)}
    return {PROCESS_TAG: json.dumps(state, sort_keys=True)}


def is_alive(tag: str) -> bool | None:
    """Whether the process of a `rankd/process` tag lives; None if it belongs to another host, which only it can tell."""
    state: dict[str, Any] = json.loads(tag)
    if state["host"] != socket.gethostname():
        return None
    if state["boot"] != _boot_id():
        return False
    try:
        process = psutil.Process(state["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - state["started"]) < 0.05
    except psutil.NoSuchProcess:
        return False


def reap_orphans(instance: "DagsterInstance") -> list[str]:
    """Report every run as failed whose process is gone; returns their run ids. Safe beside a live daemon or CLI run."""
    from dagster import DagsterRunStatus, RunsFilter

    running = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]
    reaped = []
    for record in instance.get_run_records(RunsFilter(statuses=running)):
        run = record.dagster_run
        if _is_orphan(run, record.update_timestamp.timestamp()):
            instance.report_run_failed(run, "its process is gone (killed, or the host went down); what was finished is stored")
            reaped.append(run.run_id)
    return reaped


def _is_orphan(run: "DagsterRun", updated: float) -> bool:
    tag = run.tags.get(PROCESS_TAG)
    if tag is None:
        return time.time() - updated > STARTING_GRACE_S
    return is_alive(tag) is False


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else str(int(psutil.boot_time()))
