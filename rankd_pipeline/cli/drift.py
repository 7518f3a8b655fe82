"""`rankd drift`: take telemetry in and judge it now, and show what the last report says."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from rankd_pipeline.cli.console import console
from rankd_pipeline.settings import settings

if TYPE_CHECKING:
    from rankd_pipeline.store.artifact import Artifact

SHOWN = 24


@click.command()
@click.argument("function")
@click.option("--last", is_flag=True, help="Show the last report; take nothing in.")
@click.option("--json", "as_json", is_flag=True, help="The whole report as JSON.")
def drift(function: str, last: bool, as_json: bool) -> None:
    """Has the field of FUNCTION moved, how good is the champion there, and why: window by window.

    Takes in what has arrived in RANKD_HOME/telemetry/FUNCTION and judges it, as the telemetry sensor has it done.
    """
    from rankd_pipeline.errors import RankdError
    from rankd_pipeline.spec import load_pipeline
    from rankd_pipeline.steps.runner import open_store
    from rankd_pipeline.steps.watch import current_report, field_spec, report_drift, take_telemetry

    current = settings()
    config, store = load_pipeline(function), open_store(current)
    if last:
        found = current_report(config.pipeline, store, current)
        if found is None:
            raise RankdError(f"{config.pipeline}: no drift report yet; `rankd drift {config.pipeline}` makes one.")
        report = found
    else:
        spec = field_spec(config, store, current)
        take_telemetry(spec, store, current, note=_say)
        report = report_drift(spec, store, current, note=_say)
    document = json.loads(report.file("drift.json").read_text())
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        _show(document, report)


@click.command()
@click.argument("function")
def redistill(function: str) -> int:
    """Re-distill the champion of FUNCTION on recent telemetry, and promote or refuse what comes out.

    What the drift sensor and the nightly schedule start, by hand: the windows of the present drift, or all that are new. Exit
    code 3 if a gate stops it; a challenger that is refused is no failure.
    """
    import time

    from rankd_pipeline.cli.live import watched
    from rankd_pipeline.cli.runs import prepare_home
    from rankd_pipeline.errors import RankdError
    from rankd_pipeline.orchestration.execute import execute_chain
    from rankd_pipeline.spec import SiteData, load_pipeline
    from rankd_pipeline.steps.chain import STEPS
    from rankd_pipeline.steps.runner import open_store
    from rankd_pipeline.steps.triggers import recent_site
    from rankd_pipeline.steps.watch import field_spec
    from rankd_pipeline.store.ledger import open_ledger

    current, started = settings(), time.monotonic()
    config, store = load_pipeline(function), open_store(current)
    prepare_home(current)
    site = recent_site(config, store, current)
    if not isinstance(site, SiteData):
        raise RankdError(f"{config.pipeline}: nothing to re-distill on: {site}.")
    spec = field_spec(config, store, current)
    with watched(config.pipeline, (*STEPS, "shadow_run"), current.progress_dir) as watch:
        outcome = execute_chain(function, spec.scale, spec.seed, spec.variant, current, watch=watch, site=site)
    if outcome.status != "success":
        at = f" at {outcome.failed_step}" if outcome.failed_step else ""
        click.echo(f"rankd: re-distillation {outcome.status}{at}: {outcome.message}", err=True)
        return outcome.exit_code or 1
    last = open_ledger(current, config.pipeline).entries()[-1]
    click.echo(f"v{last.version}: {last.event}, {last.reason}")
    click.echo(f"Done in {time.monotonic() - started:.0f} s.")
    return 0


def _say(text: str) -> None:
    click.echo(text, err=True)


def _show(document: Mapping[str, Any], report: "Artifact") -> None:
    from rich.table import Table

    table = Table(
        "window (UTC)", "rows", "labelled", "score", "classical", "no labels", "p99.9 us", "verdict", box=None, pad_edge=False
    )
    for window in document["windows"][-SHOWN:]:
        quality = window.get("quality", {})
        p999 = f"{window['p999_us']:.0f}" if "p999_us" in window else ""
        scores = [_number(quality.get("score")), _number(quality.get("baseline")), _estimate(quality)]
        table.add_row(window["key"], str(window["rows"]), str(window["labelled"]), *scores, p999, window["why"])
    console().print(table)
    click.echo(f"held against: {document['reference_is']}")
    click.echo(f"plots: {report.path / 'figures'}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _estimate(quality: Mapping[str, Any]) -> str:
    if quality.get("expected") is None:
        return ""
    low, high = quality["expected_ci95"]
    return f"{quality['expected']:.3f} +- {(high - low) / 2:.3f}"
