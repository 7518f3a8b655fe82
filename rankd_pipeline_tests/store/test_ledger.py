"""The ledger: registered once, versions count up, a power failure costs at most the line being written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.store.ledger import Ledger


def register(ledger: Ledger, recipe: str):
    return ledger.register(recipe, f"/bundles/{recipe}", "laptop", 0.7, "test-data", "run-1")


def test_a_bundle_is_registered_once_and_versions_count_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "toy")
    assert ledger.champion() is None and ledger.entries() == []
    first = register(ledger, "a")
    assert register(ledger, "a") == first and register(ledger, "b").version == 2
    assert [entry.version for entry in Ledger(tmp_path, "toy").entries()] == [1, 2]


def test_the_champion_is_the_last_decision_and_is_taken_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "toy")
    first, second = register(ledger, "a"), register(ledger, "b")
    ledger.decide(first, "champion", "there was none")
    ledger.decide(first, "champion", "there was none")
    ledger.decide(second, "refused", "not better")
    assert [entry.event for entry in ledger.entries()] == ["registered", "registered", "champion", "refused"]
    champion = ledger.champion()
    assert champion is not None and champion.recipe == "a"
    ledger.decide(second, "champion", "better")
    assert [entry.recipe for entry in ledger.entries() if entry.event == "champion"] == ["a", "b"]


@given(st.integers(1, 200))
def test_a_torn_last_line_is_no_entry_and_does_not_swallow_the_next(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger"), "toy")
    register(ledger, "a")
    register(ledger, "b")
    whole = ledger.path.read_bytes()
    second_line = len(whole.split(b"\n")[1]) + 1
    ledger.path.write_bytes(whole[: -min(cut, second_line)])
    assert [entry.recipe for entry in ledger.entries()] == ["a"]
    assert register(ledger, "c").version == 2
    assert [entry.recipe for entry in ledger.entries()] == ["a", "c"]


@pytest.mark.parametrize("line", [b"{}", b"[]", b"\xff\xfe", b'{"event": "registered"', b"null"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    ledger = Ledger(tmp_path, "toy")
    register(ledger, "a")
    ledger.path.write_bytes(line + b"\n" + ledger.path.read_bytes())
    with pytest.raises(RankdError, match="line 1: not a ledger entry"):
        ledger.entries()


WRITER = """
import sys
from pathlib import Path
from rankd_pipeline.store.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), "toy")
for number in range(20):
    ledger.register(f"{sys.argv[2]}-{number}", "/b", "smoke", None, "t", None)
"""


def test_two_processes_write_whole_lines_and_different_versions(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in ("left", "right")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert sorted(line["version"] for line in lines) == list(range(1, 41))
