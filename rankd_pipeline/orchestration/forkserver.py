"""Preloaded by Dagster in the server that forks the steps, and imported nowhere else: it acts on import.

The server ends when the run's process does; from then on the kernel kills every step that was forked from it.
"""

from rankd_pipeline.orchestration.lifeline import hold_forked_children

hold_forked_children()
