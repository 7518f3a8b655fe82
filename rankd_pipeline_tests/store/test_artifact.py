"""The store: whole or absent, never edited unseen, one maker at a time."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankd_pipeline.errors import ArtifactDamaged, Busy, RankdError
from rankd_pipeline.store.artifact import MANIFEST, OBSERVED, Artifact, Recipe, Store, canonical_json


def recipe(step: str = "corpus", seed: int = 0, inputs: dict[str, str] | None = None, pipeline: str = "toy") -> Recipe:
    return Recipe(pipeline, step, "1", {"samples": 8}, "smoke", seed, "default", inputs or {}, {"numpy": "2"})


def make(store: Store, step: str = "corpus", seed: int = 0, text: str = "content", inputs: dict[str, Artifact] | None = None):
    inputs = inputs or {}
    draft = store.draft(recipe(step, seed, {name: item.version for name, item in inputs.items()}))
    (draft.out / "part").mkdir(exist_ok=True)
    (draft.out / "part" / "data.txt").write_text(text)
    (draft.out / "timing.json").write_text(str(time.monotonic_ns()))
    draft.volatile.add("timing.json")
    draft.metrics["rows"] = len(text)
    draft.observed["seconds"] = 0.5
    return store.publish(draft, inputs)


def script(code: str, *arguments: object) -> subprocess.Popen:
    """A real process that runs `code` with the test helpers in reach; it prints `ready` when it is where it should be."""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_published_artifact_is_found_by_recipe_and_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = make(store)
    found = Store(tmp_path).get("toy", "corpus", recipe().digest)
    assert found is not None and found.version == made.version and found.metrics == {"rows": 7}
    found.verify()
    assert found.file("part/data.txt").read_text() == "content"
    assert not (tmp_path / ".work" / "toy" / "corpus" / made.recipe).exists()
    with pytest.raises(ArtifactDamaged, match="no-such"):
        found.file("no-such")


def test_the_version_is_the_content_not_the_time(tmp_path: Path) -> None:
    first, second = make(Store(tmp_path / "a")), make(Store(tmp_path / "b"))
    assert (first.path / "timing.json").read_text() != (second.path / "timing.json").read_text()
    assert first.version == second.version and first.manifest_sha256 == second.manifest_sha256
    assert make(Store(tmp_path / "c"), text="other").version != first.version


@given(st.permutations(["a", "b", "c", "d"]), st.integers(0, 3))
def test_a_recipe_digest_does_not_depend_on_key_order_but_on_every_value(keys: list[str], seed: int) -> None:
    def digest(names: list[str], **over: object) -> str:
        config = {"config": {name: ord(name) for name in names}, "inputs": {name: name for name in names}, "seed": seed}
        return Recipe(
            pipeline="p", step="s", code_version="1", scale="smoke", variant="default", libraries={}, **{**config, **over}
        ).digest

    assert digest(keys) == digest(sorted(keys))
    assert digest(keys, seed=seed + 1) != digest(keys)
    assert digest(keys, host="other CPU") != digest(keys)


def test_a_known_recipe_keeps_its_address_across_releases() -> None:
    # A change here orphans every artifact in every store: it must be meant.
    assert recipe().digest == "70db4ce71eb378697a0ed6ad"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_or_a_cut_anywhere_is_noticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        made = make(store)
        victim = made.path / data.draw(st.sampled_from(["part/data.txt", "timing.json", MANIFEST]))
        content = bytearray(victim.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] ^= data.draw(st.integers(1, 255))
        else:
            del content[at:]
        before = victim.read_bytes()
        victim.write_bytes(bytes(content))
        if victim.name == MANIFEST and _same_json(before, bytes(content)):
            return  # white space only: nothing that the manifest says has changed
        with pytest.raises(ArtifactDamaged) as raised:
            found = store.get("toy", "corpus", made.recipe)
            assert found is not None
            found.verify()
        assert str(victim) in str(raised.value) and "run again" in str(raised.value)


def _same_json(before: bytes, after: bytes) -> bool:
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def test_a_file_that_the_manifest_does_not_list_is_noticed(tmp_path: Path) -> None:
    made = make(Store(tmp_path))
    (made.path / "part" / "stray.parquet").write_text("would be read with the other shards")
    with pytest.raises(ArtifactDamaged, match=r"stray\.parquet.*does not list"):
        made.verify()


def test_observations_that_are_gone_are_one_sentence(tmp_path: Path) -> None:
    made = make(Store(tmp_path))
    assert made.observed["seconds"] == 0.5 and set(made.observed["files"]) == {"timing.json"}
    (made.path / OBSERVED).write_text("[]")
    with pytest.raises(ArtifactDamaged, match=r"observed\.json: missing or not a JSON object"):
        _ = made.observed


def test_one_damaged_artifact_does_not_hide_the_others(tmp_path: Path) -> None:
    store = Store(tmp_path)
    bad, good = make(store, seed=0), make(store, seed=1)
    (bad.path / MANIFEST).write_text("{")
    assert [item.recipe for item in store.artifacts("toy")] == [good.recipe]


def test_metrics_that_are_no_numbers_are_refused_before_anything_is_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    draft = store.draft(recipe())
    draft.metrics["score"] = float("nan")
    with pytest.raises(RankdError, match="nothing was published"):
        store.publish(draft, {})
    assert store.get("toy", "corpus", recipe().digest) is None


def test_what_a_killed_attempt_left_half_written_is_not_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.draft(recipe()).out / "part-00001.tmp").write_text("half a shard")
    assert set(make(store).manifest["files"]) == {"part/data.txt"}


def test_a_folder_without_manifest_is_no_artifact_and_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = make(store)
    (made.path / MANIFEST).unlink()
    assert store.get("toy", "corpus", made.recipe) is None
    make(store).verify()


KILLED_IN_A_STEP = """
import sys, time
from pathlib import Path
from rankd_pipeline_tests.store.test_artifact import recipe
from rankd_pipeline.store.artifact import Store
draft = Store(sys.argv[1]).draft(recipe())
(draft.out / "shard-0").write_text("whole")
(draft.scratch / "checkpoint").write_text("epoch 3")
print("ready", flush=True)
time.sleep(60)
"""

KILLED_IN_PUBLISH = """
import sys, time, os
from rankd_pipeline_tests.store.test_artifact import make
from rankd_pipeline.store.artifact import Store
rename = os.rename
def stop_before(*_):
    print("ready", flush=True)
    time.sleep(60)
