"""Channel estimation at smoke scale through every step: regression with intervals, two students in one race, FP32 that goes on
where INT8 does not."""

import json

import numpy as np
import pytest

from rankd_pipeline.evaluation.table import read_table
from rankd_pipeline.settings import settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.runner import open_store, run_step
from rankd_pipeline.steps.summary import reached, summarise

pytestmark = pytest.mark.xdist_group("estimation_chain")
STUDENTS = ("filter_bank", "cnn")


@pytest.fixture(scope="module")
def made(template_home, tmp_path_factory):
    """(settings, spec, artifacts) of a finished smoke chain, run in this process."""
    home = tmp_path_factory.mktemp("estimation-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKD_HOME", str(home))
        current = settings()
        store, spec = open_store(current), load_pipeline("channel_estimation").at("smoke")
        for step in STEPS:
            run_step(step, spec, store, current)
        yield current, spec, reached(spec, store)


def test_every_step_is_made_and_what_does_not_apply_says_why(made):
    _, _, artifacts = made
    assert list(artifacts) == list(STEPS)
    skipped = {name: artifact.skipped for name, artifact in artifacts.items() if artifact.skipped}
    assert set(skipped) == {"ssl_weights"} and "100% of the training samples carry labels" in skipped["ssl_weights"]
    for artifact in artifacts.values():
        artifact.verify()


def test_a_clean_corpus_passes_the_audit(made):
    audit = json.loads((made[2]["audit_report"].path / "audit.json").read_text())
    assert audit["verdict"] == "pass", [item for item in audit["findings"] if item["severity"] == "fail"]


def test_all_baselines_are_held_against_the_teacher_and_the_bound_sets_no_gate(made):
    _, spec, artifacts = made
    rivals = artifacts["calibration_scorecard"].metrics["rivals"]
    assert {"ls_nearest", "ls_linear", "ls_time_average", "wiener", "lmmse", "lmmse_true"} <= set(rivals)
    assert min(rivals, key=lambda name: rivals[name]) == "lmmse_true"
    assert rivals["lmmse"] < rivals["ls_linear"] < rivals["ls_nearest"]
    card = summarise(spec, artifacts).scorecard
    assert card["teacher"]["baseline"]["name"] == "lmmse" and card["metric"]["unit"] == "dB"


def test_intervals_cover_what_they_promise(made):
    table = read_table(made[2]["calibration_scorecard"].path / "evaluation.parquet")
    rows = table[(table["metric"] == "covered") & (table["model"] == "teacher") & (table["split"] == "test")]
    assert np.average(rows["value"], weights=rows["n"]) == pytest.approx(0.9, abs=0.05)


def test_both_students_are_distilled_quantized_and_raced(made):
    _, _, artifacts = made
    for step in ("student", "quantized_onnx"):
        assert set(artifacts[step].metrics["candidates"]) == set(STUDENTS)
    for name in STUDENTS:
        checks = artifacts["quantized_onnx"].metrics["candidates"][name]["parity"]
        assert set(checks) == {"torch_onnx_fp32", "c_onnx_fp32", "c_onnx_int8"} and all(check["ok"] for check in checks.values())
        timed = [item["runtime"] for item in artifacts["latency_profile"].metrics["candidates"] if item["paced"]]
        assert {f"{name}-c-fp32", f"{name}-onnxruntime-fp32"} <= set(timed)
    assert artifacts["latency_profile"].metrics["candidate"] in STUDENTS


def test_int8_that_misses_its_gate_does_not_take_its_candidate_with_it(made):
    for metrics in made[2]["quantized_onnx"].metrics["candidates"].values():
        missed = [gate["name"] for gate in metrics["gates"] if gate["verdict"] != "pass"]
        assert metrics["precisions"] == (["fp32"] if missed else ["fp32", "int8"])
        assert metrics["verdict"] == "pass" and ("left out" in metrics["reason"]) == bool(missed)


def test_what_is_shipped_is_held_against_ls_in_every_cell(made):
    gates = {gate["name"]: gate for gate in made[2]["deployment"].metrics["gates"]}
    assert {"better_than_classical", "never_worse_than_ls", "low_snr"} <= set(gates)
    assert gates["never_worse_than_ls"]["ci95"] is not None
    assert gates["low_snr"]["value"] < 0.0
    table = read_table(made[2]["deployment"].path / "evaluation.parquet")
    assert {"shipped", "ls_linear", "lmmse", "lmmse_true"} <= set(table["model"].astype(str))
