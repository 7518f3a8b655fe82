"""The ledger and the bundle that serves: one switch, whole at any moment, kill -9 or not; versions count up; rollback."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.store.ledger import KEEP_STATES, LEDGER, Entry, Ledger


def bundle(folder: Path, name: str) -> str:
    """Two files that must never be seen apart."""
    path = folder / "bundles" / name
    path.mkdir(parents=True, exist_ok=True)
    for file in ("model.onnx", "manifest.json"):
        (path / file).write_text(name)
    return str(path)


def register(ledger: Ledger, recipe: str) -> Entry:
    return ledger.register(recipe, bundle(ledger.link.parent.parent, recipe), "laptop", 0.7, "test-data", "run-1")


def serve(ledger: Ledger, recipe: str) -> Entry:
    return ledger.decide(register(ledger, recipe), "champion", "better")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "serving", "toy")


def test_a_bundle_is_registered_once_and_versions_count_up(ledger: Ledger) -> None:
    assert ledger.champion() is None and ledger.entries() == [] and ledger.bundle is None
    first = register(ledger, "a")
    assert register(ledger, "a") == first and register(ledger, "b").version == 2
    assert [entry.version for entry in Ledger(ledger.link.parent, "toy").entries()] == [1, 2]
    assert ledger.bundle is None, "registered is not serving"


def test_the_champion_is_the_last_decision_and_is_taken_once(ledger: Ledger) -> None:
    first, second = register(ledger, "a"), register(ledger, "b")
    ledger.decide(first, "champion", "there was none")
    ledger.decide(first, "champion", "there was none")
    ledger.decide(second, "refused", "not better")
    assert [entry.event for entry in ledger.entries()] == ["registered", "registered", "champion", "refused"]
    champion = ledger.champion()
    assert champion is not None and champion.recipe == "a"
    ledger.decide(second, "champion", "better")
    assert [entry.recipe for entry in ledger.entries() if entry.event == "champion"] == ["a", "b"]
    assert ledger.bundle is not None and (ledger.bundle / "model.onnx").read_text() == "b"


def test_the_serving_copy_outlives_the_store(ledger: Ledger, tmp_path: Path) -> None:
    entry = serve(ledger, "a")
    for path in Path(entry.bundle).iterdir():
        path.unlink()
    assert (ledger.link / "bundle" / "model.onnx").read_text() == "a"
    moved = tmp_path / "elsewhere"
    ledger.link.parent.rename(moved)
    assert (moved / "toy" / "bundle" / "model.onnx").read_text() == "a", "a home may be moved"


def test_rollback_goes_to_what_served_before_and_is_a_line_of_its_own(ledger: Ledger) -> None:
    for recipe in "abc":
        serve(ledger, recipe)
    entry, before = ledger.roll_back(None, "complaints from the field")
    assert (entry.version, before.version, entry.event) == (2, 3, "rollback")
    assert entry.reason == "rolled back from v3: complaints from the field"
    assert ledger.bundle is not None and (ledger.bundle / "model.onnx").read_text() == "b"
    assert ledger.roll_back(1, "")[0].version == 1
    assert ledger.roll_back(3, "")[0].version == 3, "forward again"
    served = [(service.entry.version, service.until is None) for service in ledger.services()]
    assert served == [(1, False), (2, False), (3, False), (2, False), (1, False), (3, True)]
    assert all(one.until == two.since for one, two in zip(ledger.services(), ledger.services()[1:], strict=False))


def test_a_rollback_that_cannot_be_is_one_sentence_and_changes_nothing(ledger: Ledger) -> None:
    with pytest.raises(RankdError, match="nothing has served"):
        ledger.roll_back(None, "")
    serve(ledger, "a")
    with pytest.raises(RankdError, match="no other version has served.*none"):
        ledger.roll_back(None, "")
    register(ledger, "b")
    for to, words in ((2, "version 2 has not served.*none"), (1, "serves already"), (9, "version 9 has not served")):
        with pytest.raises(RankdError, match=words):
            ledger.roll_back(to, "")
    serve(ledger, "c")

    def damaged(path: Path) -> None:
        raise RankdError(f"{path}: changed")

    before = ledger.entries()
    with pytest.raises(RankdError, match="changed"):
        ledger.roll_back(None, "", check=damaged)
    assert ledger.entries() == before and (ledger.link / "bundle" / "model.onnx").read_text() == "c"


def test_a_bundle_that_is_gone_cannot_become_champion(ledger: Ledger) -> None:
    entry = ledger.register("a", str(ledger.link.parent / "nowhere"), "laptop", 0.7, "t", None)
    with pytest.raises(RankdError, match="the bundle of version 1 is gone"):
        ledger.decide(entry, "champion", "first")
    assert ledger.champion() is None and ledger.bundle is None


def test_mirrors_are_pending_until_they_show_the_serving_line(ledger: Ledger) -> None:
    assert ledger.pending() == {}
    serve(ledger, "a")
    assert set(ledger.pending()) == {"MLflow alias", "Dagster asset"}
    ledger.note_mirror("MLflow alias", ledger.serving_line(), "")
    ledger.note_mirror("Dagster asset", ledger.serving_line(), "it is down")
    assert ledger.pending() == {"Dagster asset": "it is down"}
    register(ledger, "b")
    assert ledger.pending() == {"Dagster asset": "it is down"}, "a registration changes nothing that mirrors show"
    ledger.note_mirror("Dagster asset", ledger.serving_line(), "")
    serve(ledger, "b")
    assert set(ledger.pending()) == {"MLflow alias", "Dagster asset"}


@given(st.binary(max_size=40).filter(lambda line: b"\n" not in line and b"\r" not in line))
def test_a_damaged_line_is_named(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("home") / "serving", "toy")
    register(ledger, "a")
    path = ledger.link / LEDGER
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(RankdError, match="line [2-9]: not a ledger entry"):
        ledger.entries()


WRITER = """
import sys
from pathlib import Path
from rankd_pipeline.store.ledger import Ledger
folder = Path(sys.argv[1])
ledger = Ledger(folder / "serving", "toy")
for number in range(int(sys.argv[3])):
    recipe = f"{sys.argv[2]}-{number}"
    path = folder / "bundles" / recipe
    path.mkdir(parents=True, exist_ok=True)
    for file in ("model.onnx", "manifest.json"):
        (path / file).write_text(recipe)
    ledger.decide(ledger.register(recipe, str(path), "smoke", None, "t", None), "champion", "next")
    print(recipe, flush=True)
