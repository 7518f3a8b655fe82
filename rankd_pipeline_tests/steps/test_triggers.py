"""What starts a re-distillation and, above all, what does not and why: planted reports, a cursor, and the clock."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankd_pipeline.runtime.bundle import verify_bundle
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineConfig, SiteData, load_pipeline
from rankd_pipeline.steps.runner import open_store
from rankd_pipeline.steps.triggers import Tick, drift_tick, recent_site, telemetry_tick
from rankd_pipeline.steps.watch import inbox_of
from rankd_pipeline.store.artifact import Artifact, Recipe, Store
from rankd_pipeline.store.ledger import open_ledger
from rankd_pipeline_tests.orchestration.planted import plant
from rankd_pipeline_tests.telemetry.made import PIPELINE, columns, write

CONFIG = load_pipeline(PIPELINE)
HOUR = 3600.0
NOW = 1_800_000_000.0


def champion(home: Settings, seed: int = 0) -> Artifact:
    artifact = plant(CONFIG.at("laptop", seed), home)["deployment"]
    ledger = open_ledger(home, PIPELINE)
    entry = ledger.register(artifact.recipe, str(artifact.path / "bundle"), "laptop", 0.6, "t", None)
    ledger.decide(entry, "champion", "planted", verify_bundle)
    return artifact


def report(home: Settings, deployment: Artifact | None, window: str = "2026-01-01T05:00", **metrics: Any) -> Artifact:
    """A drift report about this champion, current in the inbox's record."""
    store = open_store(home)
    telemetry = store.publish(_draft(store, "telemetry", {"window": window}, {"windows": _windows()}), {})
    found = {
        "window": window, "state": "judged", "why": "broken_element (redistill): ssb_beam 7", "drifted": True,
        "action": "redistill", "cause": "broken_element", "streak": [[0.0, HOUR]], "streak_labelled": 5000, **metrics,
    }  # fmt: skip
    inputs = {"telemetry": telemetry} | ({"deployment": deployment} if deployment is not None else {})
    made = store.publish(_draft(store, "drift_report", {"window": window, **metrics}, found), inputs)
    inbox_of(home, PIPELINE).note(telemetry=telemetry.recipe, drift_report=made.recipe)
    return made


def _windows() -> list[dict[str, Any]]:
    return [
        {"key": str(hour), "start_s": hour * HOUR, "end_s": (hour + 1) * HOUR, "rows": 1000, "labelled": 200, "state": "ready",
         "closed": False}
        for hour in range(3)
    ]  # fmt: skip


def _draft(store: Store, step: str, config: dict[str, Any], metrics: dict[str, Any]) -> Any:
    draft = store.draft(Recipe(PIPELINE, step, "1", config, "laptop", 0, "default", {}, {}))
    if step == "telemetry":
        (draft.out / "windows.json").write_text(json.dumps(metrics["windows"]))
    draft.metrics.update(metrics)
    return draft


def tick(home: Settings, cursor: str | None = None, now: float = NOW, config: PipelineConfig = CONFIG, **options: Any) -> Tick:
    given = {"running": None, "failures": [], **options}
    return drift_tick(config, open_store(home), home, cursor, given["running"], given["failures"], now)


def test_it_starts_once_a_window_and_says_what_for(home: Settings) -> None:
    serving = champion(home)
    made = report(home, serving)
    found = tick(home)
    assert found.start and "broken_element" in found.why and found.key == f"drift-2026-01-01T05:00-{serving.recipe[:8]}"
    telemetry = made.manifest["inputs"]["telemetry"]["recipe"]
    assert found.site == SiteData(telemetry=telemetry, windows=((0.0, HOUR),), start=serving.recipe)
    again = tick(home, found.cursor, NOW + 100 * HOUR)
    assert not again.start and "started for it already" in again.why and json.loads(again.cursor) == json.loads(found.cursor)


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ({"action": "harmless", "why": "delay_spread (harmless): 70 to 210"}, "delay_spread (harmless)"),
        ({"action": "operator", "why": "slow_host (operator): p99.9 400 us"}, "slow_host"),
        ({"action": None, "drifted": False, "why": "no drift"}, "no drift"),
        ({"action": None, "state": "too small", "why": "too small: 12 of 1000 rows; waits for more"}, "12 of 1000 rows"),
        ({"action": None, "state": "no reference", "why": "what is normal is still being learned"}, "still being learned"),
        ({"streak_labelled": 1999}, "only 1999 labelled rows since it began; 2000 are needed"),
    ],
)
def test_it_says_why_it_does_not_start(home: Settings, metrics: dict[str, Any], why: str) -> None:
    report(home, champion(home), **metrics)
    found = tick(home)
    assert not found.start and why in found.why


def test_without_a_report_or_a_champion_nothing_starts(home: Settings) -> None:
    assert tick(home).why == "no drift report yet"
    report(home, None)
    assert "nothing serves that could be re-distilled" in tick(home).why


