"""`rankd report` and `rankd ablate`: what a run reached, as a page, as text, as one JSON object."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rankd_pipeline.cli.console import SCALE, console
from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import Settings, settings

if TYPE_CHECKING:
    from rankd_pipeline.spec import PipelineConfig
    from rankd_pipeline.steps.summary import Summary
    from rankd_pipeline.store.artifact import Store


@click.command()
@click.argument("function")
@click.option("--champion", is_flag=True, help="The version that serves now instead of the last run.")
@click.option("--scale", type=SCALE, help="The last run at this scale (default: the last run at any).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; null where a step was not reached.")
def report(function: str, champion: bool, scale: str | None, as_json: bool) -> None:
    """The scorecard of the last finished or stopped run of FUNCTION, and its page."""
    from rankd_pipeline.spec import load_pipeline
    from rankd_pipeline.steps.runner import open_store

    current = settings()
    config = load_pipeline(function)
    store = open_store(current)
    if champion:
        recipes = champion_recipes(config.pipeline, store, current)
    else:
        recipes = last_recipes(config.pipeline, scale, store, current)
    if as_json:
        click.echo(json.dumps(summary_of(config, recipes, current).scorecard, indent=1, allow_nan=False))
    else:
        print_scorecard(config, recipes, current)


def last_recipes(pipeline: str, scale: str | None, store: "Store", current: Settings) -> dict[str, str]:
    """Recipe by step of the last run that is not under way, with what its artifacts were made from.

    Raises: RankdError if there was none.
    """
    from rankd_pipeline.steps.chain import STEPS

    for use in store.runs(pipeline):
        whole = set(use.recipes) >= set(STEPS)
        if scale in (None, use.scale) and (whole or not _under_way(use.run_id, current)):
            return with_inputs(pipeline, use.recipes, store)
    where = f" at scale {scale}" if scale else ""
    raise RankdError(f"{pipeline}: no run{where} in {store.uri} yet; start one with `rankd run {pipeline}`.")


def _under_way(run_id: str, current: Settings) -> bool:
    """Whether Dagster knows the run as not ended; one whose process was killed has ended."""
    if not current.initialised:
        return False
    import dagster as dg

    from rankd_pipeline.orchestration.liveness import reap_orphans

    with dg.DagsterInstance.from_config(str(current.dagster_home)) as instance:
        reap_orphans(instance)
        run = instance.get_run_by_id(run_id)
    return run is not None and not run.is_finished


def champion_recipes(pipeline: str, store: "Store", current: Settings) -> dict[str, str]:
    """Recipe by step of everything that the serving version was made from.

    Raises: RankdError if nothing serves or its artifact is gone.
    """
    from rankd_pipeline.store.ledger import open_ledger

    entry = open_ledger(current, pipeline).champion() if current.home.is_dir() else None
    if entry is None:
        raise RankdError(f"{pipeline}: no champion yet; `rankd run {pipeline}` at laptop scale makes one if its gates pass.")
    if store.get(pipeline, "deployment", entry.recipe) is None:
        raise RankdError(f"{pipeline}: the champion v{entry.version}, deployment {entry.recipe}, is no longer in {store.uri}.")
    return with_inputs(pipeline, {"deployment": entry.recipe}, store)


def with_inputs(pipeline: str, recipes: Mapping[str, str], store: "Store") -> dict[str, str]:
    """`recipes` and those of everything that these artifacts were made from."""
    found: dict[str, str] = {}
    waiting = list(recipes.items())
    while waiting:
        step, recipe = waiting.pop(0)
        artifact = None if step in found else store.get(pipeline, step, recipe)
        if artifact is not None:
            found[step] = recipe
            waiting.extend((item["step"], item["recipe"]) for item in artifact.manifest["inputs"].values())
    return found


def summary_of(config: "PipelineConfig", recipes: Mapping[str, str], current: Settings) -> "Summary":
    """Sum up the artifacts with these recipes under the configuration that made them."""
    from rankd_pipeline.steps.chain import STEPS
    from rankd_pipeline.steps.runner import open_store
    from rankd_pipeline.steps.summary import summarise
    from rankd_pipeline.store.ledger import open_ledger

    store, pipeline = open_store(current), config.pipeline
    found = {step: store.get(pipeline, step, recipes[step]) for step in STEPS if step in recipes}
    artifacts = {step: artifact for step, artifact in found.items() if artifact is not None}
    if not artifacts:
        raise RankdError(f"{pipeline}: what its last run made is no longer in {store.uri}; run `rankd run {pipeline}` again.")
    recipe = next(iter(artifacts.values())).manifest["recipe"]
    spec = config.at(recipe["scale"], recipe["seed"], recipe["variant"])
    entries = [item for item in open_ledger(current, pipeline).entries() if item.recipe == recipes.get("deployment")]
    if not entries or "deployment" not in artifacts:
        return summarise(spec, artifacts)
    # A home may have been moved since: where the bundle lies is what the store says.
    return summarise(spec, artifacts, replace(entries[-1], bundle=str(artifacts["deployment"].path / "bundle")))


def print_scorecard(config: "PipelineConfig", recipes: Mapping[str, str], current: Settings) -> None:
    """The scorecard on the terminal, and where bundle, model card and report lie; writes the report's page."""

    from rankd_pipeline.report.scorecard import scorecard_text
    from rankd_pipeline.steps.summary import write_report

    summary = summary_of(config, recipes, current)
    page = write_report(summary, report_path(config.pipeline, summary, current))
    console().print(scorecard_text(summary.scorecard, summary.gates, summary.targets, summary.notes))
    deployed = summary.scorecard["deployment"]
    click.echo(f"\nreport:     {page}")
    if deployed is not None and deployed["bundle"]:
        click.echo(f"deployed:   version {deployed['version']}, alias {deployed['alias'] or 'none'}")
        click.echo(f"bundle:     {deployed['bundle']}")
        click.echo(f"model card: {Path(deployed['bundle']) / 'model_card.html'}")


