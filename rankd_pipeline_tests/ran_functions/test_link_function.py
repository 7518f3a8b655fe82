"""What the steps see of link adaptation: schema, labels, calls, evaluation in the loop; then the chain at smoke scale."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.table import read_table
from rankd_pipeline.ran_functions.link_adaptation.config import BLER_TARGET
from rankd_pipeline.ran_functions.link_adaptation.function import CALLS, LinkAdaptation
from rankd_pipeline.ran_functions.link_adaptation.rollout import REPORT_FIELDS
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.runtime.bundle import load_bundle, verify_bundle
from rankd_pipeline.runtime.onnx_export import read_signature
from rankd_pipeline.settings import settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.runner import open_store, run_step
from rankd_pipeline.steps.summary import reached, summarise
from rankd_pipeline.steps.watch import report_drift, take_telemetry
from rankd_pipeline.store.tensors import column_array, tensor_array
from rankd_pipeline.telemetry.contract import read_file, telemetry_schema
from rankd_pipeline.telemetry.field import Play, play, simulated
from rankd_pipeline_tests.steps.field_site import assert_labels_of_the_field_are_learned_from

pytestmark = pytest.mark.xdist_group("link_chain")
FUNCTION = LinkAdaptation()


def test_the_registry_finds_it():
    assert type(load_function("link_adaptation")) is LinkAdaptation


def test_candidates_differ_in_their_state_alone():
    cfg = FUNCTION.corpus_config({})
    gru, mlp = (FUNCTION.student_signature(cfg, network, 1000.0) for network in (
        {"kind": "gru", "hidden": 20}, {"kind": "mlp", "slots": 8}))  # fmt: skip
    assert [spec.name for spec in gru.inputs] == [*REPORT_FIELDS, "bler_target", "state"]
    assert gru.state == mlp.state == {"state": "next_state"}
    # the network's memory, and the price of a lost block
    assert (gru.inputs[-1].shape, mlp.inputs[-1].shape) == ((21,), (7 * 7 + 1,))
    assert gru.inputs[:-1] == mlp.inputs[:-1] and gru.outputs[:2] == mlp.outputs[:2]
    assert gru.decision.name == "mcs_utility" and gru.budget_us == 1000.0 and gru.slot_us == 500.0


def test_delivered_labels_say_what_harq_says_and_no_more():
    """An ACK at MCS 10 frees 0 to 10, a NACK at MCS 4 damns 4 to 27; of the rest the field knows nothing."""
    sent = {"sent_mcs": [[10, 4]], "sent_ack": [[1, 0]]}
    truth = pa.table({"sample_id": [5], **{name: tensor_array(np.array(values, np.uint8)) for name, values in sent.items()}})
    label = column_array(FUNCTION.delivered_labels(truth)["label"])[0]
    np.testing.assert_array_equal(label[0], [0.0] * 11 + [0.5] * 17)
    np.testing.assert_array_equal(label[1], [0.5] * 4 + [1.0] * 24)


def test_oracle_labels_are_the_truth_and_not_softened():
    bler = np.random.default_rng(0).random((2, 8, 28)).astype(np.float16)
    truth = pa.table({"sample_id": [1, 2], "bler": tensor_array(bler)})
    np.testing.assert_array_equal(column_array(FUNCTION.oracle_labels(truth)["label"]), bler)
    with pytest.raises(RankdError, match="leave it at 0"):
        FUNCTION.oracle_labels(truth, 0.5)


def test_a_predictor_that_cannot_be_stepped_is_refused():
    with pytest.raises(RankdError, match="cannot be stepped"):
        FUNCTION.evaluate({"m": lambda features: np.zeros(1)}, *_little(), "test", frozenset())


def _little() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    features: dict[str, np.ndarray] = {name: np.zeros((1, 4), np.uint8) for name in REPORT_FIELDS[:5]}
    features |= {"doppler_hz": np.ones(1), "allocated_prb": np.full(1, 24), "harq_delay_slots": np.full(1, 5)}
    features |= {"drop_id": np.zeros(1, int), "time_s": np.zeros(1), "site": np.array(["a"]), "band_ghz": np.full(1, 3.5)}
    return features, {"bler": np.zeros((1, 4, 28)), "draw": np.ones((1, 4)), "step_slot": np.full(1, -1)}


def test_a_user_s_slots_come_from_a_file_and_a_bad_one_is_named(tmp_path):
    cfg = FUNCTION.corpus_config({})
    signature = FUNCTION.signatures(cfg, 1000.0)[0]
    path = tmp_path / "slots.csv"
    example = FUNCTION.example_rows(cfg)
    path.write_text(example)
    inputs = FUNCTION.read_reports(path, signature)
    assert set(inputs) == {*REPORT_FIELDS, "bler_target"} and {values.dtype for values in inputs.values()} == {np.dtype("float32")}
    assert inputs["harq_mask"].tolist() == [0, 1, 1] and inputs["harq_ack"].tolist() == [0, 1, 0]
    np.testing.assert_allclose(inputs["bler_target"], 0.1)
    for old, new, word in (
        ("cqi,", "colour,", "column 'cqi' is missing"),
        (",NACK,", ",perhaps,", "row 4, column 'harq'"),
        ("\n9,7", "\n19,7", "row 3, column 'cqi': 19 is outside 0 to 15"),
        (",24,", ",many,", "row 2, column 'allocated_prb'"),
    ):
        path.write_text(example.replace(old, new))
        with pytest.raises(RankdError, match=word):
            FUNCTION.read_reports(path, signature)
    path.write_text(example.splitlines()[0] + "\n")
    with pytest.raises(RankdError, match="no slot"):
        FUNCTION.read_reports(path, signature)


# -- the chain at smoke scale -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(spec, artifacts) of a finished smoke chain, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKD_HOME", str(tmp_path_factory.mktemp("link-home")))
        current = settings()
        store, spec = open_store(current), load_pipeline("link_adaptation").at("smoke")
        for step in STEPS:
            run_step(step, spec, store, current)
        yield spec, reached(spec, store)


def test_every_step_is_made(made):
    _, artifacts = made
    assert list(artifacts) == list(STEPS)
    assert [name for name, artifact in artifacts.items() if artifact.skipped] == []
    assert artifacts["audit_report"].metrics["verdict"] == "pass"


def test_models_are_judged_in_one_loop_each_on_the_same_traces(made):
    table = read_table(made[1]["calibration_scorecard"].path / "evaluation.parquet")
    rows = table[(table["metric"] == "bler") & (table["split"] == "test")]
    units = rows.groupby("model", observed=True)["unit"].apply(lambda unit: tuple(sorted(unit)))
    assert len(set(units)) == 1
    assert set(units.index) == {
        "teacher",
        "teacher_raw",
        "student_scratch",
        "olla",
        "olla_by_doppler",
        "illa",
        "cqi_table",
        "genie",
    }
    mean = table[(table["metric"] == "goodput") & (table["split"] == "test")].groupby("model", observed=True)["value"].mean()
    assert (mean.drop("genie") < mean["genie"]).all()
    bler = rows.groupby("model", observed=True)["value"].mean()
    assert abs(bler["olla"] - BLER_TARGET) < 0.05 < bler["cqi_table"] - BLER_TARGET


def test_only_those_that_keep_the_target_set_the_gate(made):
    metrics = made[1]["calibration_scorecard"].metrics
    assert metrics["baseline"]["name"] in ("olla", "olla_by_doppler")
    assert "genie" in metrics["better_references"] and "genie" not in metrics["unbeaten"]


def test_both_candidates_go_to_the_race_with_their_own_signature(made):
    _, artifacts = made
    files = artifacts["quantized_onnx"]
    sizes = {name: read_signature(files.file(f"{name}_fp32.onnx")).inputs[-1].shape for name in ("gru", "mlp")}
    assert sizes == {"gru": (17,), "mlp": (7 * 7 + 1,)}
    raced = {item["runtime"]: item for item in artifacts["latency_profile"].metrics["candidates"]}
    for name in ("gru", "mlp"):
        assert raced[f"{name}-onnxruntime-fp32"]["paced"] is not None
    for name, checks in json.loads((files.path / "parity.json").read_text()).items():
        assert checks["torch_onnx_fp32"]["ok"] and checks["c_onnx_fp32"]["ok"], (name, checks)


def test_the_report_is_the_one_of_every_function(made):
    card = summarise(*made).scorecard
    assert card["metric"] == {"name": "goodput", "unit": "bit/s/Hz", "higher_is_better": True}
    assert card["teacher"]["calibration"]["metric"] == "ece" and card["latency"]["budget_us"] == 1000
    assert {"score", "retention", "kd_gain", "verdict"} <= set(card["student"])


def test_pictures_of_the_loop_are_in_the_report(made):
    drawn = {path.stem for path in (made[1]["calibration_scorecard"].path / "figures").glob("*.png")}
    wanted = {"goodput_cdf_over_users", "bler_over_time", "reliability", "nack_bursts_by_length", "goodput_gain", "other_targets"}
    assert wanted <= drawn


def test_the_bundle_steps_through_a_link_and_takes_its_target_at_run_time(made):
    """The same slots under two targets: the stricter one chooses lower MCS; the callers of the bundle run as they are."""
    bundle = Path(made[1]["deployment"].path) / "bundle"
    verify_bundle(bundle)
    predictor = load_bundle(bundle)
    slots = 60
    rng = np.random.default_rng(0)
    report = {
        "cqi": np.full(slots, 9.0), "cqi_age_slots": 6.0 + np.arange(slots) % 10, "harq_ack": (rng.random(slots) < 0.9) * 1.0,
        "harq_mask": np.ones(slots), "harq_mcs": np.full(slots, 14.0), "doppler_hz": np.full(slots, 40.0),
        "allocated_prb": np.full(slots, 24.0),
    }  # fmt: skip
    report = {name: values.astype(np.float32) for name, values in report.items()}
    chosen = {}
    for target in (0.01, 0.3):
        said = predictor.in_order({**report, "bler_target": np.full(slots, target, np.float32)})
        assert (np.diff(said["bler"], axis=1) >= -1e-6).all()
        chosen[target] = said["mcs_utility"].argmax(axis=1)
    assert chosen[0.01].mean() < chosen[0.3].mean()
    done = subprocess.run([sys.executable, "-I", str(bundle / "caller.py")], capture_output=True, text=True, check=True)
    assert done.stdout.count("mcs_utility") == 3


def test_calls_of_the_deployed_model_carry_real_states(made):
    _, artifacts = made
    signature = load_bundle(artifacts["deployment"].path / "bundle").signature
    predictor = load_bundle(artifacts["deployment"].path / "bundle")
    features = {name: np.asarray(values) for name, values in _windows(artifacts["corpus"], 5).items()}
    calls = FUNCTION.calls(features, signature, predictor)
    assert all(len(values) == 5 * CALLS for values in calls.values())
    first, last = calls["state"][:5], calls["state"][-5:]
    assert (first == 0).all() and np.abs(last).max() > 0.01


def test_a_dagger_round_logs_what_the_deployed_model_does(made, monkeypatch):
    """Users of the corpus follow the bundle in its own loop; a bundle that is not the one that was meant is refused."""
    _, artifacts = made
    bundle = artifacts["deployment"].path / "bundle"
    monkeypatch.setenv("RANKD_HOME", str(bundle.parent))
    about = verify_bundle(bundle).about
    policies = {"cqi_table": 0, "illa": 0, "olla": 0, "random": 0, "learned": 1, "learned_bundle": "bundle"}
    raw = {"seen_traces": 24, "heldout_site_traces": 0, "heldout_band_traces": 0, "trace_slots": 128, "window_slots": 128}
    cfg = FUNCTION.corpus_config({**raw, "policies": {**policies, "learned_model": about["model_sha256"]}})
    shard = FUNCTION.plan(cfg, 0)[0]
    features, truth = FUNCTION.simulate(cfg, shard)
    assert set(features["policy"].to_pylist()) == {"learned"}
    predictor = load_bundle(bundle)
    report = {name: column_array(features[name])[0].astype(np.float32) for name in REPORT_FIELDS}
    report = {name: np.broadcast_to(values, (128,)) for name, values in report.items()}
    # Whatever its target was: some target between the lowest and the highest explains the first choice.
    low, high = (
        predictor.in_order({**report, "bler_target": np.full(128, target, np.float32)})["mcs_utility"].argmax(axis=1)[0]
        for target in (0.01, 0.3)
    )
    assert low <= column_array(truth["sent_mcs"])[0, 0] <= high
    other = FUNCTION.corpus_config({**raw, "policies": {**policies, "learned_model": "0" * 64}})
    with pytest.raises(RankdError, match="learned_model says 000000000000"):
        FUNCTION.simulate(other, shard)


def test_the_field_plays_and_its_labels_come_back_as_harq_left_them(made, tmp_path):
    """An hour of telemetry from the shipped bundle: windows with the BLER of every slot, half of the sessions labelled."""
    spec, artifacts = made
    raw = {"trace_slots": 256, "window_slots": 128}
    cfg, bundle = FUNCTION.corpus_config(raw), artifacts["deployment"].path / "bundle"
    wanted = Play(bundle, frozenset({"proud_receivers"}), 1, 24, 0.5, 3, 3600.0 * 480_000)
    (path,) = play(FUNCTION, raw, 1000.0, wanted, tmp_path, 1)
    columns, left_out = read_file(path, telemetry_schema(FUNCTION, cfg, 1000.0))
    assert left_out == 0 and columns["output"].shape == (len(columns["time_s"]), 128, 28)
    assert (np.diff(columns["output"], axis=-1) >= -1e-6).all()
    labelled = columns["has_label"]
    assert 0 < labelled.mean() < 1 and set(np.unique(columns["label"][labelled])) <= {0.0, 0.5, 1.0}
    head = FUNCTION.head()
    scores = head.row_scores(columns["output"][labelled], columns["label"][labelled])
    assert (scores > 0.5).all() and (scores <= 1).all()
    # what HARQ does not say counts for nothing
    said = np.where(columns["label"][labelled] == 0.5, 0.123, columns["output"][labelled])
    np.testing.assert_allclose(head.row_scores(said, columns["label"][labelled]), scores)
    baseline = FUNCTION.baselines(cfg)[0].fit({}, {}, 0)
    assert baseline(columns).shape == columns["output"].shape


def test_drift_names_what_moved_and_says_what_the_model_is_worth(made, tmp_path, monkeypatch):
    """Two calm hours are the reference, a third is judged calm; then the users drive, and then their reports come seldom."""
    spec, artifacts = made
    monkeypatch.setenv("RANKD_HOME", str(tmp_path))
    current = settings()
    store, folder = open_store(current), current.telemetry_dir(spec.pipeline)
    for hour, shifts in enumerate([(), (), (), ("speed_60",), ("slow_reports",)]):
        wanted = Play(artifacts["deployment"].path / "bundle", frozenset(shifts), 1, 120, 0.5, 0, 3600.0 * (480_000 + hour))
        play(FUNCTION, spec.steps.corpus.simulation, 1000.0, wanted, folder, 1)
    take_telemetry(spec, store, current)
    report = report_drift(spec, store, current)
    *reference, calm, driving, seldom = json.loads(report.file("drift.json").read_text())["windows"]
    assert [window["state"] for window in reference] == ["reference", "reference"]
    assert not calm["causes"] and 0.5 < calm["quality"]["score"] < 1 and calm["quality"]["baseline"] < 1
    assert [cause["cause"] for cause in driving["causes"]] == ["doppler"] and driving["action"] == "redistill"
    assert "cqi_age_slots level" in {test["name"] for test in seldom["tests"] if test["moved"]} and seldom["causes"]


@pytest.mark.parametrize("shift", list(FUNCTION.shifts))
def test_every_shift_changes_the_field_and_nothing_else(shift):
    cfg = FUNCTION.corpus_config({})
    plain, shifted = FUNCTION.field_config(cfg, frozenset(), 64), FUNCTION.field_config(cfg, frozenset({shift}), 64)
    assert plain != shifted and plain.seen_traces == shifted.seen_traces == 8
    assert {site.scenario for site in plain.sites} == {"UMi"} and [band.ghz for band in plain.bands] == [2.1]
    FUNCTION.corpus_config(shifted.model_dump())


def test_proud_receivers_report_more_and_slow_reports_are_older():
    raw = {"trace_slots": 128, "window_slots": 128, "sites": [{"name": "a", "scenario": "TDL-A", "speed_kmh": [3, 3]}]}
    cfg = FUNCTION.corpus_config(raw)

    def hour(*shifts: str) -> dict[str, np.ndarray]:
        features = simulated(FUNCTION, cfg, frozenset(shifts), 12, 5)[0]
        return {name: features[name].astype(float) for name in ("cqi", "cqi_age_slots")}

    plain, proud, slow = hour(), hour("proud_receivers"), hour("slow_reports")
    assert 1.0 < (proud["cqi"] - plain["cqi"]).mean() < 2.0  # a CQI step is some 2 dB
    assert slow["cqi_age_slots"].mean() > plain["cqi_age_slots"].mean() + 15


def _windows(corpus, rows: int) -> dict[str, np.ndarray]:
    from rankd_pipeline.steps.data import features_of

    return {name: values[:rows] for name, values in features_of(corpus, FUNCTION.feature_columns).items()}


def test_labelled_rows_of_the_field_are_learned_from(made):
    assert_labels_of_the_field_are_learned_from(settings(), *made, 80)
