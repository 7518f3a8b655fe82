"""Ties the life of a process to its parent's: `kill -9` of a run leaves no step behind to write beside the next one."""

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
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