os.rename = stop_before
make(Store(sys.argv[1]))
"""


def test_kill_9_in_a_step_leaves_nothing_published_and_the_checkpoint_in_place(tmp_path: Path) -> None:
    process = script(KILLED_IN_A_STEP, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = Store(tmp_path)
    assert store.get("toy", "corpus", recipe().digest) is None and list(store.artifacts()) == []
    again = store.draft(recipe())
    assert (again.scratch / "checkpoint").read_text() == "epoch 3" and (again.out / "shard-0").read_text() == "whole"


def test_kill_9_between_manifest_and_rename_leaves_nothing_and_the_rerun_is_equal(tmp_path: Path) -> None:
    process = script(KILLED_IN_PUBLISH, tmp_path / "killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = Store(tmp_path / "killed")
    assert store.get("toy", "corpus", recipe().digest) is None and list(store.artifacts()) == []
    resumed = make(store)
    resumed.verify()
    assert resumed.version == make(Store(tmp_path / "straight")).version


HOLDER = """
import sys, time
from rankd_pipeline.store.artifact import Store
with Store(sys.argv[1]).lock("toy-corpus"):
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_lock_held_by_another_process_is_said_and_waited_for(tmp_path: Path) -> None:
    process = script(HOLDER, tmp_path, 1.0)
    store, said = Store(tmp_path), []
    with pytest.raises(Busy, match="being made by another rankd process"), store.lock("toy-corpus", timeout=0):
        pass
    with store.lock("toy-corpus", wait=said.append):
        assert process.wait(5) == 0
    assert said == ["toy-corpus is being made by another rankd process: waiting for it"]