def report_path(pipeline: str, summary: "Summary", current: Settings) -> Path:
    """`<home>/reports/<pipeline>/<scale>-seed<seed>-<variant>.html`."""
    recipe = next(iter(summary.artifacts.values())).manifest["recipe"]
    name = f"{recipe['scale']}-seed{recipe['seed']}-{recipe['variant']}.html"
    return current.home / "reports" / pipeline / name


@click.command()
@click.argument("function")
@click.argument("name", required=False)
@click.option("--scale", type=SCALE, default="laptop", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The table as JSON.")
def ablate(function: str, name: str | None, scale: str, seed: int, as_json: bool) -> None:
    """What one part of the chain buys: train with and without it, paired. The result is stored.

    NAME is grid (the arms that the pipeline's YAML names; the default where it names some) or ssl. A grid that was stopped
    goes on where it was.
    """
    from rankd_pipeline.spec import load_pipeline
    from rankd_pipeline.steps.ablations import ABLATIONS
    from rankd_pipeline.steps.runner import open_store

    current = settings()
    spec = load_pipeline(function).at(scale, seed)
    name = name or ("grid" if spec.ablation.arms else "ssl")
    if name not in ABLATIONS:
        raise RankdError(f"ablation {name!r}: unknown; expected one of {', '.join(sorted(ABLATIONS))}.")
    result = ABLATIONS[name](spec, open_store(current), current, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    from rich.table import Table

    if "tables" in result:
        console().print(result["title"])
    for part in result.get("tables", [result]):
        rows = part["rows"]
        table = Table(*rows[0], box=None, pad_edge=False, title=part.get("title"), title_justify="left")
        for row in rows:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        console().print(table)
    if "path" in result:
        click.echo(f"stored:     {result['path']}")
