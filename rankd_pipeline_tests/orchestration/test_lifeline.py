"""How processes end."""

import os
import signal
import time

import pytest

from rankd_pipeline.orchestration import lifeline


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
