"""Parallelism across jobs (corpus shards, students of several seeds): one process each, one torch thread each."""

import contextlib
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch

from rankd_pipeline.errors import RankdError

_SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Workers:
    """Up to `count` worker processes, started when jobs first need them and kept for the next jobs until the block ends.

    Workers are spawned, not forked: torch's thread pools do not survive a fork. They die with this process, however it
    dies, and each runs its jobs on one torch thread.

        with Workers(2) as workers:
            students = workers.map(train, jobs)
            scores = workers.map(score, students)
    """

    def __init__(self, count: int) -> None:
        """Raises RankdError for a count below 1."""
        if count < 1:
            raise RankdError(f"the number of worker processes is {count}; it must be at least 1")
        self._count = count
        self._pool: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._pool.items():
            connection.close()
            process.kill()
            process.join()
        self._pool.clear()

    def map(
        self, fn: Callable[[Any], Any], jobs: Sequence[Any], on_done: Callable[[int, Any], None] | None = None
    ) -> list[Any]:  # fmt: skip
        """Return `[fn(job) for job in jobs]`; the result does not depend on how many workers there are.

        Each worker takes the next job when it is free. With one worker (or one job, and no worker yet) the jobs run here,
        in turn. After an error no more jobs can be given.

        Args:
            fn: a module-level function; its argument and result travel through multiprocessing's own channel.
            on_done: called here with (index of the job, result), in the order in which the jobs end.

        Raises:
            RankdError: a worker died (killed, out of memory), or `fn` raised it.
            RuntimeError: `fn` raised anything else; the worker's traceback is in the message.
        """
        results: list[Any] = [None] * len(jobs)
        wanted = min(self._count, len(jobs))
        for index, result in self._here(fn, jobs) if max(wanted, len(self._pool)) <= 1 else self._away(fn, jobs, wanted):
            results[index] = result
            if on_done is not None:
                on_done(index, result)
        return results

    def _here(self, fn: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        with _one_torch_thread():
            yield from ((index, fn(job)) for index, job in enumerate(jobs))

    def _away(self, fn: Callable[[Any], Any], jobs: Sequence[Any], wanted: int) -> Iterator[tuple[int, Any]]:
        while len(self._pool) < wanted:
            connection, process = _start_worker()
            self._pool[connection] = process
        pending = iter(enumerate(jobs))
        running = {connection: index for connection in self._pool if (index := _send_next(connection, fn, pending)) >= 0}
        while running:
            for connection in cast(list[Connection], wait(list(running))):
                index = running.pop(connection)
                yield index, _receive(connection, self._pool[connection], index, len(jobs))
                following = _send_next(connection, fn, pending)
                if following >= 0:
                    running[connection] = following


def map_processes(
    fn: Callable[[Any], Any],
    jobs: Sequence[Any],
    workers: int,
    on_done: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """`Workers(workers).map(fn, jobs, on_done)`, for one set of jobs: all workers are gone when it returns or raises."""
    with Workers(workers) as pool:
        return pool.map(fn, jobs, on_done)


def _start_worker() -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), name="rankd-worker")
    # The libraries read these when the child imports them, before any line of ours runs there.
    with _environment(_SINGLE_THREAD):
        process.start()
    there.close()
    return here, process


def _send_next(connection: Connection, fn: Callable[[Any], Any], pending: Iterator[tuple[int, Any]]) -> int:
    """Send the next job and return its index, or -1 when there is none left."""
    index, job = next(pending, (-1, None))
    if index >= 0:
        # A worker that is already gone is reported when its answer is awaited.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send((fn, job))
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


def _work(connection: Connection) -> None:
    """A worker's life: jobs in, results out, until the pipe closes."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            fn, job = connection.recv()
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
