"""Preloaded by Dagster in the server that forks the steps, and imported nowhere else: it acts on import.

Python's forkserver outlives the run that started it for as long as one of its children does. Here the kernel kills it
with the run's process, and its children with it.
"""

import os

from rankd_pipeline.orchestration.lifeline import die_with_parent, hold_forked_children

if os.getppid() == 1:  # the run, always some process's child, is gone already
    os._exit(1)
die_with_parent(os.getppid())
hold_forked_children()
