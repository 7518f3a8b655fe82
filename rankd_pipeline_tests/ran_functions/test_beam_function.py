"""What the steps see of beam management: schema, labels, latency cases, evaluation table, and reports from a user's file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.ran_functions.beam_management.config import BeamCorpusConfig
from rankd_pipeline.ran_functions.beam_management.function import MASK, RSRP, TRUTH, BeamManagement
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.runtime.signature import ModelSignature
from rankd_pipeline.store.tensors import column_array

FUNCTION = BeamManagement()


def corpus(**changes) -> tuple[BeamCorpusConfig, pa.Table, pa.Table]:
    """One shard of 40 users of one street."""
    site = {"name": "street", "scenario": "UMi", "isd_m": 200, "bs_height_m": 10, "indoor_share": 0.3, "speed_kmh": [0, 3]}
    cfg = FUNCTION.corpus_config({
        "sites": [site], "bands": [{"ghz": 3.5, "eirp_dbm": 70}], "seen_samples": 40, "heldout_site_samples": 0,
        "heldout_band_samples": 0, "ues_per_drop": 4, **changes,
    })  # fmt: skip
    (shard,) = FUNCTION.plan(cfg, 0)
    return cfg, *FUNCTION.simulate(cfg, shard)


@pytest.fixture(scope="module")
def one_shard() -> tuple[BeamCorpusConfig, pa.Table, pa.Table]:
    return corpus()


def signature(**changes) -> ModelSignature:
    (one,) = FUNCTION.signatures(BeamCorpusConfig(**changes), 100.0)
    return one


def test_the_registry_finds_it():
    assert type(load_function("beam_management")) is BeamManagement


@pytest.mark.parametrize("changes", [{}, {"history": 4, "reported_beams": 4}, {"set_b": {"rows": 1, "cols": 8}}])
def test_schema_is_what_the_simulation_delivers(changes):
    cfg, features, _ = corpus(**changes)
    schema = FUNCTION.schema(cfg)
    assert features.schema.equals(schema.arrow_schema())
    assert schema.label.classes == cfg.n_set_a
    for column in schema.columns:
        values = column_array(features[column.name])
        if column.valid_range is None:
            continue
        seen = values[column_array(features[column.mask]) > 0] if column.mask else values
        assert column.valid_range[0] <= seen.min() and seen.max() <= column.valid_range[1], column.name
    missing = 1 - column_array(features[MASK]).mean()
    assert missing >= schema.column(RSRP).expected_missing == 1 - cfg.beams_in_report / cfg.n_set_b


def test_signature_is_what_the_networks_take(one_shard):
    cfg, features, _ = one_shard
    one = signature()
    assert one.input_names == list(FUNCTION.feature_columns) == [RSRP, MASK] and one.masks == {RSRP: MASK}
    inputs = FUNCTION.model_inputs({name: column_array(features[name]) for name in FUNCTION.feature_columns})
    for spec in one.inputs:
        assert inputs[spec.name].shape[1:] == spec.shape and inputs[spec.name].dtype == spec.dtype
    assert one.decision.shape == (cfg.n_set_a,) and one.budget_us == 100.0
    assert [spec.shape for spec in signature(history=4, set_b={"rows": 2, "cols": 4}).inputs] == [(4, 8)] * 2


def test_labels_of_the_field_and_of_the_oracle(one_shard):
    _, _, truth = one_shard
    swept, known = FUNCTION.delivered_labels(truth), FUNCTION.oracle_labels(truth)
    assert swept["sample_id"] == known["sample_id"] == truth["sample_id"]
    assert column_array(swept["label"]).tolist() == column_array(truth["sweep_beam"]).tolist()
    assert np.array_equal(column_array(known["label"]), column_array(truth[TRUTH]).argmax(1))
    # A row that the simulation has no answer for gets no oracle label.
    beams = np.where(np.arange(len(truth)) == 3, -1, column_array(truth["best_beam"])).astype(np.int16)
    holed = truth.set_column(truth.column_names.index("best_beam"), "best_beam", pa.array(beams))
    assert (
        3 not in column_array(FUNCTION.oracle_labels(holed)["sample_id"]) and len(FUNCTION.oracle_labels(holed)) == len(truth) - 1
    )


def test_soft_oracle_labels_weigh_beams_by_their_rsrp(one_shard):
    _, _, truth = one_shard
    soft = column_array(FUNCTION.oracle_labels(truth, softness=1.0)["target"]).astype(np.float64)
    rsrp = column_array(truth[TRUTH])
    assert np.allclose(soft.sum(1), 1, atol=2e-2) and np.array_equal(soft.argmax(1), rsrp.argmax(1))
    second = np.sort(rsrp, 1)[:, -2]
    assert np.allclose(np.sort(soft, 1)[:, -2] / soft.max(1), np.exp(second - rsrp.max(1)), atol=0.01)
    assert "target" not in FUNCTION.oracle_labels(truth).column_names


@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**31))
def test_latency_cases_keep_shapes_and_masks(history, beams, seed):
    rng = np.random.default_rng(seed)
    mask = (rng.random((5, history, beams)) < rng.random()).astype(np.uint8)
    inputs = {RSRP: np.where(mask, np.round(rng.uniform(-120, -60, mask.shape)), 0).astype(np.float32), MASK: mask}
    cases = FUNCTION.latency_cases(inputs)
    assert list(cases) == ["as in the corpus", "four beams reported", "nothing reported"]
    for case in cases.values():
        assert case[RSRP].shape == case[MASK].shape == mask.shape
        assert case[RSRP].dtype == np.float32 and case[MASK].dtype == np.uint8
        assert np.all((case[MASK] > 0) | (case[RSRP] == 0)) and np.all(case[MASK] <= mask)
    four = cases["four beams reported"]
    assert np.array_equal(four[MASK].sum(-1), np.minimum(mask.sum(-1), 4))
    left_out = np.where((mask > 0) & (four[MASK] == 0), inputs[RSRP], -np.inf).max(-1)
    assert np.all(np.where(four[MASK] > 0, four[RSRP], np.inf).min(-1) >= left_out)
    assert not cases["nothing reported"][MASK].any()


def test_evaluation_table_of_planted_predictors(one_shard):
    _, features, truth = one_shard
    of_features, of_truth = FUNCTION.evaluation_columns
    columns = {name: column_array(features[name]) for name in (*FUNCTION.feature_columns, *of_features)}
    facts = {name: column_array(truth[name]) for name in of_truth}
    best = facts[TRUTH].argmax(1)
    probability = np.full((len(best), 64), 0.1 / 63, np.float32)
    probability[np.arange(len(best)), best] = 0.9
    models = {
        "genie": lambda _: facts[TRUTH],
        "never": lambda _: -facts[TRUTH],
        "unsure": lambda _: probability,
    }
    table = FUNCTION.evaluate(models, columns, facts, "test", frozenset({"unsure"}))
    for model, top1, loss in (("genie", 1, 0), ("never", 0, np.ptp(facts[TRUTH], 1).mean()), ("unsure", 1, 0)):
        assert estimate(table, f"{model}@test", metric="top1", aggregate="mean").value == top1
        assert estimate(table, f"{model}@test", metric="l1_rsrp_loss_db", aggregate="mean").value == pytest.approx(loss, rel=1e-4)
    assert estimate(table, "unsure@test", metric="ece", aggregate="ece").value == pytest.approx(0.1, abs=1e-5)
    assert set(table["unit"]) == set(columns["drop_id"])  # what is resampled: the drop
    names = {FUNCTION.metric.name, *(m.name for m in FUNCTION.secondary_metrics)}
    assert names <= set(table["metric"])


# -- reports from a file ------------------------------------------------------------------------------------------------
def written(folder: Path, text: str) -> Path:
    path = folder / "reports.csv"
    path.write_text(text)
    return path


def rows(*lines: str, beams: int = 16) -> str:
    return "\n".join([",".join(f"ssb_{b}_dbm" for b in range(beams)), *lines]) + "\n"


@pytest.mark.parametrize("changes", [{}, {"history": 4}, {"set_b": {"rows": 1, "cols": 4}}])
def test_the_example_is_read_as_it_is_meant(changes, tmp_path):
    cfg = BeamCorpusConfig(**changes)
    inputs = FUNCTION.read_reports(written(tmp_path, FUNCTION.example_rows(cfg)), signature(**changes))
    assert inputs[RSRP].shape == inputs[MASK].shape == (1, cfg.history, cfg.n_set_b)
    assert inputs[MASK].all() and inputs[RSRP].dtype == np.float32 and inputs[MASK].dtype == np.uint8
    assert inputs[RSRP][0, 0, :2].tolist() == [-90, -93]


def test_what_is_empty_was_not_reported(tmp_path):
    line = ",".join(["-80", "", " ", "-95.5", *[""] * 12])
    inputs = FUNCTION.read_reports(written(tmp_path, rows(line, ",".join(["-70"] * 16))), signature())
    assert inputs[MASK][0, 0].tolist() == [1, 0, 0, 1] + [0] * 12 and inputs[MASK][1].all()
    assert inputs[RSRP][0, 0, :4].tolist() == [-80, 0, 0, -95.5] and np.isfinite(inputs[RSRP]).all()


def test_columns_are_found_by_name_whatever_their_order(tmp_path):
    header = ["cell", *(f"ssb_{b}_dbm" for b in reversed(range(16)))]
    text = ",".join(header) + "\nA17," + ",".join(str(-60 - b) for b in reversed(range(16))) + "\n"
    inputs = FUNCTION.read_reports(written(tmp_path, text), signature())
    assert inputs[RSRP][0, 0].tolist() == [-60 - b for b in range(16)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (rows(",".join(["-80"] * 15), beams=15), "column 'ssb_15_dbm' is missing; expected ssb_0_dbm … ssb_15_dbm"),
        ("", "column 'ssb_0_dbm' is missing"),
        (rows(), "no report; expected one report a row"),
        (rows(",".join(["-80"] * 16), ",".join(["-80"] * 7 + ["n/a"] + ["-80"] * 8)), "row 3, column 'ssb_7_dbm': found 'n/a'"),
        (rows(",".join(["80"] * 16)), "row 2, column 'ssb_0_dbm': 80 dBm is outside -156 to -31 dBm; check its unit"),
        (rows(",".join(["1e-11"] * 16)), "1e-11 dBm is outside .* check its unit"),
        (rows(",".join(["nan"] * 16)), "row 2, column 'ssb_0_dbm'"),
        (rows(",".join(["inf"] * 16)), "row 2, column 'ssb_0_dbm'"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(text, said, tmp_path):
    with pytest.raises(RankdError, match=said) as refused:
        FUNCTION.read_reports(written(tmp_path, text), signature())
    assert "reports.csv" in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_without_history_does_not_pass_for_one_with(tmp_path):
    with pytest.raises(RankdError, match="column 'ssb_0_t0_dbm' is missing"):
        FUNCTION.read_reports(written(tmp_path, rows(",".join(["-80"] * 16))), signature(history=4))