"""


def writer(folder: Path, name: str, count: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name, str(count)], stdout=subprocess.PIPE)


def agrees(ledger: Ledger) -> None:
    """What a reader sees in one state: the ledger's champion and the bundle are the same, and the bundle is whole."""
    state = ledger.state
    if state is None:
        return
    serving = [item for item in map(json.loads, (state / LEDGER).read_text().splitlines()) if item["event"] == "champion"]
    found = (state / "bundle").resolve() if (state / "bundle").exists() else None
    assert (found is None) == (not serving)
    if found is not None:
        assert {path.name: path.read_text() for path in found.iterdir()} == {
            "model.onnx": serving[-1]["recipe"], "manifest.json": serving[-1]["recipe"],
        }  # fmt: skip


def test_two_processes_take_turns_and_a_reader_never_sees_half(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "serving", "toy")
    writers = [writer(tmp_path, name, 15) for name in ("left", "right")]
    problems: list[BaseException] = []
    done = threading.Event()
    looks = 0

    def read() -> None:
        nonlocal looks
        while not done.is_set():
            try:
                agrees(ledger)
                looks += 1
            except BaseException as error:
                problems.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    assert [item.wait(60) for item in writers] == [0, 0]
    done.set()
    reader.join()
    assert not problems and looks > 30, problems
    versions = [entry.version for entry in ledger.entries() if entry.event == "registered"]
    assert versions == list(range(1, 31))
    assert len(list(ledger.states.glob("[0-9]*"))) == KEEP_STATES


def test_kill_9_at_any_moment_leaves_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "serving", "toy")
    seen = 0
    for attempt in range(12):
        process = writer(tmp_path, f"try{attempt}", 50)
        assert process.stdout is not None
        process.stdout.readline()  # it is under way
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        agrees(ledger)
        entries = ledger.entries()
        assert len(entries) > seen and [entry.event for entry in entries[:seen]] == [entry.event for entry in entries][:seen]
        seen = len(entries)
    serve(ledger, "after")
    agrees(ledger)
