"""The whole chain at smoke scale: determinism, survival of kill -9 in every step, and who may read the truth."""

import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rankd_pipeline.progress import read_progress
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.data import TRUTH
from rankd_pipeline.steps.runner import open_store, plan, run_with_inputs
from rankd_pipeline.steps.summary import reached, summarise
from rankd_pipeline.store.artifact import Recipe, Store
from rankd_pipeline.store.tensors import read_columns, shards, write_parquet

PIPELINE = "beam_management"
# Measurements of the host: they differ from run to run, and so does what names them as input.
MEASURED = ("latency_profile", "deployment")


@pytest.fixture
def made(smoke_chain):
    """(settings, spec, artifacts) of a finished smoke chain."""
    spec = load_pipeline(PIPELINE).at("smoke")
    return smoke_chain, spec, reached(spec, open_store(smoke_chain))


def test_every_step_is_made_and_verifies(made):
    _, spec, artifacts = made
    assert list(artifacts) == list(STEPS)
    for artifact in artifacts.values():
        artifact.verify()
    card = summarise(spec, artifacts).scorecard
    assert set(card["seconds"]) >= set(STEPS)


def test_a_finished_chain_has_nothing_to_do(made):
    current, spec, _ = made
    assert not [row for row in plan(spec, open_store(current)) if row.runs]


def test_the_truth_of_unlabelled_samples_shapes_no_training(made, tmp_path):
    current, spec, artifacts = made
    corpus, other = artifacts["corpus"], Store(tmp_path / "store")
    draft = other.draft(Recipe(PIPELINE, "corpus", "censored", {}, "smoke", 0, "default", {}, {}))
    features = read_columns(corpus.file("features"), ["sample_id", "labelled"])
    known = pa.array(features["sample_id"][features["labelled"].astype(bool)])
    removed = 0
    for folder in ("features", "labels", TRUTH):
        for path in shards(corpus.file(folder)):
            table = pq.read_table(path)
            if folder == TRUTH:
                kept = table.filter(pc.field("sample_id").isin(known))
                removed, table = removed + table.num_rows - kept.num_rows, kept
            write_parquet(table, draft.out / folder / path.name)
    draft.metrics.update(corpus.metrics)
    censored = {"corpus": other.publish(draft, {})}
    assert removed > 0
    for step in ("audit_report", "ssl_weights", "oracle_labels", "teacher", "calibration_scorecard", "soft_labels", "student"):
        inputs = {name: censored[name] for name in STEPS[step].inputs}
        censored[step] = run_with_inputs(step, spec, inputs, other, current)
        assert censored[step].version == artifacts[step].version, f"{step} looked at truth it must not see"


def test_kill_9_in_every_step_ends_in_the_same_digests(made, tmp_path):
    _, spec, artifacts = made
    environment = {**os.environ, "RANKD_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "rankd_pipeline_tests.steps.run_chain", "smoke"]
    folder, killed = tmp_path / "home" / "progress", []
    for step in STEPS:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None:
            if any(state["step"] == step for state in read_progress(folder, PIPELINE)):
                time.sleep(0.3)
                os.killpg(process.pid, signal.SIGKILL)
                killed.append(step)
                break
            time.sleep(0.01)
        process.wait()
    assert killed == list(STEPS)
    subprocess.run(command, env=environment, check=True)
    store = Store(tmp_path / "home" / "store")
    for step in STEPS:
        again = list(store.artifacts(PIPELINE, step))
        assert len(again) == 1, f"{step} was made {len(again)} times"
        if step not in MEASURED:
            assert again[0].version == artifacts[step].version, f"{step} differs after kill -9"
