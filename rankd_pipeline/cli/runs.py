"""`rankd init`, `run`, `plan`, `functions` and `ui`: set up a home, run a chain, say what a run would do."""

import shutil
import time
from typing import TYPE_CHECKING

import click

from rankd_pipeline.cli.console import SCALE, console
from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import Settings, settings

if TYPE_CHECKING:
    from rankd_pipeline.orchestration.execute import RunOutcome
    from rankd_pipeline.spec import PipelineConfig


@click.command()
def init() -> None:
    """Create the home (RANKD_HOME, default ./data): Dagster's instance and pools, MLflow's database."""
    prepare_home(settings())
    click.echo(f"home: {settings().home}")


def prepare_home(current: Settings) -> None:
    """Initialise the home once and say so, because the first time takes half a minute."""
    from rankd_pipeline.orchestration.setup import initialise

    if not current.initialised:
        click.echo(f"Setting up {current.home}: Dagster's instance and MLflow's database, once.", err=True)
    initialise(current)


@click.command()
@click.argument("function")
@click.option("--scale", type=SCALE, default="laptop", show_default=True, help="smoke: seconds to a minute; laptop: minutes; gpu.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option("--variant", default="default", show_default=True, help="A variant named in the pipeline's YAML.")
@click.option("--step", "steps", multiple=True, metavar="STEP", help="Only this step (repeat for several); its inputs must exist.")
def run(function: str, scale: str, seed: int, variant: str, steps: tuple[str, ...]) -> int:
    """Run the chain of FUNCTION through Dagster; what is stored costs nothing."""
    from rankd_pipeline.cli.live import watched
    from rankd_pipeline.orchestration.execute import execute_chain
    from rankd_pipeline.spec import load_pipeline
    from rankd_pipeline.steps.chain import STEPS

    current, started = settings(), time.monotonic()
    config = load_pipeline(function)
    config.at(scale, seed, variant)  # a wrong key is told before anything is set up
    unknown = next((step for step in steps if step not in STEPS), None)
    if unknown:
        raise RankdError(f"step {unknown!r}: unknown; expected one of {', '.join(STEPS)}.")
    prepare_home(current)
    with watched(config.pipeline, steps or tuple(STEPS), current.progress_dir) as watch:
        outcome = execute_chain(function, scale, seed, variant, current, steps or None, watch=watch)
    return _say_outcome(outcome, config, current, time.monotonic() - started)


def _say_outcome(outcome: "RunOutcome", config: "PipelineConfig", current: Settings, seconds: float) -> int:
    """The scorecard, where things lie, and how the run ended."""
    from rankd_pipeline.cli.reports import print_scorecard, with_inputs
    from rankd_pipeline.steps.runner import open_store

    store = open_store(current)
    use = next((use for use in store.runs(config.pipeline) if use.run_id == outcome.run_id), None)
    if use is not None and outcome.status in ("success", "stopped"):
        print_scorecard(config, with_inputs(config.pipeline, use.recipes, store), current)
    if outcome.status == "success":
        click.echo(f"\nDone in {seconds:.0f} s. Look at it: `rankd ui` (Dagster on 127.0.0.1:3000, MLflow on 127.0.0.1:5000).")
        return 0
    what = {"stopped": "stopped by a gate", "interrupted": "interrupted"}.get(outcome.status, "failed")
    at = f" at {outcome.failed_step}" if outcome.failed_step else ""
    log = current.home / "logs" / f"{config.pipeline}.log"
    message = _full_disk(current) if outcome.status == "failed" else None
    click.echo(f"\nrankd: {what}{at}: {message or outcome.message}", err=True)
    if outcome.status == "failed" and str(log) not in outcome.message:
        click.echo(f"The run's log: {log}", err=True)
    return outcome.exit_code or 1


def _full_disk(current: Settings) -> str | None:
    """A full disk fails in many ways, Dagster's database first; the cause is told, not its many faces."""
    free = shutil.disk_usage(current.home).free
    if free > 1_000_000:
        return None
    return (
        f"the disk that holds {current.home} is full ({free / 1e3:.0f} kB left). What is finished is stored: free space "
        "(`rankd gc` lists what may go) and run the same command again."
    )


@click.command()
@click.argument("function")
@click.option("--scale", type=SCALE, default="laptop", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--variant", default="default", show_default=True)
def plan(function: str, scale: str, seed: int, variant: str) -> None:
    """What a run of FUNCTION would make anew, why, and about how long it took last time."""
    from rich.table import Table

    from rankd_pipeline.spec import load_pipeline
    from rankd_pipeline.steps.runner import open_store
    from rankd_pipeline.steps.runner import plan as plan_steps

    spec = load_pipeline(function).at(scale, seed, variant)
    rows = plan_steps(spec, open_store(settings()))
    table = Table("step", "would run", "why", "about", box=None, pad_edge=False)
    for row in rows:
        about = "" if row.seconds is None else f"{row.seconds:.1f} s" if row.runs else f"(took {row.seconds:.1f} s)"
        table.add_row(row.step, "yes" if row.runs else "no", row.reason, about)
    console().print(table)
    running = [row for row in rows if row.runs]
    known = sum(row.seconds for row in running if row.seconds is not None)
    unknown = sum(row.seconds is None for row in running)
    note = f", and {unknown} never timed here at this scale" if unknown else ""
    click.echo(f"{len(running)} of {len(rows)} steps would run: about {known:.0f} s{note}." if running else "Nothing would run.")


@click.command()
def functions() -> None:
    """The RAN functions and pipelines that this installation knows, and what serves now."""
    from rich.table import Table

    from rankd_pipeline.ran_functions.registry import load_function
    from rankd_pipeline.spec import load_pipeline, pipeline_files
    from rankd_pipeline.store.ledger import open_ledger

    current = settings()
    table = Table("pipeline", "RAN function", "metric", "budget", "champion", box=None, pad_edge=False)
    for name in pipeline_files():
        config = load_pipeline(name)
        function = load_function(config.function)
        better = "higher" if function.metric.higher_is_better else "lower"
        champion = open_ledger(current, name).champion() if current.home.is_dir() else None
        table.add_row(
            name, config.title or function.title, f"{function.metric.name} ({function.metric.unit}, {better} is better)",
            f"{config.at().steps.latency_profile.budget_us:g} us", f"v{champion.version}" if champion else "none",
        )  # fmt: skip
    console().print(table)


@click.command()
@click.option("--port", type=int, default=3000, show_default=True, help="Dagster's UI.")
@click.option("--mlflow-port", type=int, default=5000, show_default=True, help="MLflow's UI.")
def ui(port: int, mlflow_port: int) -> int:
    """Dagster's UI and daemon, and MLflow's UI, on 127.0.0.1; Ctrl-C ends both."""
    from rankd_pipeline.orchestration.ui import serve

    current = settings()
    prepare_home(current)
    return serve(current, port, mlflow_port)
