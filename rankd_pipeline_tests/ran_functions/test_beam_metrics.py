"""Beam metrics: on planted beams whose answers are known, and against the library's own ECE."""

import numpy as np
import pytest
from scipy.special import softmax

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.evaluation.calibration import ece, reliability, reliability_of
from rankd_pipeline.evaluation.table import parse_cell, select
from rankd_pipeline.ran_functions.beam_management.metrics import evaluate_scores


def planted(n=600, seed=0):
    rng = np.random.default_rng(seed)
    rsrp_dbm = rng.normal(-90, 8, (n, 64))
    meta = {
        "split": np.array("test"), "drop_id": np.arange(n) // 6, "site": np.array(["umi_0", "uma_1"])[np.arange(n) % 2],
        "band_ghz": np.array([3.5, 28.0])[np.arange(n) // 6 % 2], "los": rng.random(n) < 0.5, "indoor": rng.random(n) < 0.3,
    }  # fmt: skip
    return rng, {"rsrp_dbm": rsrp_dbm}, meta


def value(table, metric, aggregate="mean"):
    return estimate(table, "m@test", metric=metric, aggregate=aggregate).value


def test_the_genie_is_perfect():
    _, truth, meta = planted()
    table = evaluate_scores("m", truth["rsrp_dbm"], truth, meta, is_probability=False)
    assert [value(table, m) for m in ("top1", "top4", "within_1db", "l1_rsrp_loss_db")] == [1, 1, 1, 0]
    assert select(table, metric="ece_bin_*").empty


def test_a_planted_rank_and_loss_are_found():
    """The k-th best beam is chosen: Top-1 is 0 beyond the first, Top-4 holds up to rank 4, the loss is read off the truth."""
    rng, truth, meta = planted()
    rank = rng.integers(0, 8, 600)
    order = np.argsort(-truth["rsrp_dbm"], axis=1)
    scores = np.zeros((600, 64))
    for i, r in enumerate(rank):  # the r best beams are scored so that the genie-best comes at place r
        scores[i, order[i, : r + 1]] = np.arange(1, r + 2)
    table = evaluate_scores("m", scores, truth, meta, is_probability=False)
    loss = truth["rsrp_dbm"].max(1) - np.take_along_axis(truth["rsrp_dbm"], order, 1)[np.arange(600), rank]
    assert value(table, "top1") == pytest.approx((rank == 0).mean())
    assert value(table, "top4") == pytest.approx((rank < 4).mean())
    assert value(table, "within_1db") == pytest.approx((loss <= 1).mean())
    assert value(table, "l1_rsrp_loss_db") == pytest.approx(loss.mean())
    assert value(table, "l1_rsrp_loss_db", "quantile(0.95)") == np.quantile(loss, 0.95, method="inverted_cdf")


def test_ties_are_ranked_as_argmax_breaks_them():
    truth, meta = {"rsrp_dbm": np.eye(64)[[3, 4]]}, {"split": np.array("test"), "drop_id": np.arange(2)}
    table = evaluate_scores("m", np.zeros((2, 64)), truth, meta, is_probability=False)
    assert value(table, "top1") == 0 and value(table, "top4") == 0.5  # beam 3 is the fourth of 64 equal ones, beam 4 the fifth


def test_calibration_rows_give_the_ece_of_the_library():
    rng, truth, meta = planted(n=3000)
    prob = softmax(truth["rsrp_dbm"] / 3 + rng.normal(0, 1, (3000, 64)), axis=1)
    table = evaluate_scores("m", prob, truth, meta, is_probability=True)
    label = truth["rsrp_dbm"].argmax(1)
    assert value(table, "ece", "ece") == pytest.approx(ece(prob, label))
    ours, direct = reliability_of(table, "m", "test"), reliability(prob, label)
    assert ours is not None
    for name in ("bin", "confidence", "accuracy", "count"):
        assert getattr(ours, name) == pytest.approx(getattr(direct, name))
    assert reliability_of(table, "other", "test") is None


def test_cells_name_site_band_and_link():
    _, truth, meta = planted()
    table = evaluate_scores("m", truth["rsrp_dbm"], truth, meta, is_probability=False)
    cells = [parse_cell(c) for c in table["cell"].unique()]
    assert {c["site"] for c in cells} == {"umi_0", "uma_1"} and {c["band"] for c in cells} == {"3.5GHz", "28GHz"}
    indoor = select(table, metric="l1_rsrp_loss_db", where={"link": "indoor"})
    assert len(indoor) == meta["indoor"].sum() and {c["link"] for c in cells} == {"los", "nlos", "indoor"}
    los = select(table, metric="top1", where={"link": "los", "site": "umi_0"})
    assert los["n"].sum() == (meta["los"] & ~meta["indoor"] & (meta["site"] == "umi_0")).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, m: (s[:, :32], t, m), "expected the same"),
        (lambda s, t, m: (np.where(np.arange(64) == 5, np.nan, s), t, m), "score of sample 0 is not finite"),
        (lambda s, t, m: (s, t, {k: v for k, v in m.items() if k != "drop_id"}), "no 'drop_id'"),
        (lambda s, t, m: (s, t, {**m, "site": m["site"][:-1]}), "'site' has shape"),
    ],
)
def test_bad_input_is_one_sentence(change, message):
    _, truth, meta = planted()
    with pytest.raises(RankdError, match=message):
        evaluate_scores("m", *change(truth["rsrp_dbm"].copy(), truth, meta), is_probability=False)
