"""The field steps on telemetry made by hand: taken in, windows, reference, report; small windows and rubbish are a clear word."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rankd_pipeline.cli import rankd
from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.runner import open_store
from rankd_pipeline.steps.watch import current_report, inbox_of, report_drift, take_telemetry
from rankd_pipeline.store.artifact import Artifact, Store
from rankd_pipeline_tests.telemetry.made import PIPELINE, columns, write

SPEC = load_pipeline(PIPELINE).at("smoke")


@pytest.fixture
def store(home: Settings) -> Store:
    return open_store(home)


def drop(home: Settings, hour: int, rows: int = 1000, **changes) -> Path:
    return write(home.telemetry_dir(PIPELINE), f"hour{hour:03d}.parquet", columns(rows, hour, labelled=0.4, **changes))


def watch(home: Settings, store: Store) -> tuple[Artifact, list[dict]]:
    take_telemetry(SPEC, store, home)
    report = report_drift(SPEC, store, home)
    return report, json.loads(report.file("drift.json").read_text())["windows"]


def test_windows_first_show_what_is_normal_and_then_are_judged(home: Settings, store: Store) -> None:
    for hour in range(4):
        drop(home, hour)
    report, windows = watch(home, store)
    assert [window["state"] for window in windows] == ["no reference"] * 4 and report.metrics["state"] == "no reference"
    assert report.metrics["reference"] == "what is normal is still being learned"
    for hour in (4, 5):
        drop(home, hour)
    report, windows = watch(home, store)
    assert [window["state"] for window in windows] == ["reference"] * 5 + ["judged"]
    assert report.metrics["why"] == "no drift" and report.metrics["streak"] == []
    longer = columns(1000, 6)["delay_spread_ns"] * 3
    drop(home, 6, delay_spread_ns=longer)
    weak = columns(1000, 7)["l1_rsrp_dbm"].copy()
    weak[:, 0, 7] -= 12
    drop(home, 7, l1_rsrp_dbm=weak)
    report, windows = watch(home, store)
    assert [(window["causes"][0]["cause"], window["action"]) for window in windows[-2:]] == [
        ("delay_spread", "harmless"), ("broken_element", "redistill"),
    ]  # fmt: skip
    assert report.metrics["cause"] == "broken_element" and report.metrics["action"] == "redistill"
    assert report.metrics["streak"] == [[windows[-1]["start_s"], windows[-1]["end_s"]]]
    assert {path.stem for path in (report.path / "figures").glob("*.png")} >= {"score_over_time", "drift_over_time"}


def test_what_did_not_change_is_not_made_again(home: Settings, store: Store) -> None:
    drop(home, 0)
    first = take_telemetry(SPEC, store, home)
    assert not first.cached and take_telemetry(SPEC, store, home).cached
    assert report_drift(SPEC, store, home).recipe == report_drift(SPEC, store, home).recipe
    drop(home, 1)
    second = take_telemetry(SPEC, store, home)
    assert second.recipe != first.recipe and second.metrics["rows"] == 2000
    linked = second.file("files/hour000.parquet").stat()
    assert linked.st_nlink >= 3, "the field's file, and one name in each artifact: no copy"


def test_the_first_windows_stay_the_reference_when_they_are_long_gone(home: Settings, store: Store) -> None:
    for hour in range(6):
        drop(home, hour)
    before, _ = watch(home, store)
    for hour in range(60, 62):
        drop(home, hour)
    after, windows = watch(home, store)
    assert [window["state"] for window in windows] == ["judged", "judged"]
    assert after.manifest["inputs"]["reference"]["recipe"] == before.manifest["inputs"]["reference"]["recipe"]


@pytest.mark.parametrize("rows", [1, 999])
def test_a_small_window_is_too_small_and_says_so(home: Settings, store: Store, rows: int) -> None:
    drop(home, 0, rows)
    report, windows = watch(home, store)
    assert windows[0]["state"] == "too small" and f"{rows} of 1000 rows" in windows[0]["why"]
    assert report.metrics["state"] == "too small" and not report.metrics["drifted"]
    assert not list((report.path / "figures").glob("*.png"))


def test_a_window_without_labels_is_judged_by_its_inputs(home: Settings, store: Store) -> None:
    for hour in range(6):
        drop(home, hour, has_label=np.zeros(1000, bool))
    report, windows = watch(home, store)
    assert windows[-1]["state"] == "judged" and windows[-1]["quality"]["score"] is None
    assert windows[-1]["quality"]["expected"] is not None and "score" not in report.metrics


def test_nothing_usable_is_one_sentence_and_a_good_file_mends_it(home: Settings, store: Store) -> None:
    with pytest.raises(RankdError, match="no usable telemetry yet"):
        take_telemetry(SPEC, store, home)
    with pytest.raises(RankdError, match="none was taken in yet"):
        report_drift(SPEC, store, home)
    folder = home.telemetry_dir(PIPELINE)
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"rubbish{number}.parquet").write_bytes(b"\x00" * 100 * number + b"x")
    with pytest.raises(RankdError, match="5 set aside"):
        take_telemetry(SPEC, store, home)
    drop(home, 0)
    assert take_telemetry(SPEC, store, home).metrics["rows"] == 1000


def test_files_older_than_what_is_kept_are_left_out(home: Settings, store: Store) -> None:
    drop(home, 0)
    drop(home, 100)
    assert take_telemetry(SPEC, store, home).metrics["rows"] == 1000
    assert set(inbox_of(home, PIPELINE).record()["files"]) == {"hour000.parquet", "hour100.parquet"}


def test_an_edited_file_is_seen_by_the_hash_of_its_artifact(home: Settings, store: Store) -> None:
    path = drop(home, 0)
    artifact = take_telemetry(SPEC, store, home)
    artifact.verify()
    with path.open("r+b") as handle:
        handle.seek(100)
        handle.write(b"xx")
    with pytest.raises(RankdError, match="truncated or\\s*edited"):
        artifact.verify()


def test_the_command_says_window_by_window_what_was_found(home: Settings) -> None:
    for hour in range(6):
        drop(home, hour)
    (home.telemetry_dir(PIPELINE) / "rubbish.parquet").write_text("x")
    result = CliRunner().invoke(rankd, ["drift", PIPELINE], catch_exceptions=False)
    assert result.exit_code == 0
    assert "rubbish.parquet: set aside, not a Parquet file" in result.stderr
    assert result.stdout.count("shows what is normal") == 5 and result.stdout.count("no drift") == 1
    again = CliRunner().invoke(rankd, ["drift", PIPELINE, "--last", "--json"], catch_exceptions=False)
    assert len(json.loads(again.stdout)["windows"]) == 6
    assert current_report(PIPELINE, open_store(home), home) is not None
