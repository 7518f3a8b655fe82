"""`rankd gc`, `pin` and `unpin`: what the store may forget, and what it must not."""

from typing import TYPE_CHECKING

import click

from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import Settings, settings

if TYPE_CHECKING:
    from rankd_pipeline.store.gc import Pins, Sweep


@click.command()
@click.option("--apply", "for_real", is_flag=True, help="Remove; without it nothing is touched.")
def gc(for_real: bool) -> None:
    """Artifacts that no champion past or present, none of the last 3 runs and no pin reaches; a dry run by default."""
    from rankd_pipeline.steps.runner import open_store
    from rankd_pipeline.store.gc import apply, sweep
    from rankd_pipeline.store.ledger import ledgers

    current = settings()
    store = open_store(current)
    plan = sweep(store, ledgers(current.serving_dir), {**_field_pins(current), **_pins(current).all()})
    _show(plan)
    if for_real:
        apply(store, plan)
        click.echo(f"Removed: {plan.bytes / 1e6:,.1f} MB.")
    elif plan.removable or plan.drafts:
        click.echo(f"Would free {plan.bytes / 1e6:,.1f} MB: `rankd gc --apply` does it.")
    else:
        click.echo("Nothing to remove.")


def _show(plan: "Sweep") -> None:
    from collections import Counter

    for why, count in sorted(Counter(plan.kept.values()).items()):
        click.echo(f"keep    {count:4d} artifacts: {why}")
    for item in plan.removable:
        size = sum(entry["bytes"] for entry in item.manifest["files"].values())
        recipe = item.manifest["recipe"]
        click.echo(
            f"remove  {item.pipeline}/{item.step}/{item.recipe}  {recipe['scale']}, seed {recipe['seed']}, {size / 1e6:,.1f} MB"
        )
    for draft in plan.drafts:
        click.echo(f"remove  {draft}: the work of a run that was stopped over a week ago")
    for folder in plan.damaged:
        click.echo(f"damaged {folder}: its manifest cannot be read; delete the folder by hand if you do not need it", err=True)


@click.command()
@click.argument("artifact")
@click.option("--why", default="", help="A word for whoever wonders later.")
def pin(artifact: str, why: str) -> None:
    """Keep ARTIFACT (the beginning of a recipe, or a path to a bundle or artifact) and all that it was made from."""
    from rankd_pipeline.steps.runner import open_store
    from rankd_pipeline.store.gc import find_recipe

    current = settings()
    found = find_recipe(open_store(current), artifact)
    pins = _pins(current)
    pins.write({**pins.all(), found.recipe: why})
    click.echo(f"pinned {found.pipeline}/{found.step}/{found.recipe}")


@click.command()
@click.argument("recipe")
def unpin(recipe: str) -> None:
    """Take the pin of RECIPE (its beginning is enough) away."""
    pins = _pins(settings())
    known = pins.all()
    found = [item for item in known if item.startswith(recipe)]
    if len(found) != 1:
        raise RankdError(f"{recipe}: expected the beginning of one pinned recipe; pinned are: {', '.join(known) or 'none'}.")
    pins.write({item: why for item, why in known.items() if item != found[0]})
    click.echo(f"unpinned {found[0]}")


def _field_pins(current: Settings) -> dict[str, str]:
    """What the telemetry folders' records name: the current telemetry and report, and what shows what is normal."""
    from rankd_pipeline.telemetry.inbox import Inbox

    found: dict[str, str] = {}
    for folder in sorted((current.home / "telemetry").glob("*")):
        record = Inbox(folder).record()
        found |= {record[step]: f"the current {step}" for step in ("telemetry", "drift_report") if record[step]}
        found |= {item["telemetry"]: "shows what is normal" for item in record.get("references", {}).values()}
    return found


def _pins(current: Settings) -> "Pins":
    from rankd_pipeline.store.gc import Pins

    return Pins(current.home / "pins.json")
