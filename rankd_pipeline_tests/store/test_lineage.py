"""Lineage: from a bundle alone back to the corpus, and not one word of it can be changed unseen."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.store.artifact import Artifact, Recipe, Store
from rankd_pipeline.store.lineage import LINEAGE, lineage_of, write_lineage

SITES = {"old_town": 40, "harbour": 24}
CHAIN = {"corpus": (), "teacher": ("corpus",), "student": ("corpus", "teacher"), "quantized_onnx": ("corpus", "student")}


def chain(store: Store, seed: int = 0) -> dict[str, Artifact]:
    """Four artifacts that build on each other, as the steps make them."""
    made: dict[str, Artifact] = {}
    for step, names in CHAIN.items():
        inputs = {name: made[name] for name in names}
        versions = {name: item.version for name, item in inputs.items()}
        draft = store.draft(Recipe("toy", step, "1+networks=2", {"epochs": 3}, "smoke", seed, "default", versions, {"numpy": "2"}))
        (draft.out / "weights").mkdir()
        (draft.out / "weights" / f"{step}.bin").write_bytes(step.encode() * 9 + bytes([seed]))
        draft.metrics.update({"sites": SITES} if step == "corpus" else {"score": 0.5})
        draft.observed.update(run_id=f"run-of-{step}", seconds=1.5, finished=1_700_000_000.0)
        made[step] = store.publish(draft, inputs)
    return made


def bundle(tmp_path: Path) -> tuple[Path, Store, dict[str, Artifact]]:
    store = Store(tmp_path / "store")
    made = chain(store)
    folder = tmp_path / "bundle"
    folder.mkdir()
    document = write_lineage({name: made[name] for name in ("corpus", "student", "quantized_onnx")}, store)
    (folder / LINEAGE).write_text(json.dumps(document))
    (folder / "model.onnx").write_bytes(b"model")
    return folder, store, made


def test_the_whole_chain_reads_from_the_bundle_alone(tmp_path: Path) -> None:
    folder, store, made = bundle(tmp_path)
    shutil.rmtree(store.local)
    found = lineage_of(folder)
    assert found.intact and found.pipeline == "toy" and found.sites == SITES
    by_step = {item.step: item for item in found.made.values()}
    assert set(by_step) == set(CHAIN)
    teacher = by_step["teacher"]
    assert (teacher.recipe, teacher.version, teacher.seed) == (made["teacher"].recipe, made["teacher"].version, 0)
    assert teacher.code_version == "1+networks=2" and teacher.run_id == "run-of-teacher" and teacher.config == {"epochs": 3}
    assert teacher.inputs == {"corpus": made["corpus"].recipe} and list(teacher.files) == ["weights/teacher.bin"]
    assert json.loads(json.dumps(found.as_json()))["intact"] is True
    assert lineage_of(folder / "model.onnx").made.keys() == found.made.keys()


def test_with_a_store_at_hand_every_file_is_hashed(tmp_path: Path) -> None:
    folder, store, made = bundle(tmp_path)
    assert {item.checked for item in lineage_of(folder, store).made.values()} == {"1 files have their hash"}
    victim = made["teacher"].path / "weights" / "teacher.bin"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    found = lineage_of(folder, store)
    assert not found.intact and str(victim) in found.problems[0]
    assert [item.checked for item in found.made.values() if item.step == "teacher"] == ["damaged"]


def test_an_artifact_that_was_collected_is_still_proven_by_its_manifest(tmp_path: Path) -> None:
    folder, store, made = bundle(tmp_path)
    store.remove(made["corpus"])
    found = lineage_of(folder, store)
    assert found.intact and "no longer in the store" in next(item.checked for item in found.made.values() if item.step == "corpus")


def test_an_artifact_made_again_still_fits_the_chain(tmp_path: Path) -> None:
    folder, store, made = bundle(tmp_path)
    before = made["corpus"].manifest_sha256
    store.remove(made["corpus"])
    again = chain(Store(tmp_path / "elsewhere"))["corpus"]
    assert again.manifest_sha256 == before
    shutil.copytree(again.path, made["corpus"].path)
    assert lineage_of(folder, store).intact


@settings(max_examples=30)
@given(data=st.data())
def test_no_word_of_a_manifest_can_be_changed_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder, _, _ = bundle(tmp_path_factory.mktemp("lineage"))
    document = json.loads((folder / LINEAGE).read_text())
    victim = data.draw(st.sampled_from(sorted(document["manifests"])))
    text = document["manifests"][victim]["text"]
    at = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(codec="ascii").filter(lambda char: char != text[at]))
    document["manifests"][victim]["text"] = text[:at] + letter + text[at + 1 :]
    (folder / LINEAGE).write_text(json.dumps(document))
    found = lineage_of(folder)
    assert not found.intact and victim not in found.made and "was edited" in found.problems[0]


def test_a_manifest_that_is_missing_breaks_the_chain_there(tmp_path: Path) -> None:
    folder, _, made = bundle(tmp_path)
    document = json.loads((folder / LINEAGE).read_text())
    del document["manifests"][made["teacher"].manifest_sha256]
    (folder / LINEAGE).write_text(json.dumps(document))
    found = lineage_of(folder)
    assert not found.intact and "of teacher is missing" in found.problems[0]


def test_the_lineage_of_an_artifact_comes_from_its_store(tmp_path: Path) -> None:
    _, store, made = bundle(tmp_path)
    found = lineage_of(made["student"].path, store)
    assert found.intact and [item.step for item in found.made.values()] == ["student", "corpus", "teacher"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"inputs": {}, "manifests": []}', '{"inputs": {"a": 1}, "manifests": {}}'])
def test_what_is_no_lineage_file_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / LINEAGE).write_text(content)
    with pytest.raises(RankdError, match="not a lineage file"):
        lineage_of(tmp_path)
    (tmp_path / LINEAGE).unlink()
    with pytest.raises(RankdError, match=r"no lineage\.json found"):
        lineage_of(tmp_path)


def test_a_bundle_is_not_written_over_a_broken_chain(tmp_path: Path) -> None:
    _, store, made = bundle(tmp_path)
    store.remove(made["teacher"])
    with pytest.raises(RankdError, match="its input teacher .* is not in the store"):
        write_lineage({"student": made["student"]}, store)