def test_a_report_about_another_champion_is_not_acted_on(home: Settings) -> None:
    report(home, champion(home))
    champion(home, seed=1)
    assert "another champion" in tick(home).why


def test_a_run_that_is_under_way_is_waited_for_without_moving_the_cursor(home: Settings) -> None:
    report(home, champion(home))
    found = tick(home, running="0123456789")
    assert not found.start and "01234567 is under way" in found.why
    assert tick(home, found.cursor).start


def test_the_cooldown_holds_and_ends(home: Settings) -> None:
    serving = champion(home)
    report(home, serving)
    fired = tick(home)
    report(home, serving, window="2026-01-01T06:00")
    early = tick(home, fired.cursor, NOW + HOUR)
    assert not early.start and "cooling down for another 11.0 h" in early.why
    assert tick(home, early.cursor, NOW + 12 * HOUR).start


def test_a_clock_that_was_set_back_begins_the_cooldown_anew_and_then_goes_on(home: Settings) -> None:
    serving = champion(home)
    report(home, serving)
    fired = tick(home)
    report(home, serving, window="2026-01-01T06:00")
    back = tick(home, fired.cursor, NOW - 1000 * HOUR)
    assert not back.start and "clock was set back by 3600000 s" in back.why
    assert "cooling down" in tick(home, back.cursor, NOW - 999 * HOUR).why
    assert tick(home, back.cursor, NOW - 988 * HOUR).start


def test_what_failed_three_times_is_not_tried_for_ever(home: Settings) -> None:
    report(home, champion(home))
    assert tick(home, failures=["teacher: the training diverged", "b"]).start
    found = tick(home, failures=["teacher: the training diverged", "b", "c"])
    assert not found.start and "the last 3 re-distillations failed (teacher: the training diverged)" in found.why


@pytest.mark.parametrize("cursor", ["", "{", "[]", "null", "17", '{"window": 3}'])
def test_a_cursor_of_another_kind_is_forgotten(home: Settings, cursor: str) -> None:
    report(home, champion(home))
    assert tick(home, cursor).start


def test_nightly_takes_the_present_drift_or_all_that_is_new(home: Settings) -> None:
    assert recent_site(CONFIG, open_store(home), home) == "nothing serves yet"
    serving = champion(home)
    assert "no drift report yet" in str(recent_site(CONFIG, open_store(home), home))
    report(home, serving, action=None, streak=[])
    site = recent_site(CONFIG, open_store(home), home)
    assert isinstance(site, SiteData) and site.windows == ((0.0, HOUR), (HOUR, 2 * HOUR), (2 * HOUR, 3 * HOUR))
    report(home, serving, window="2026-01-01T06:00")
    site = recent_site(CONFIG, open_store(home), home)
    assert isinstance(site, SiteData) and site.windows == ((0.0, HOUR),)


def test_telemetry_starts_on_new_files_and_gives_up_on_the_same_ones(home: Settings) -> None:
    assert telemetry_tick(CONFIG, home, None, None).why == "no new telemetry file"
    write(home.telemetry_dir(PIPELINE), "a.parquet", columns(10))
    first = telemetry_tick(CONFIG, home, None, None)
    assert first.start and "a.parquet" in first.why
    waits = telemetry_tick(CONFIG, home, first.cursor, "run-1234567")
    assert not waits.start and "run-1234 is taking telemetry in" in waits.why
    second = telemetry_tick(CONFIG, home, waits.cursor, None)
    third = telemetry_tick(CONFIG, home, second.cursor, None)
    assert second.start and not third.start and "failed 2 times" in third.why
    write(home.telemetry_dir(PIPELINE), "b.parquet", columns(10, 1))
    assert telemetry_tick(CONFIG, home, third.cursor, None).start


def test_sensors_answer_fast_and_load_nothing_heavy(home: Settings, tmp_path: Path) -> None:
    report(home, champion(home))
    code = """
import sys, time
import dagster as dg
from rankd_pipeline.definitions import defs
definitions = defs()
with dg.DagsterInstance.get() as instance:
    for name in ("beam_management_drift", "beam_management_telemetry"):
        started = time.process_time()
        with dg.build_sensor_context(instance=instance, definitions=definitions) as context:
            result = definitions.resolve_sensor_def(name).evaluate_tick(context)
        print(name, time.process_time() - started, len(result.run_requests or []), result.skip_message)
heavy = ("torch", "mlflow", "sionna", "onnxruntime", "sklearn", "scipy", "pandas", "matplotlib")
print([module for module in heavy if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drift, telemetry, heavy = done.stdout.splitlines()
    assert float(drift.split()[1]) < 2.0 and drift.split()[2] == "1"
    assert float(telemetry.split()[1]) < 2.0 and telemetry.endswith("no new telemetry file")
    assert heavy == "[]"
