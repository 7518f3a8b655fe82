"""What the store may forget: artifacts that no champion, no recent run and no pin reaches."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from rankd_pipeline.errors import Busy, RankdError
from rankd_pipeline.store.artifact import Artifact, Store
from rankd_pipeline.store.ledger import SERVES, Ledger

KEEP_RUNS = 3
FIELD_STEPS = {"telemetry", "drift_report"}
"""Steps that look at the field; a run of nothing else is no run of the chain."""
DRAFT_DAYS = 7.0


@dataclass(frozen=True)
class Sweep:
    """What a collection would do.

    kept maps a recipe to why. drafts are work folders of stopped runs, damaged are folders whose manifest cannot be read,
    old_runs the (pipeline, run id) notes that are no longer needed: of each scale the last run is remembered.
    """

    kept: Mapping[str, str]
    removable: tuple[Artifact, ...]
    drafts: tuple[Path, ...]
    damaged: tuple[Path, ...]
    old_runs: tuple[tuple[str, str], ...]

    @property
    def bytes(self) -> int:
        listed = sum(entry["bytes"] for item in self.removable for entry in item.manifest["files"].values())
        return listed + sum(path.stat().st_size for draft in self.drafts for path in draft.rglob("*") if path.is_file())


class Pins:
    """Recipes that a person wants kept, with why, in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> dict[str, str]:
        """Raises: RankdError if the file is damaged: forgetting a pin would delete what it guards."""
        if not self.path.exists():
            return {}
        try:
            return {str(recipe): str(why) for recipe, why in json.loads(self.path.read_text()).items()}
        except (ValueError, AttributeError):
            raise RankdError(f"{self.path}: not a JSON object of recipe and reason; mend it, or delete it with all pins.") from None

    def write(self, pins: Mapping[str, str]) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dict(sorted(pins.items())), indent=1) + "\n")
        temporary.replace(self.path)


def find_recipe(store: Store, text: str) -> Artifact:
    """The one artifact whose recipe begins with `text`, or that lies at the path `text` (a bundle counts).

    Raises: RankdError if none or several do.
    """
    parts = Path(text).resolve().parts
    found = [item for item in store.artifacts() if item.recipe in parts or item.recipe.startswith(text)]
    if len(found) != 1:
        which = ", ".join(f"{item.pipeline}/{item.step}/{item.recipe}" for item in found[:3]) or "none"
        raise RankdError(f"{text}: expected the beginning of one recipe or the path of one artifact; it matches {which}.")
    return found[0]


def sweep(store: Store, ledgers: Iterable[Ledger], pins: Mapping[str, str], now: float | None = None) -> Sweep:
    """Decide, and touch nothing. A damaged ledger or pin file stops it: what cannot be read may be a champion."""
    artifacts = {item.recipe: item for item in store.artifacts()}
    kept: dict[str, str] = {}
    for ledger in ledgers:
        for entry in ledger.entries():
            if entry.event in SERVES:
                _reach(entry.recipe, f"champion history, version {entry.version}", artifacts, kept)
    old_runs: list[tuple[str, str]] = []
    for pipeline in sorted({item.pipeline for item in artifacts.values()}):
        scales: set[str] = set()
        seen: Counter[bool] = Counter()
        for run in store.runs(pipeline):
            # A chain and a look at the field are counted apart: the field is looked at every hour.
            in_field = set(run.recipes) <= FIELD_STEPS
            position = seen[in_field]
            seen[in_field] += 1
            if position >= KEEP_RUNS and (in_field or run.scale in scales):
                old_runs.append((pipeline, run.run_id))
            if not in_field:
                scales.add(run.scale)
            for recipe in run.recipes.values() if position < KEEP_RUNS else ():
                _reach(recipe, f"run {run.run_id[:8]}", artifacts, kept)
    for recipe, why in pins.items():
        _reach(recipe, f"pinned: {why}" if why else "pinned", artifacts, kept)
    return Sweep(
        kept=kept,
        removable=tuple(item for recipe, item in artifacts.items() if recipe not in kept),
        drafts=tuple(_old_drafts(store, now if now is not None else time.time())),
        damaged=tuple(sorted(_damaged(store, artifacts))),
        old_runs=tuple(old_runs),
    )


def _reach(recipe: str, why: str, artifacts: Mapping[str, Artifact], kept: dict[str, str]) -> None:
    """Keep an artifact and all that it was made from."""
    waiting = [recipe]
    while waiting:
        current = waiting.pop()
        if current in kept or current not in artifacts:
            continue
        kept[current] = why
        waiting.extend(entry["recipe"] for entry in artifacts[current].manifest["inputs"].values())


def _damaged(store: Store, artifacts: Mapping[str, Artifact]) -> Iterable[Path]:
    folders = {path.parent for path in store.local.glob("[!.]*/*/*/manifest.json")} if store.is_local else set()
    return (folder for folder in folders if folder.name not in artifacts)


def _old_drafts(store: Store, now: float) -> Iterable[Path]:
    for draft in store.work.glob("*/*/*"):
        if now - max(path.stat().st_mtime for path in (draft, *draft.rglob("*"))) > DRAFT_DAYS * 86400:
            yield draft


def apply(store: Store, plan: Sweep) -> None:
    """Carry a sweep out.

    Raises: Busy, before anything is touched, if a step is being made: it may read what would go.
    """
    for path in sorted(store.locks.glob("*.lock")):
        try:
            with FileLock(path).acquire(timeout=0):
                pass
        except Timeout:
            raise Busy(f"{path.stem} is being made: wait for that run to end, then collect.") from None
    for artifact in plan.removable:
        with store.lock(f"{artifact.pipeline}-{artifact.step}-{artifact.recipe}", timeout=0):
            store.remove(artifact)
    for pipeline, run_id in plan.old_runs:
        store.forget_run(pipeline, run_id)
    for draft in plan.drafts:
        with store.lock("-".join(draft.parts[-3:]), timeout=0):
            shutil.rmtree(draft)
