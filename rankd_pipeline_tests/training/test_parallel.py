"""Jobs over processes: order, errors, a killed worker, and no orphan when the parent is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from rankd_pipeline.errors import RankdError
from rankd_pipeline.training.parallel import Workers, map_processes


def square(job: dict) -> dict:
    return {"value": job["value"] ** 2, "threads": torch.get_num_threads(), "array": np.arange(job["value"])}


def troubled(job: str) -> str:
    if job == "refuse":
        raise RankdError("row 3 is bad")
    if job == "fail":
        raise KeyError("beam")
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def sleep_long(job: str) -> None:
    Path(job).write_text(str(os.getpid()))
    time.sleep(120)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_job_order_and_on_one_thread(workers):
    jobs = [{"value": v} for v in range(5)]
    done = []
    results = map_processes(square, jobs, workers, on_done=lambda i, r: done.append((i, r["value"])))
    assert [r["value"] for r in results] == [0, 1, 4, 9, 16]
    assert {r["threads"] for r in results} == {1}
    assert [len(r["array"]) for r in results] == [0, 1, 2, 3, 4]
    assert sorted(done) == [(v, v**2) for v in range(5)]


def test_every_kind_of_failure_is_told_and_leaves_no_child():
    with pytest.raises(RankdError, match="row 3 is bad"):
        map_processes(troubled, ["ok", "refuse"], 2)
    with pytest.raises(RuntimeError, match="(?s)job 2 of 2 failed.*KeyError: 'beam'"):
        map_processes(troubled, ["ok", "fail"], 2)
    with pytest.raises(RankdError, match="job 1 of 2 was killed by signal 9"):
        map_processes(troubled, ["die", "ok"], 2)
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    with pytest.raises(RankdError, match="at least 1"):
        map_processes(square, [], 0)
    assert map_processes(square, [], 2) == []


def own_pid(job: int) -> tuple[int, int]:
    time.sleep(0.3)  # long enough for the other worker to take its share
    return job, os.getpid()


def test_workers_stay_for_the_next_jobs_and_go_with_the_block():
    with Workers(2) as workers:
        alone = workers.map(own_pid, [7])
        first, second = workers.map(own_pid, [1, 2, 3, 4]), workers.map(own_pid, [5, 6])
        assert workers.map(square, []) == []
        assert [r["value"] for r in workers.map(square, [{"value": 3}])] == [9]
    assert [job for job, _ in [*alone, *first, *second]] == [7, 1, 2, 3, 4, 5, 6]
    pids = {pid for _, pid in first}
    assert {pid for _, pid in alone} == {os.getpid()}  # one job needs no process
    assert len(pids) == 2 and {pid for _, pid in second} <= pids
    assert not any(map(alive, pids))


def test_killed_parent_leaves_no_orphan(tmp_path):
    root = str(Path(__file__).parents[2])
    marks = [str(tmp_path / name) for name in ("a", "b")]
    script = (
        "import sys; from rankd_pipeline.training.parallel import map_processes;"
        "from rankd_pipeline_tests.training.test_parallel import sleep_long;"
        "map_processes(sleep_long, sys.argv[1:], 2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, *marks], cwd=root)
    deadline = time.monotonic() + 60
    while not all(Path(m).exists() and Path(m).read_text() for m in marks) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(Path(m).read_text()) for m in marks]
    assert len(set(children)) == 2 and all(psutil.pid_exists(pid) for pid in children)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, children))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
