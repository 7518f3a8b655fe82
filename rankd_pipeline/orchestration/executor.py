"""One executor for CLI, UI and daemon: a process a step, forked from a server that has loaded torch, or one for all steps."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from rankd_pipeline.errors import INTERRUPTED
from rankd_pipeline.orchestration.field import pin_site
from rankd_pipeline.orchestration.liveness import process_tag
from rankd_pipeline.orchestration.metadata import exit_code_of

PRELOAD = [
    "torch", "pandas", "matplotlib.figure", "mlflow", "rankd_pipeline.orchestration.forkserver", "rankd_pipeline.definitions",
]  # fmt: skip
"""Imported once in the forkserver: a step then starts in 0.7 s instead of 2.8 s."""


class ChainExecutor(dg.Executor):
    """Marks the run with its process, then hands over to Dagster's own executor."""

    def __init__(self, inner: dg.Executor, in_process: bool) -> None:
        self._inner, self._in_process = inner, in_process

    @property
    def retries(self) -> Any:
        return self._inner.retries

    @property
    def step_dependency_config(self) -> Any:
        return self._inner.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[Any]:
        """Run the plan; tags tell its process (for the reaper) and what it computes (to find it in the UI)."""
        chosen = plan_context.run_config.get("resources", {}).get("rankd", {}).get("config", {})
        tags = {f"rankd/{name}": str(value) for name, value in chosen.items()}
        plan_context.instance.add_run_tags(plan_context.run_id, {**tags, **process_tag()})
        pin_site(plan_context.instance, plan_context.run_id, plan_context.dagster_run.tags)
        for event in self._inner.execute(plan_context, execution_plan):
            yield event
            # A run in processes ends when all of them have; one in a single process would go on with what needs not this step.
            if self._in_process and event.is_step_failure and exit_code_of(event.step_failure_data) == INTERRUPTED:
                raise dg.DagsterExecutionInterruptedError


@dg.executor(
    name="chain",
    config_schema={
        "in_process": dg.Field(
            bool, default_value=False, description="Run the steps in the run's own process: quicker, but a crash ends the run."
        )
    },
    requirements=lambda config: [] if config.get("in_process") else dg.multiple_process_executor_requirements(),
)
def chain_executor(init_context: dg.InitExecutorContext) -> ChainExecutor:
    """One step at a time, each in a process of its own that gives its memory back."""
    retries = {"enabled": {}}
    in_process = bool(init_context.executor_config.get("in_process"))
    if in_process:
        definition, config = dg.in_process_executor, {"retries": retries}
    else:
        start = {"forkserver": {"preload_modules": PRELOAD}}
        definition, config = dg.multiprocess_executor, {"retries": retries, "max_concurrent": 1, "start_method": start}
    assert definition.executor_creation_fn is not None
    return ChainExecutor(definition.executor_creation_fn(init_context._replace(executor_config=config)), in_process)
