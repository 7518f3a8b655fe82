"""Parallelism across jobs (corpus shards, students of several seeds): one process each, one torch thread each."""

import contextlib
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from rankd_pipeline.errors import RankdError

_SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def map_processes(
    fn: Callable[[Any], Any],
    jobs: Sequence[Any],
    workers: int,
    on_done: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Return `[fn(job) for job in jobs]`, computed by `workers` processes; the result does not depend on how many.

    Each worker takes the next job when it is free and runs it on one torch thread. With one worker (or one job) the
    jobs run here, in turn. Workers are spawned, not forked: torch's thread pools do not survive a fork. They die with
    this process, however it dies.

    Args:
        fn: a module-level function; its argument and result travel through multiprocessing's own channel.
        on_done: called here with (index of the job, result), in the order in which the jobs end.

    Raises:
        RankdError: a worker died (killed, out of memory), or `fn` raised it.
        RuntimeError: `fn` raised anything else; the worker's traceback is in the message.
    """
    if workers < 1:
        raise RankdError(f"the number of worker processes is {workers}; it must be at least 1")
    results: list[Any] = [None] * len(jobs)
    if min(workers, len(jobs)) <= 1:
        with _one_torch_thread():
            for index, job in enumerate(jobs):
                results[index] = fn(job)
                if on_done is not None:
                    on_done(index, results[index])
        return results
    for index, result in _in_workers(fn, jobs, min(workers, len(jobs))):
        results[index] = result
        if on_done is not None:
            on_done(index, result)
    return results


def _in_workers(fn: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
    """Yield (index, result) as jobs end; all workers are gone when the iteration ends, is closed, or fails."""
    pool: dict[Connection, BaseProcess] = {}
    pending = iter(enumerate(jobs))
    running: dict[Connection, int] = {}
    try:
        for _ in range(workers):
            connection, process = _start_worker(fn)
            pool[connection] = process
            running[connection] = _send_next(connection, pending)
        while running:
            for connection in wait(list(running)):
                index = running.pop(connection)  # type: ignore[arg-type]
                yield index, _receive(connection, pool[connection], index, len(jobs))  # type: ignore[arg-type,index]
                following = _send_next(connection, pending)  # type: ignore[arg-type]
                if following >= 0:
                    running[connection] = following  # type: ignore[index]
    finally:
        for connection, process in pool.items():
            connection.close()
            process.kill()
            process.join()


def _start_worker(fn: Callable[[Any], Any]) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(fn, there), name="rankd-worker")
    # The libraries read these when the child imports them, before any line of ours runs there.
    with _environment(_SINGLE_THREAD):
        process.start()
    there.close()
    return here, process


def _send_next(connection: Connection, pending: Iterator[tuple[int, Any]]) -> int:
    """Send the next job and return its index, or -1 when there is none left."""
    index, job = next(pending, (-1, None))
    if index >= 0:
        # A worker that is already gone is reported when its answer is awaited.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(job)
    return index


def _receive(connection: Connection, process: BaseProcess, index: int, count: int) -> Any:
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code} (memory short?)" if code < 0 else f"exited with code {code}"
        raise RankdError(f"the worker process for job {index + 1} of {count} {how}; what is finished is kept, run again") from error
    if kind == "result":
        return value
    if kind == "refused":
        raise RankdError(value)
    raise RuntimeError(f"job {index + 1} of {count} failed in its worker process:\n{value}")


def _work(fn: Callable[[Any], Any], connection: Connection) -> None:
    """A worker's life: jobs in, results out, until the pipe closes."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", fn(job))
        except RankdError as error:
            answer = ("refused", str(error))
        except Exception:
            answer = ("failed", traceback.format_exc())
        connection.send(answer)


def _die_with_parent() -> None:
    """Wait for the parent's end, then leave at once: a killed step must leave no process behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
