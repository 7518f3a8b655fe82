"""`rankd predict`, `lineage` and `profile`: what a person does with a bundle or a model, on any machine."""

import csv
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankd_pipeline.cli.console import console
from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import Settings, settings

if TYPE_CHECKING:
    import numpy as np

    from rankd_pipeline.runtime.bundle import Predictor
    from rankd_pipeline.store.artifact import Store
    from rankd_pipeline.store.lineage import Lineage, Made

Inputs = dict[str, "np.ndarray"]


# -- predict ------------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("bundle")
@click.argument("reports", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the CSV there instead of to stdout.")
def predict(bundle: str, reports: Path, out: Path | None) -> int:
    """Decide for every row of a CSV of reports with the model in BUNDLE (a folder, or models:/NAME@ALIAS).

    The bundle is verified first. A bad row is refused by its number and the others go on; then the exit code is 2.
    """
    from rankd_pipeline.ran_functions.registry import load_function
    from rankd_pipeline.runtime.bundle import load_bundle

    predictor = load_bundle(bundle_path(bundle, settings()))
    function = load_function(predictor.manifest.about["function"])
    rows, inputs, refused = read_rows(reports, lambda path: function.read_reports(path, predictor.signature))
    for row, reason in refused:
        click.echo(f"row {row} refused: {reason}", err=True)
    lines = list(_decisions(predictor, rows, inputs))
    if out is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
    else:
        with out.open("w", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows(lines)
    click.echo(f"{len(rows)} rows decided, {len(refused)} refused.", err=True)
    return 2 if refused else 0


def read_rows(path: Path, read: Callable[[Path], Inputs]) -> tuple[list[int], Inputs, list[tuple[int, str]]]:
    """(row numbers, inputs, refused rows with reason) of a CSV; the header is row 1, as an editor counts.

    `read` takes a whole file and stops at the first bad row; the file is halved until each bad row stands alone.
    Raises: RankdError if no row is good, or the file is no CSV.
    """
    import numpy as np

    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            header, *body = list(csv.reader(handle)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RankdError(f"{path}: cannot be read as a CSV of reports ({error}).") from None
    numbered = [(number, row) for number, row in enumerate(body, 2) if any(cell.strip() for cell in row)]
    good: list[tuple[list[int], Inputs]] = []
    refused: list[tuple[int, str]] = []
    with tempfile.TemporaryDirectory(prefix="rankd-") as folder:
        part = Path(folder) / "part.csv"

        def parse(rows: list[tuple[int, list[str]]]) -> None:
            with part.open("w", newline="") as handle:
                csv.writer(handle).writerows([header, *(row for _, row in rows)])
            try:
                good.append(([number for number, _ in rows], read(part)))
            except RankdError as error:
                if f"{part}, row " not in str(error):  # about the file, not about a row
                    raise RankdError(str(error).replace(str(part), str(path))) from None
                if len(rows) == 1:
                    refused.append((rows[0][0], str(error).removeprefix(f"{part}, row 2, ")))
                    return
                parse(rows[: len(rows) // 2])
                parse(rows[len(rows) // 2 :])

        parse(numbered)
    if not good:
        raise RankdError(f"{path}: no row could be used; row {refused[0][0]}: {refused[0][1]}")
    inputs = {name: np.concatenate([part[name] for _, part in good]) for name in good[0][1]}
    return [number for numbers, _ in good for number in numbers], inputs, refused


def _decisions(predictor: "Predictor", rows: list[int], inputs: Inputs) -> "list[list[Any]]":
    """CSV lines: where outputs compete the choice, what speaks for it and the runners-up; else every output value.

    A stateful model reads the rows as one user's calls, in order.
    """
    import numpy as np

    decision = predictor.signature.decision
    outputs = predictor.in_order(inputs) if predictor.signature.state else predictor(inputs)
    values = outputs[decision.name].reshape(len(rows), -1)
    if decision.unit not in ("probability", "utility"):
        return [["row", *(f"{decision.name}_{index}" for index in range(values.shape[1]))],
                *([row, *(f"{value:.6g}" for value in line)] for row, line in zip(rows, values, strict=True))]  # fmt: skip
    what = decision.axes[-1] if decision.axes else decision.name
    order = np.argsort(-values, axis=1, kind="stable")[:, :4]
    head = [["row", what, decision.unit, "next_best"]]
    return head + [
        [row, int(best[0]), f"{line[best[0]]:.4f}", " ".join(str(int(index)) for index in best[1:])]
        for row, best, line in zip(rows, order, values, strict=True)
    ]


# -- lineage ------------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("bundle", required=False)
@click.option("--site", help="Instead: which deployed models has data of this site touched?")
@click.option("--json", "as_json", is_flag=True, help="The answer as one JSON object.")
def lineage(bundle: str | None, site: str | None, as_json: bool) -> int:
    """From BUNDLE (a folder, or models:/NAME@ALIAS, models:/NAME/VERSION) back to the corpora and telemetry behind it.

    With --site the other way: which models has this site's data touched. Needs no server and no database. Every hash that
    can be checked is checked; exit code 2 if one does not hold.
    """
    from rankd_pipeline.store.lineage import lineage_of

    current = settings()
    if (bundle is None) == (site is None):
        raise RankdError("lineage: expected a BUNDLE, or --site SITE.")
    if site is not None:
        return _models_of_site(site, current, as_json)
    path = bundle_path(str(bundle), current)
    store = _store_if_there(current)
    found = lineage_of(path, store)
    found.problems.extend(_bundle_problems(path, found))
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
    else:
        _print_tree(found)
    return 0 if found.intact else 2


def _models_of_site(site: str, current: Settings, as_json: bool) -> int:
    """Every deployment that rows of the site went into, with the version and the service that the ledger knows."""
    from rankd_pipeline.store.ledger import open_ledger
    from rankd_pipeline.store.lineage import models_of_site, sites_of_models

    store = _store_if_there(current)
    rows = []
    for touched in models_of_site(store, site) if store is not None else []:
        ledger = open_ledger(current, touched.pipeline)
        entry, champion = ledger.registered(touched.recipe), ledger.champion()
        version = None if entry is None else entry.version
        served = any(service.entry.version == version for service in ledger.services())
        serves = champion is not None and champion.version == version
        told = [asdict(item) for item in touched.field]
        rows.append({**asdict(touched), "field": told, "version": version, "served": served, "serves": serves})
    if as_json:
        click.echo(json.dumps({"site": site, "models": rows}, indent=1))
        return 0
    for row in rows:
        what = "serves now" if row["serves"] else "served" if row["served"] else "never served"
        telemetry = [
            f"{item['sites'][site]} of telemetry {item['telemetry'][:12]} ({_spans(item['windows'])})" for item in row["field"]
        ]
        parts = [f"{row['general_rows']} rows of its general corpus"] * bool(row["general_rows"]) + telemetry
        version = f"v{row['version']}" if row["version"] else "unregistered"
        click.echo(f"{row['pipeline']} {version} ({what}): {', '.join(parts)}")
    click.echo(f"{len(rows)} model(s) were touched by data of {site}.")
    if store is not None and not rows:  # the site, or its name?
        click.echo(f"Sites that models of this store have seen: {', '.join(sites_of_models(store)) or 'none'}.")
    return 0


def _spans(windows: "Sequence[tuple[float, float]]") -> str:
    """When, in the field's own time."""
    from datetime import UTC, datetime

    first, last = (datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M") for time in (windows[0][0], windows[-1][1]))
    return f"{first} to {last} UTC"


def _store_if_there(current: Settings) -> "Store | None":
    from rankd_pipeline.steps.runner import open_store

    there = "://" in current.store_uri or Path(current.store_uri).is_dir()
    return open_store(current) if there else None


def _bundle_problems(path: Path, found: "Lineage") -> list[str]:
    """The bundle's own files against its manifest, and the model's own words against the chain."""
    from rankd_pipeline.runtime.bundle import MANIFEST, MODEL, verify_bundle

    if not (path / MANIFEST).is_file() or not (path / MODEL).is_file():
        return []
    try:
        verify_bundle(path)
    except RankdError as error:
        return [str(error)]
    return _metadata_problems(path / MODEL, found.made.values())


def _metadata_problems(model: Path, made: "Iterable[Made]") -> list[str]:
    """What the model file says it was made from must be among what the manifests say."""
    from rankd_pipeline.runtime.onnx_export import read_metadata

    said = json.loads(read_metadata(model).get("rankd.lineage", "{}"))
    known = {(item.recipe, item.version) for item in made}
    return [
        f"{model}: says its {step} is {ids['recipe']}, the chain knows no such artifact."
        for step, ids in said.items()
        if (ids["recipe"], ids["version"]) not in known
    ]


def _print_tree(found: "Lineage") -> None:
    from rich.text import Text
    from rich.tree import Tree

    by_recipe = {item.recipe: item for item in found.made.values()}
    shown: set[str] = set()

    def grow(tree: Tree, recipe: str) -> None:
        item = by_recipe.get(recipe)
        if item is None:
            tree.add(Text(f"{recipe}: not proven", "red"))
        elif recipe in shown:
            tree.add(Text.assemble((item.step, "bold"), f" {recipe} (above)"))
        else:
            shown.add(recipe)
            branch = tree.add(Text.assemble((item.step, "bold"), *_described(item)))
            for name in item.inputs:
                grow(branch, item.inputs[name])

    root = Tree(Text.assemble((found.path, "bold"), f"  ({found.pipeline})"))
    for sha256 in found.inputs.values():
        grow(root, found.made[sha256].recipe if sha256 in found.made else sha256[:24])
    console().print(root)
    click.echo(
        "sites whose data it has seen: " + (", ".join(f"{name} ({rows})" for name, rows in found.sites.items()) or "unknown")
    )
    for item in found.field:
        rows = ", ".join(f"{name} ({count})" for name, count in item.sites.items())
        click.echo(f"of the field: telemetry {item.telemetry[:12]}, {_spans(item.windows)}: {rows}")
    for problem in found.problems:
        click.secho(f"PROBLEM {problem}", fg="red")
    click.echo(f"{len(found.made)} artifacts: " + ("every hash that could be checked holds." if found.intact else "NOT intact."))


def _described(item: "Made") -> list[tuple[str, str]]:
    """(text, style) of an artifact after its name: identity, then what made it and how far it was checked."""
    from datetime import datetime

    when = datetime.fromtimestamp(item.finished).strftime("%Y-%m-%d %H:%M") if item.finished else "time unknown"
    run = f"run {item.run_id[:8]}" if item.run_id else "no run id"
    lines = [f"{item.scale}, seed {item.seed}, variant {item.variant}, {run}, {when}; {item.checked}"]
    if item.skipped:
        lines.append(f"skipped: {item.skipped}")
    identity = f" {item.recipe}  content {item.version[:12]}  code {item.code_version}"
    return [(identity, ""), *((f"\n{line}", "dim") for line in lines)]


def bundle_path(text: str, current: Settings) -> Path:
    """The folder of a bundle given as a path or as an MLflow model URI.

    Raises: RankdError if there is none.
    """
    if text.startswith("models:/"):
        return _bundle_of_model(text, current)
    path = Path(text)
    if not path.exists():
        raise RankdError(
            f"{text}: no such file or folder; expected a bundle (`rankd report` says where it lies) or models:/NAME@ALIAS."
        )
    path = path.parent if path.is_file() else path
    return path / "bundle" if (path / "bundle").is_dir() else path


def _bundle_of_model(uri: str, current: Settings) -> Path:
    """models:/NAME@ALIAS or models:/NAME/VERSION: MLflow knows the recipe, the store has the bundle."""
    from rankd_pipeline.steps.runner import open_store
    from rankd_pipeline.tracking.mlflow import RECIPE_TAG

    name, at, alias = uri.removeprefix("models:/").partition("@")
    name, slash, version = (name, "", "") if at else name.partition("/")
    if not name or not (alias or version):
        raise RankdError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(tracking_uri=current.mlflow_uri, registry_uri=current.mlflow_uri)
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        raise RankdError(f"{uri}: not in MLflow at {current.mlflow_uri} ({' '.join(error.message.split())}).") from None
    artifact = open_store(current).get(name, "deployment", found.tags.get(RECIPE_TAG, ""))
    if artifact is None:
        raise RankdError(
            f"{uri}: its bundle (recipe {found.tags.get(RECIPE_TAG)}) is not in {current.store_uri}; pass the bundle's path."
        )
    return artifact.file("bundle")


# -- profile ------------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--budget-us", type=click.FloatRange(min=0, min_open=True), required=True, help="Time that one call may take.")
@click.option(
    "--slot-us", type=click.FloatRange(min=0, min_open=True), default=500.0, show_default=True, help="A call every so often."
)
@click.option("--runs", type=click.IntRange(min=1), default=10_000, show_default=True, help="Paced calls per runtime.")
@click.option("--json", "as_json", is_flag=True, help="The whole report as JSON.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a histogram of call times as PNG.")
def profile(model: Path, budget_us: float, slot_us: float, runs: int, as_json: bool, plot: Path | None) -> int:
    """Race the runtimes of any ONNX file on this host, paced as a DU calls it. Exit code 3 if it misses the budget."""
    from rankd_pipeline.runtime.latency import profile_onnx

    def tell(text: str, share: float) -> None:
        click.echo(f"{share:4.0%} {text}", err=True)

    report = profile_onnx(model, budget_us, runs=runs, slot_us=slot_us, on_progress=tell)
    if plot is not None:
        from rankd_pipeline.report.figures import latency_histogram

        plot.write_bytes(latency_histogram(report.model_dump(mode="json")))
    if as_json:
        click.echo(report.to_json())
    else:
        _print_race(report.headline(), report.why)
    return 3 if report.verdict == "fail" else 0


def _print_race(headline: Mapping[str, Any], why: str) -> None:
    from rich.table import Table

    table = Table(
        "runtime", "p50 us", "p99 us", "p99.9 us", "max us", "back to back p50", "host p99.9", "verdict", box=None, pad_edge=False
    )
    for item in headline["candidates"]:
        paced, back, control = item["paced"], item["back_to_back"], item["control_p999_us"]
        if paced is None:
            table.add_row(item["runtime"], "", "", "", "", "", "", item["reason"] or "not measured")
            continue
        figures = [f"{paced[key]:.2f}" for key in ("p50_us", "p99_us", "p999_us", "max_us")]
        table.add_row(item["runtime"], *figures, f"{back['p50_us']:.2f}", f"{control:.2f}", item["verdict"])
    console().print(table)
    click.echo(f"{headline['runtime']} against {headline['budget_us']:g} us: {headline['verdict']} ({why})")
