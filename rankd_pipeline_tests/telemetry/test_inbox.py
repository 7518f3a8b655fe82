"""The telemetry folder: files being written are not read, bad ones are set aside with their reason, good ones taken in once."""

import os
import time
from pathlib import Path

import pytest

from rankd_pipeline.errors import RankdError
from rankd_pipeline.telemetry.inbox import ABANDONED_S, QUARANTINE, RECORD, Inbox, Intake, quarantined, state_of
from rankd_pipeline_tests.telemetry.made import START_S, columns, schema, write

LATEST = START_S + 1e7


def take(folder: Path) -> Intake:
    inbox = Inbox(folder)
    intake = inbox.take(schema(), LATEST)
    inbox.commit(intake, "recipe")
    return intake


def test_good_files_are_taken_in_once(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", columns(100, 0))
    write(tmp_path, "b.parquet", columns(200, 1))
    assert Inbox(tmp_path).unseen() == ["a.parquet", "b.parquet"]
    intake = take(tmp_path)
    assert intake.new == ["a.parquet", "b.parquet"] and not intake.set_aside
    assert intake.files["b.parquet"].rows == 200 and intake.files["b.parquet"].first_s >= START_S + 3600
    assert Inbox(tmp_path).unseen() == [] and take(tmp_path).new == []
    write(tmp_path, "c.parquet", columns(100, 2))
    assert Inbox(tmp_path).unseen() == ["c.parquet"]
    assert take(tmp_path).new == ["c.parquet"] and set(take(tmp_path).files) == {"a.parquet", "b.parquet", "c.parquet"}


def test_a_file_that_is_being_written_waits(tmp_path: Path) -> None:
    whole = write(tmp_path, "a.parquet", columns(500, 0)).read_bytes()
    growing = tmp_path / "b.parquet"
    for size in (0, 3, 4, 100, len(whole) - 5, len(whole) - 1):
        growing.write_bytes(whole[:size])
        assert state_of(growing) == "writing", size
        assert Inbox(tmp_path).unseen() == ["a.parquet"]
    assert take(tmp_path).waiting == ["b.parquet"]
    (tmp_path / "c.parquet.tmp").write_bytes(whole)
    (tmp_path / ".d.parquet").write_bytes(whole)
    (tmp_path / "_e.parquet").write_bytes(whole)
    assert set(take(tmp_path).files) == {"a.parquet"}
    write(tmp_path, "b.parquet", columns(500, 1))
    assert take(tmp_path).new == ["b.parquet"]


def test_a_file_whose_writer_died_is_set_aside_after_a_while(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", columns(100))
    path.write_bytes(path.read_bytes()[:-9])
    assert take(tmp_path).waiting == ["a.parquet"]
    old = time.time() - ABANDONED_S - 5
    os.utime(path, (old, old))
    assert "its writer died" in take(tmp_path).set_aside["a.parquet"]
    future = time.time() + 9e5  # this host's clock was set back: age says nothing, the file waits
    other = tmp_path / "b.parquet"
    other.write_bytes(b"PAR1")
    os.utime(other, (future, future))
    assert take(tmp_path).waiting == ["b.parquet"]


def test_a_folder_full_of_rubbish_keeps_the_good_ones(tmp_path: Path) -> None:
    good = write(tmp_path, "good.parquet", columns(100, 0))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "sub").mkdir()
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "text.parquet").write_text("time_s,session\n1,2\n")
    (tmp_path / "noise.parquet").write_bytes(os.urandom(5000))
    (tmp_path / "zero.parquet").write_bytes(b"PAR1" + bytes(4000) + b"PAR1")
    (tmp_path / "copy.parquet").write_bytes(good.read_bytes())
    (tmp_path / "dangling.parquet").symlink_to(tmp_path / "nowhere")
    write(tmp_path, "other.parquet", columns(100, 1)).rename(tmp_path / "wrong.parquet")
    table = columns(100, 2)
    table["latency_us"][:] = -1
    write(tmp_path, "spoilt.parquet", table)
    write(tmp_path, "future.parquet", columns(100, 1e6))
    intake = take(tmp_path)
    assert set(intake.files) == {"copy.parquet", "wrong.parquet"}, "of two equal files the first by name is taken in"
    reasons = quarantined(tmp_path)
    assert set(reasons) == {"text.parquet", "noise.parquet", "zero.parquet", "good.parquet", "spoilt.parquet", "future.parquet"}
    assert "same content as copy.parquet" in reasons["good.parquet"] and "clock" in reasons["future.parquet"]
    assert all((tmp_path / QUARANTINE / name).is_file() for name in reasons)
    assert take(tmp_path).set_aside == {} and intake.other == 4


def test_two_bad_files_of_one_name_are_both_kept(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "a.parquet").write_text(text)
        take(tmp_path)
    assert {path.read_text() for path in (tmp_path / QUARANTINE).glob("*.parquet")} == {"one", "two"}


def test_an_edited_file_is_told(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", columns(100, 0))
    take(tmp_path)
    write(tmp_path, "a.parquet", columns(110, 0))
    assert "append-only" in take(tmp_path).set_aside["a.parquet"]


def test_a_touched_file_is_no_new_one(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", columns(100, 0))
    take(tmp_path)
    os.utime(path)
    assert take(tmp_path).new == ["a.parquet"] and take(tmp_path).set_aside == {}


def test_no_folder_is_no_telemetry_and_a_damaged_record_is_one_sentence(tmp_path: Path) -> None:
    assert Inbox(tmp_path / "nowhere").unseen() == [] and take(tmp_path / "nowhere").files == {}
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(RankdError, match="damaged; delete it"):
        Inbox(tmp_path).unseen()
