"""`rankd history` and `rankd rollback`: who served from when to when and why, and how to put an earlier bundle back."""

import json
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click

from rankd_pipeline.cli.console import console
from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import Settings, settings

if TYPE_CHECKING:
    from rankd_pipeline.store.ledger import Ledger


@click.command()
@click.argument("function")
@click.option("--json", "as_json", is_flag=True, help="Every line of the ledger, and the mirrors that lag, as one JSON object.")
def history(function: str, as_json: bool) -> None:
    """Who served FUNCTION from when to when and why, and who was refused. Needs no server and no database."""
    from rich.table import Table

    ledger = ledger_of(function, settings())
    entries, pending = ledger.entries(), ledger.pending()
    if as_json:
        bundle = ledger.bundle
        document = {"entries": [asdict(entry) for entry in entries], "bundle": str(bundle) if bundle else None, "pending": pending}
        click.echo(json.dumps(document, indent=1))
        return
    ends = {service.entry: service.until for service in ledger.services()}
    table = Table("version", "what", "from", "until", "score", "scale", "why", box=None, pad_edge=False)
    for entry, before in zip(entries, [None, *entries], strict=False):
        if entry.event == "registered":
            continue
        # Lines keep their order whatever the clock says; a clock that was set back is told, not believed.
        back = " (clock was set back)" if before is not None and entry.time < before.time - 1 else ""
        until = _until(ends[entry]) if entry in ends else ""
        what = {"champion": "served", "rollback": "served (rollback)", "refused": "refused"}[entry.event]
        score = "" if entry.score is None else f"{entry.score:.4f}"
        table.add_row(f"v{entry.version}", what, _when(entry.time) + back, until, score, entry.scale, entry.reason)
    console().print(table)
    click.echo(f"bundle: {ledger.link / 'bundle'}" if ledger.bundle else "Nothing serves.")
    _say_pending(pending)


@click.command()
@click.argument("function")
@click.option("--to", type=int, metavar="VERSION", help="A version that served before (default: the one before the present).")
@click.option("--why", default="", help="A word for whoever reads the history.")
def rollback(function: str, to: int | None, why: str) -> None:
    """Put an earlier bundle of FUNCTION back, in one step; works with Dagster and MLflow down."""
    from rankd_pipeline.runtime.bundle import verify_bundle

    current = settings()
    ledger = ledger_of(function, current)
    entry, before = ledger.roll_back(to, why, check=verify_bundle)
    click.echo(f"v{entry.version} serves, v{before.version} does not any more: {ledger.link / 'bundle'}")
    _follow(ledger, current)
    _say_pending(ledger.pending())


def ledger_of(function: str, current: Settings) -> "Ledger":
    """The ledger of the pipeline named by `function`, or by the path of its YAML."""
    from rankd_pipeline.spec import load_pipeline
    from rankd_pipeline.store.ledger import open_ledger

    pipeline = load_pipeline(function).pipeline
    if not current.home.is_dir():
        raise RankdError(f"{current.home}: no such home; set RANKD_HOME to where `rankd run` has made one.")
    return open_ledger(current, pipeline)


def _follow(ledger: "Ledger", current: Settings) -> None:
    """Let the mirrors catch up now if they can; the ledger has decided already."""
    if not current.initialised:
        return
    import dagster as dg

    from rankd_pipeline.orchestration.mirrors import reconcile
    from rankd_pipeline.tracking.mlflow import Tracker

    tracker = Tracker(current.mlflow_uri, current.mlflow_dir)
    try:
        with dg.DagsterInstance.from_config(str(current.dagster_home)) as instance:
            reconcile(ledger.pipeline, current, tracker, instance, instance.report_runless_asset_event)
    except Exception:  # Dagster's storage is down, in whatever way: MLflow may still follow, and what lags is told
        reconcile(ledger.pipeline, current, tracker, None, lambda event: None)


def _say_pending(pending: dict[str, str]) -> None:
    for name, problem in pending.items():
        click.echo(f"pending: {name} ({problem}); it follows at the next run or tick")


def _until(time: float | None) -> str:
    return "now" if time is None else _when(time)


def _when(time: float) -> str:
    return datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M:%S")
