"""Ties the life of a process to its parent's: `kill -9` of a run leaves no step behind to write beside the next one."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel (Linux) to kill this process when its parent dies; end now if it already has."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def hold_forked_children() -> None:
    """From now on every process that this one forks dies with it, and so on down."""
    parent = [os.getpid()]

    def remember_parent() -> None:
        parent[0] = os.getpid()

    os.register_at_fork(before=remember_parent, after_in_child=lambda: die_with_parent(parent[0]))
