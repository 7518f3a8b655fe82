"""How processes end."""

import os
import signal
import time
from pathlib import Path

import dagster as dg
import pytest

from rankd_pipeline.errors import INTERRUPTED
from rankd_pipeline.orchestration import lifeline
from rankd_pipeline.orchestration.executor import chain_executor


class _Deaf:
    """Is interrupted in its destructor, where an exception can only be printed."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_destructor_swallows_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "REPEAT_S", 0.1)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        swallowed = False
        with pytest.raises(KeyboardInterrupt), lifeline.insistent_interrupts():
            _Deaf()
            swallowed = True
            time.sleep(5)
        assert swallowed
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        time.sleep(0.2)  # and none comes after the block
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


class _HowItEnds(dg.ConfigurableResource):
    code: int
    log: str


@dg.op
def a_fails(ends: _HowItEnds) -> None:
    raise dg.Failure(description="why", metadata={"exit_code": ends.code}, allow_retries=False)


@dg.op
def b_needs_nothing(ends: _HowItEnds) -> None:
    Path(ends.log).touch()


@dg.job(executor_def=chain_executor, resource_defs={"ends": _HowItEnds.configure_at_launch()})
def both() -> None:
    a_fails()
    b_needs_nothing()


@pytest.mark.parametrize(("code", "goes_on"), [(INTERRUPTED, False), (1, True)])
def test_an_interrupted_run_in_one_process_starts_no_further_step(tmp_path: Path, code: int, goes_on: bool) -> None:
    log = tmp_path / "ran"
    resource = {"ends": {"config": {"code": code, "log": str(log)}}}
    with dg.instance_for_test() as instance:
        run = dg.execute_job(
            dg.reconstructable(both), instance, {"execution": {"config": {"in_process": True}}, "resources": resource}
        )
        assert not run.success
        assert log.exists() == goes_on
