"""How processes end: `kill -9` of a run leaves no step behind to write beside the next one, and Ctrl-C always arrives."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PR_SET_PDEATHSIG = 1
REPEAT_S = 3.0
"""After how long an unheard interrupt is sent again: longer than a heard one needs to leave the block."""
_libc = ctypes.CDLL(None, use_errno=True)  # looked up before any fork


def die_with_parent(parent_pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel (Linux) to send this process `how` when its parent dies; end now if it already has."""
    _libc.prctl(PR_SET_PDEATHSIG, how)
    if os.getppid() != parent_pid:
        os._exit(1)


def die_with(parent_pid: int, how: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """For subprocess's preexec_fn: the child ends with the process that starts it, and hears Ctrl-C again.

    A shell's background job has SIGINT ignored, and its children would inherit that.
    """

    def in_child() -> None:
        die_with_parent(parent_pid, how)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return in_child


def hold_forked_children() -> None:
    """From now on every process that this one forks dies with it, and so on down."""
    parent = [os.getpid()]

    def remember_parent() -> None:
        parent[0] = os.getpid()

    os.register_at_fork(before=remember_parent, after_in_child=lambda: die_with_parent(parent[0]))


@contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Within the block an interrupt is repeated until it is heard.

    The exception that a signal raises is printed and lost if it comes while Python collects garbage, as it often does
    while large libraries are imported; the step would then run to its end.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    if threading.current_thread() is not threading.main_thread() or not all(callable(item) for item in handlers.values()):
        yield
        return
    pending: list[threading.Timer] = []

    def repeat_then_raise(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(REPEAT_S, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
        pending.append(timer)
        handlers[signal.Signals(number)](number, frame)  # type: ignore[operator]  (callable, see above)

    try:
        for number in numbers:
            signal.signal(number, repeat_then_raise)
        yield
    finally:
        for timer in pending:
            timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
