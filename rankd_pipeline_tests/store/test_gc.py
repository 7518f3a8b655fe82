"""The store forgets only what no champion, no recent run and no pin reaches, and never beside a running step."""

import os
import signal
import time
from pathlib import Path

import pytest

from rankd_pipeline.errors import Busy, RankdError
from rankd_pipeline.store.artifact import MANIFEST, Recipe, Store
from rankd_pipeline.store.gc import Pins, apply, find_recipe, sweep
from rankd_pipeline.store.ledger import Ledger
from rankd_pipeline_tests.store.test_artifact import HOLDER, script
from rankd_pipeline_tests.store.test_lineage import CHAIN, chain


def run(store: Store, seed: int, run_id: str) -> dict[str, str]:
    made = chain(store, seed)
    for artifact in made.values():
        store.note_use(artifact, run_id)
    return {step: artifact.recipe for step, artifact in made.items()}


def test_the_last_three_runs_are_kept_with_what_they_reached(tmp_path: Path) -> None:
    store = Store(tmp_path)
    recipes = [run(store, seed, f"run-{seed}") for seed in range(5)]
    plan = sweep(store, [], {})
    assert {item.recipe for item in plan.removable} == {recipe for run_recipes in recipes[:2] for recipe in run_recipes.values()}
    assert set(plan.kept) == {recipe for run_recipes in recipes[2:] for recipe in run_recipes.values()}
    assert len(list(store.artifacts())) == 5 * len(CHAIN), "a sweep is a dry run"
    apply(store, plan)
    assert {item.recipe for item in store.artifacts()} == set(plan.kept)
    assert sweep(store, [], {}).removable == () and [use.run_id for use in store.runs("toy")] == ["run-4", "run-3", "run-2"]


def test_a_run_that_only_reused_counts_as_a_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = chain(store, 0)
    for seed in range(4):
        run(store, seed, f"run-{seed}")
    for artifact in first.values():
        store.note_use(artifact, "nightly")
    assert {item.recipe for item in first.values()} <= set(sweep(store, [], {}).kept)


def test_looks_at_the_field_do_not_push_the_chain_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    recipes = run(store, 0, "chain")
    for hour in range(6):
        draft = store.draft(Recipe("toy", "telemetry", "1", {"hour": hour}, "laptop", 0, "default", {}, {}))
        (draft.out / "data").write_text(str(hour))
        store.note_use(store.publish(draft, {}), f"hour-{hour}")
    plan = sweep(store, [], {})
    assert set(recipes.values()) <= set(plan.kept)
    assert [item.manifest["recipe"]["config"]["hour"] for item in plan.removable] and len(plan.removable) == 3
    assert {run_id for _, run_id in plan.old_runs} == {"hour-0", "hour-1", "hour-2"}


def test_every_champion_there_ever_was_is_kept(tmp_path: Path) -> None:
    store, ledger = Store(tmp_path / "store"), Ledger(tmp_path / "ledger", "toy")
    recipes = [run(store, seed, f"run-{seed}") for seed in range(6)]
    for number in (0, 1):
        (tmp_path / "bundle").mkdir(exist_ok=True)
        entry = ledger.register(recipes[number]["quantized_onnx"], str(tmp_path / "bundle"), "laptop", 0.5, "t", None)
        ledger.decide(entry, "champion" if number == 0 else "refused", "because")
    plan = sweep(store, [ledger], {})
    assert set(recipes[0].values()) <= set(plan.kept) and "champion history, version 1" in plan.kept[recipes[0]["corpus"]]
    assert set(recipes[1].values()) == {item.recipe for item in plan.removable} - set(recipes[2].values())


def test_a_pin_keeps_an_artifact_and_what_it_was_made_from(tmp_path: Path) -> None:
    store, pins = Store(tmp_path / "store"), Pins(tmp_path / "pins.json")
    made = chain(store)
    assert find_recipe(store, made["teacher"].recipe[:8]).step == "teacher"
    assert find_recipe(store, str(made["teacher"].path / "weights")).step == "teacher"
    pins.write({made["teacher"].recipe: "paper"})
    plan = sweep(store, [], pins.all())
    assert {item.step for item in plan.removable} == {"student", "quantized_onnx"}
    assert plan.kept[made["corpus"].recipe] == "pinned: paper"
    with pytest.raises(RankdError, match="matches none"):
        find_recipe(store, "zzz")
    with pytest.raises(RankdError, match="it matches toy/"):
        find_recipe(store, "")


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_pins_that_cannot_be_read_stop_the_sweep(tmp_path: Path, content: str) -> None:
    (tmp_path / "pins.json").write_text(content)
    with pytest.raises(RankdError, match=r"pins\.json: not a JSON object"):
        Pins(tmp_path / "pins.json").all()


def test_nothing_goes_while_a_step_is_being_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    chain(store)
    process = script(HOLDER, tmp_path, 60)
    plan = sweep(store, [], {})
    with pytest.raises(Busy, match="toy-corpus is being made"):
        apply(store, plan)
    assert len(list(store.artifacts())) == len(CHAIN)
    process.send_signal(signal.SIGKILL)
    process.wait()
    apply(store, plan)
    assert list(store.artifacts()) == []


def test_damaged_artifacts_are_told_and_old_work_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = chain(store)
    (made["quantized_onnx"].path / MANIFEST).write_text("{")
    draft = store.work / "toy" / "corpus" / "abc"
    (draft / "scratch").mkdir(parents=True)
    (draft / "scratch" / "checkpoint").write_bytes(bytes(1000))
    fresh = sweep(store, [], {})
    assert fresh.damaged == (made["quantized_onnx"].path,) and fresh.drafts == ()
    week = time.time() - 8 * 86400
    for path in (draft / "scratch" / "checkpoint", draft / "scratch", draft):
        os.utime(path, (week, week))
    old = sweep(store, [], {})
    assert old.drafts == (draft,) and old.bytes > 1000
    apply(store, old)
    assert not draft.exists() and made["quantized_onnx"].path.exists()


def test_a_remote_store_is_swept_too(tmp_path: Path) -> None:
    store = Store(f"memory://gc-{time.monotonic_ns()}", cache=tmp_path)
    kept = run(store, 1, "run-1")
    chain(store, 0)
    apply(store, sweep(store, [], {}))
    assert {item.recipe for item in Store(store.uri, cache=tmp_path / "other").artifacts()} == set(kept.values())