def test_the_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    process = script(HOLDER, tmp_path, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Store(tmp_path).lock("toy-corpus", timeout=0):
        pass


FULL_DISK = """
import errno, os, sys
from pathlib import Path
from rankd_pipeline_tests.store.test_artifact import make, recipe
from rankd_pipeline.store.artifact import Store
store = Store(sys.argv[1])
kept = make(store, seed=1)
ballast = Path(sys.argv[1]) / "ballast"
try:
    ballast.write_bytes(bytes(1 << 24))
except OSError as error:
    assert error.errno == errno.ENOSPC
try:
    make(store)
    sys.exit("the disk was not full")
except OSError as error:
    assert error.errno == errno.ENOSPC, error
assert store.get("toy", "corpus", recipe().digest) is None
kept.verify()
ballast.unlink()
make(store).verify()
"""


@pytest.mark.needs_mount_namespace
def test_a_full_disk_publishes_nothing_loses_nothing_and_the_rerun_goes_on(tmp_path: Path) -> None:
    # A real one: a 256 kB tmpfs in a mount namespace of its own.
    mount = f"mount -t tmpfs -o size=256k none {tmp_path} && exec {sys.executable} -c '{FULL_DISK}' {tmp_path}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_remote_store_round_trip(tmp_path: Path) -> None:
    uri = f"memory://rankd-{time.monotonic_ns()}"
    here, there = Store(uri, cache=tmp_path / "here"), Store(uri, cache=tmp_path / "there")
    corpus = make(here)
    labels = make(here, "oracle_labels", inputs={"corpus": corpus})
    listed = list(there.artifacts())
    assert [item.step for item in listed] == ["corpus", "oracle_labels"]
    assert not (listed[0].path / "part").exists(), "a listing brings manifests, not data"
    found = there.get("toy", "oracle_labels", labels.recipe)
    assert found is not None and found.version == labels.version
    found.verify()
    there.remove(found)
    assert there.get("toy", "oracle_labels", labels.recipe) is None
    assert [item.step for item in Store(uri, cache=tmp_path / "third").artifacts()] == ["corpus"]


def test_a_remote_artifact_without_manifest_is_absent(tmp_path: Path) -> None:
    uri = f"memory://rankd-{time.monotonic_ns()}"
    store = Store(uri, cache=tmp_path / "here")
    made = make(store)
    store._fs.rm(f"{store._remote(made.path)}/{MANIFEST}")
    assert Store(uri, cache=tmp_path / "there").get("toy", "corpus", made.recipe) is None
    with pytest.raises(RankdError, match="needs a local cache folder"):
        Store(uri)


@pytest.mark.parametrize("remote", [False, True])
def test_runs_remember_what_they_made_and_reused(tmp_path: Path, remote: bool) -> None:
    store = Store(f"memory://runs-{time.monotonic_ns()}", cache=tmp_path) if remote else Store(tmp_path)
    corpus, labels = make(store), make(store, "oracle_labels")
    store.note_use(corpus, "run-1")
    store.note_use(corpus, "run-2")
    store.note_use(labels, "run-2")
    latest, earlier = store.runs("toy")
    assert (latest.run_id, latest.recipes) == ("run-2", {"corpus": corpus.recipe, "oracle_labels": labels.recipe})
    assert (earlier.run_id, earlier.recipes) == ("run-1", {"corpus": corpus.recipe})
    assert store.runs("other") == [] and [item.step for item in store.artifacts()] == ["corpus", "oracle_labels"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_canonical_json_reads_back_and_has_one_spelling(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value and canonical_json(json.loads(text)) == text
