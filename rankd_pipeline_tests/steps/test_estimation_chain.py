"""Channel estimation at smoke scale through every step: regression with intervals, two students in one race, FP32 that goes on
where INT8 does not."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from rankd_pipeline.cli import rankd
from rankd_pipeline.evaluation.table import read_table
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.runner import open_store, run_step
from rankd_pipeline.steps.summary import reached, summarise
from rankd_pipeline.steps.watch import report_drift, take_telemetry
from rankd_pipeline.telemetry.contract import read_file, telemetry_schema
from rankd_pipeline.telemetry.field import Play, play
from rankd_pipeline_tests.steps.field_site import assert_labels_of_the_field_are_learned_from

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


def test_blocks_are_counted_for_the_teacher_the_file_and_every_baseline(made):
    """The baselines' are counted once; the deployment holds its file against the same blocks."""
    _, spec, artifacts = made
    tables = {step: read_table(artifacts[step].path / "evaluation.parquet") for step in ("calibration_scorecard", "deployment")}
    lost = {step: table[table["metric"] == "block_error"] for step, table in tables.items()}
    rules = {"ls_nearest", "ls_linear", "ls_time_average", "wiener", "lmmse", "lmmse_true"}
    assert set(lost["calibration_scorecard"]["model"].astype(str)) == {"teacher"} | rules
    assert set(lost["deployment"]["model"].astype(str)) == {"shipped"} | rules
    asked = {f"snr_db={snr:g}" for snr in spec.steps.calibration_scorecard.end_metric["snr_db"]}
    for table in lost.values():
        assert set(table["cell"].astype(str)) == asked
        assert len(set(table.groupby("model", observed=True)["n"].sum())) == 1
    gates = {gate["name"]: gate for gate in artifacts["deployment"].metrics["gates"]}
    assert gates["blocks"]["unit"] == "dB" and gates["blocks"]["ci95"] is not None
    for step, network in (("calibration_scorecard", "teacher"), ("deployment", "shipped")):
        names = {path.stem for path in (artifacts[step].path / "figures").glob("*.png")}
        assert f"block_errors_of_the_{network}_and_the_baselines" in names and f"gain_of_the_{network}_over_LS_linear" in names


def test_the_bundle_is_called_as_its_files_show(made, tmp_path):
    """caller.py runs as it is shipped, and `rankd predict` takes a CSV of slots."""
    _, spec, artifacts = made
    bundle = artifacts["deployment"].path / "bundle"
    said = subprocess.run([sys.executable, str(bundle / "caller.py")], capture_output=True, text=True, check=True).stdout
    assert said.startswith("channel [[[[") and "nan" not in said
    function = load_function(spec.function)
    reports = tmp_path / "slots.csv"
    reports.write_text(function.example_rows(function.corpus_config(spec.steps.corpus.simulation)))
    done = CliRunner().invoke(rankd, ["predict", str(bundle), str(reports)], catch_exceptions=False)
    assert done.exit_code == 0 and done.output.strip()


def test_the_field_is_played_and_drift_names_what_moved(made, tmp_path, monkeypatch):
    """Two calm hours are the reference, a third is judged calm; then the users drive, and then they are far out."""
    _, spec, artifacts = made
    monkeypatch.setenv("RANKD_HOME", str(tmp_path))
    current = settings()
    store, folder = open_store(current), current.telemetry_dir(spec.pipeline)
    function = load_function(spec.function)
    for hour, shifts in enumerate([(), (), (), ("fast",), ("macro",)]):
        wanted = Play(artifacts["deployment"].path / "bundle", frozenset(shifts), 1, 140, 0.6, 0, 3600.0 * (480_000 + hour))
        (path,) = play(function, spec.steps.corpus.simulation, 100.0, wanted, folder, 1)
    cfg = function.corpus_config(spec.steps.corpus.simulation)
    columns, left_out = read_file(path, telemetry_schema(function, cfg, 100.0))
    assert left_out == 0 and columns["output"].shape[1:] == (2, 2, 14, 48) and (columns["output"][:, 1] > 0).all()
    assert 0 < columns["has_label"].mean() < 1 and ((columns["confidence"] > 0) & (columns["confidence"] < 1)).all()
    take_telemetry(spec, store, current)
    report = report_drift(spec, store, current)
    *reference, calm, fast, macro = json.loads(report.file("drift.json").read_text())["windows"]
    assert [window["state"] for window in reference] == ["reference", "reference"]
    # A busy host is a cause, too, and the truth about it.
    named = [[item["cause"] for item in window["causes"] if item["cause"] != "slow_host"] for window in (calm, fast, macro)]
    assert named == [[], ["doppler"], ["scenario"]]
    assert calm["quality"]["score"] > 10 and calm["quality"]["gain"] is not None
    assert macro["quality"]["score"] < calm["quality"]["score"]


def test_labelled_rows_of_the_field_are_learned_from(made):
    assert_labels_of_the_field_are_learned_from(*made, 140)
