"""When the field is looked at and when a champion is re-distilled: what sensors and the nightly schedule decide by.

Plain functions of the stored state, a cursor and the clock; no Dagster, no torch, nothing is computed. Every answer says
why, also (above all) when nothing is started.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineConfig, SiteData
from rankd_pipeline.steps.watch import champion_of, current_report, inbox_of
from rankd_pipeline.store.artifact import Artifact, Store
from rankd_pipeline.telemetry.rows import windows_of

HOUR_S = 3600.0
MAX_FAILURES = 3
"""After so many failed runs in a row none is started any more: what fails for a reason of its own would only fail again."""
MAX_TRIES = 2
"""How often the same files are tried before the sensor waits for other ones."""


@dataclass(frozen=True)
class Tick:
    """One decision. cursor: what to remember, whether something is started or not. key names what is started."""

    start: bool
    why: str
    cursor: str
    key: str = ""
    site: SiteData | None = None


def telemetry_tick(config: PipelineConfig, current: Settings, cursor: str | None, running: str | None) -> Tick:
    """Start taking telemetry in if there are files that were not seen. running: run that is at it already."""
    state = _state(cursor)
    unseen = inbox_of(current, config.pipeline).unseen()
    if not unseen:
        return Tick(False, "no new telemetry file", "{}")
    listing = sha256("\n".join(unseen).encode()).hexdigest()[:16]
    if running is not None:
        return Tick(False, f"run {running[:8]} is taking telemetry in", json.dumps(state))
    tries = state.get("tries", 0) if state.get("listing") == listing else 0
    if tries >= MAX_TRIES:
        return Tick(False, f"taking in {_few(unseen)} failed {tries} times; look at the last run, or wait for other files",
                    json.dumps(state))  # fmt: skip
    return Tick(True, f"new: {_few(unseen)}", json.dumps({"listing": listing, "tries": tries + 1}), f"{listing}-{tries}")


def drift_tick(
    config: PipelineConfig, store: Store, current: Settings, cursor: str | None, running: str | None, failures: Sequence[str],
    now: float,
) -> Tick:  # fmt: skip
    """Start a re-distillation if the newest report asks for one and nothing speaks against it.

    running: a re-distillation that is queued or under way. failures: what the last runs in a row ended with, newest first.
    """
    state, sensor = _state(cursor), config.sensors.drift
    report = current_report(config.pipeline, store, current)

    def wait(why: str, **changes: Any) -> Tick:
        return Tick(False, why, json.dumps({**state, **changes}))

    if report is None:
        return wait("no drift report yet")
    found = report.metrics
    window = found["window"]
    if found["action"] != "redistill":
        return wait(f"window {window}: {found['why']}")
    champion = champion_of(config.pipeline, store, current)
    if champion is None:
        return wait(f"window {window}: {found['cause']}, but nothing serves that could be re-distilled")
    watched = report.manifest["inputs"].get("deployment", {}).get("recipe")
    if watched != champion.recipe:
        return wait(f"window {window} was judged for another champion; the next report is about the present one")
    if state.get("window") == window:
        return wait(f"window {window}: a re-distillation was started for it already")
    if found["streak_labelled"] < sensor.min_labelled:
        return wait(
            f"window {window}: {found['cause']}, but only {found['streak_labelled']} labelled rows since it began; "
            f"{sensor.min_labelled} are needed to learn from and to judge by"
        )
    if running is not None:
        return wait(f"window {window}: {found['cause']}; re-distillation {running[:8]} is under way")
    if len(failures) >= MAX_FAILURES:
        return wait(
            f"window {window}: {found['cause']}, but the last {len(failures)} re-distillations failed ({failures[0]}); "
            "mend that, then start the job redistill by hand"
        )
    passed = now - state.get("fired_at", float("-inf"))
    if passed < 0:
        return wait(f"the clock was set back by {-passed:.0f} s; the cooldown begins anew", fired_at=now)
    if passed < sensor.cooldown_hours * HOUR_S:
        left = sensor.cooldown_hours * HOUR_S - passed
        return wait(f"window {window}: {found['cause']}; cooling down for another {left / HOUR_S:.1f} h")
    spans = tuple((float(start), float(end)) for start, end in found["streak"])
    site = SiteData(telemetry=report.manifest["inputs"]["telemetry"]["recipe"], windows=spans, start=champion.recipe)
    why = f"window {window}: {found['cause']} ({found['why']})"
    return Tick(True, why, json.dumps({"window": window, "fired_at": now}), f"drift-{window}-{champion.recipe[:8]}", site)


def recent_site(config: PipelineConfig, store: Store, current: Settings) -> SiteData | str:
    """What a nightly re-distillation, or one that is started by hand, works on; or why there is nothing for it.

    The windows of the present drift if there is one, else all that came after those that the champion was made from.
    """
    champion = champion_of(config.pipeline, store, current)
    if champion is None:
        return "nothing serves yet"
    report = current_report(config.pipeline, store, current)
    if report is None:
        return "no drift report yet, so no telemetry"
    recipe = report.manifest["inputs"]["telemetry"]["recipe"]
    telemetry = store.get(config.pipeline, "telemetry", recipe)
    if telemetry is None:
        return f"telemetry {recipe} is no longer in the store"
    streak = [(float(start), float(end)) for start, end in report.metrics.get("streak", [])]
    if streak:
        windows = streak
    else:
        last = _trained_until(champion, store)
        windows = [(item.start_s, item.end_s) for item in windows_of(telemetry) if item.state == "ready" and item.start_s >= last]
    if not windows:
        return "no window has come since the champion was re-distilled"
    return SiteData(telemetry=recipe, windows=tuple(windows), start=champion.recipe)


def _trained_until(champion: Artifact, store: Store) -> float:
    """End of the last telemetry window that the champion was re-distilled on; 0 if it was not."""
    entry = champion.manifest["inputs"].get("corpus")
    corpus = store.get(champion.pipeline, "corpus", entry["recipe"]) if entry is not None else None
    site: Mapping[str, Any] = (corpus.metrics.get("site") if corpus is not None else None) or {}
    return max((float(end) for _, end in site.get("windows", [])), default=0.0)


def _state(cursor: str | None) -> dict[str, Any]:
    """What was remembered; a cursor of another kind is forgotten."""
    try:
        found = json.loads(cursor or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
