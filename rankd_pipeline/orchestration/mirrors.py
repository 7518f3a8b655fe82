"""MLflow's aliases and the `champion` asset follow the ledger: brought up to date in one place, shown as pending until then.

The ledger decides alone, so a rollback works with both down; the next run, tick or command that reaches them catches up.
"""

from collections.abc import Callable

import dagster as dg

from rankd_pipeline.settings import Settings
from rankd_pipeline.steps.runner import open_store
from rankd_pipeline.store.ledger import MIRROR_NAMES, Entry, Ledger, open_ledger
from rankd_pipeline.tracking.mlflow import Tracker

MLFLOW, DAGSTER = MIRROR_NAMES
LINE_TAG = "rankd/ledger_line"


def reconcile(
    pipeline: str,
    current: Settings,
    tracker: Tracker,
    instance: dg.DagsterInstance | None,
    report: Callable[[dg.AssetMaterialization], None],
    at_once: bool = True,
) -> dict[str, str]:
    """Bring both mirrors to the ledger's last line that lets a version serve; returns what is in the way, by mirror.

    report takes the materialization of the champion asset, if the instance does not have it yet; not at_once: it will only
    be stored later, so the mirror counts as pending until the instance has it. instance None: Dagster is not at hand.
    """
    ledger = open_ledger(current, pipeline)
    problems = {MLFLOW: _mlflow(ledger, current, tracker)}
    champion, line = ledger.champion(), ledger.serving_line()
    if champion is None:
        return {name: text for name, text in problems.items() if text}
    try:
        if instance is None:
            raise RuntimeError("no Dagster instance at hand")
        if not _shown(instance, pipeline, line):
            report(champion_event(pipeline, champion, line, current))
            if not at_once:
                problems[DAGSTER] = "reported; waits for the next tick"
    except Exception as error:  # Dagster's storage may raise anything when it is down; the ledger stands without it
        problems[DAGSTER] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for name in (MLFLOW, DAGSTER):
        ledger.note_mirror(name, line, problems.get(name, ""))
    return {name: text for name, text in problems.items() if text}


def champion_event(pipeline: str, champion: Entry, line: int, current: Settings) -> dg.AssetMaterialization:
    """What the graph shows of the serving version."""
    ledger = open_ledger(current, pipeline)
    metadata: dict[str, dg.MetadataValue] = {
        "version": dg.MetadataValue.int(champion.version),
        "reason": dg.MetadataValue.text(champion.reason),
        "bundle": dg.MetadataValue.path(str(ledger.bundle or champion.bundle)),
        "deployment": dg.MetadataValue.asset(dg.AssetKey([pipeline, "deployment"])),
    }
    if champion.score is not None:
        metadata["score"] = dg.MetadataValue.float(champion.score)
    if champion.run_id:
        metadata["made_by"] = dg.MetadataValue.dagster_run(champion.run_id)
    artifact = open_store(current).get(pipeline, "deployment", champion.recipe)
    version = {"dagster/data_version": artifact.version} if artifact is not None else {}
    return dg.AssetMaterialization(
        asset_key=dg.AssetKey([pipeline, "champion"]),
        description=f"version {champion.version} serves: {champion.reason}",
        metadata=metadata,
        tags={**version, LINE_TAG: str(line), "rankd/recipe": champion.recipe},
    )


def challenger(ledger: Ledger) -> Entry | None:
    """The newest deployable version that is registered and neither serves nor was refused."""
    entries = ledger.entries()
    decided = {entry.version for entry in entries if entry.event != "registered"}
    return next((entry for entry in reversed(entries) if entry.version not in decided and entry.scale != "smoke"), None)


def _mlflow(ledger: Ledger, current: Settings, tracker: Tracker) -> str:
    """Set the aliases; a champion that was deployed while MLflow was down is registered first."""
    champion = ledger.champion()
    problem = tracker.mirror(ledger.pipeline, champion, challenger(ledger))
    if not problem or champion is None:
        return problem
    artifact = open_store(current).get(ledger.pipeline, "deployment", champion.recipe)
    if artifact is None:
        return problem
    tracked = tracker.track(artifact, champion.run_id or "", f"{ledger.pipeline}/deployment")
    if tracked is None or tracked.problem:
        return tracked.problem if tracked is not None else problem
    return tracker.mirror(ledger.pipeline, champion, challenger(ledger))


def _shown(instance: dg.DagsterInstance, pipeline: str, line: int) -> bool:
    event = instance.get_latest_materialization_event(dg.AssetKey([pipeline, "champion"]))
    seen = event.asset_materialization if event is not None else None
    return seen is not None and (seen.tags or {}).get(LINE_TAG) == str(line)
