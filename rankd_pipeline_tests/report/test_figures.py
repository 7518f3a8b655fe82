"""Pictures: each one is a small PNG of the agreed size, the same bytes each time, and shows what it was given."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import softmax

from rankd_pipeline.evaluation.table import concat_tables
from rankd_pipeline.ran_functions.beam_management.metrics import evaluate_scores
from rankd_pipeline.ran_functions.contract import Metric
from rankd_pipeline.report import figures
from rankd_pipeline.runtime.latency import CandidateResult, LatencyReport, judge_times

TOP1, LOSS = Metric("top1", "share", True, True), Metric("l1_rsrp_loss_db", "dB", False, False)
MODELS = ["teacher", "best_of_set_b"]


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    parts = []
    for split, sites in (("test", ["umi_0", "uma_1"]), ("heldout_site", ["umi_7"])):
        drop = np.arange(480) // 8
        truth = rng.normal(-95, 6, (480, 64))
        meta = {"split": np.array(split), "drop_id": drop, "site": np.array(sites)[drop % len(sites)],
                "band_ghz": np.array([3.5, 28.0])[drop % 2], "los": rng.random(480) < 0.5}  # fmt: skip
        for model, noise, probability in (("teacher", 2.0, True), ("teacher_raw", 2.0, True), ("best_of_set_b", 6.0, False)):
            scores = truth + noise * rng.normal(size=truth.shape)
            scores = softmax(scores, axis=1) if probability else scores
            parts.append(evaluate_scores(model, scores, {"rsrp_dbm": truth}, meta, probability))
    return concat_tables(parts)


@pytest.fixture(scope="module")
def race():
    rng = np.random.default_rng(1)

    def times(p50_us):
        return {
            name: (p50_us * 1000 * rng.lognormal(0, 0.1, 5000)).astype(np.int64) for name in ("paced", "back_to_back", "control")
        }

    results = [
        judge_times(CandidateResult(runtime=name, precision="fp32", shippable=True), times(us), ["all"], 100.0)
        for name, us in (("c-fp32", 1.0), ("onnxruntime-fp32", 9.0))
    ]
    missing = CandidateResult(runtime="c-int8", precision="int8", shippable=True, reason="not built: no compiler")
    return LatencyReport(
        model="beam", budget_us=100.0, slot_us=500.0, paced_slot_us=500.0, host={}, candidates=[*results, missing], winner="c-fp32",
        verdict="pass", why="", seconds=1.0,
    ).model_dump(mode="json")  # fmt: skip


def is_small_png(data: bytes) -> bool:
    width, height = struct.unpack(">II", data[16:24])
    return data[:8] == b"\x89PNG\r\n\x1a\n" and (width, height) == (450, 270) and len(data) < 100_000


def test_the_scorecard_has_reliability_cdf_and_one_picture_for_each_cell_part(table):
    function = SimpleNamespace(metric=TOP1, secondary_metrics=(LOSS, Metric("top4", "share", True, True)))
    splits = ["test", "heldout_site"]
    pictures = figures.scorecard_figures(function, table, splits, MODELS)
    assert set(pictures) == {"reliability", "l1_rsrp_loss_db_cdf", *(f"top1_by_{p}" for p in ("split", "site", "band", "link"))}
    assert all(is_small_png(data) for data in pictures.values())
    assert figures.scorecard_figures(function, table, splits, MODELS) == pictures


def test_students_have_curve_sweep_and_paired_seeds():
    history = [{"epoch": e, "train_loss": 1 / e, "validation": 1.2 / e if e % 2 else None} for e in range(1, 9)]
    sweep = [{"temperature": t, "validation_score": 0.6 + 0.01 * t, "divergence": 0.3} for t in (4.0, 1.0, 2.0)]
    scores = {"distilled": [0.61, 0.62], "scratch": [0.58, 0.6], "hard": [0.6, 0.6]}
    pictures = figures.student_figures({"sweep": sweep, "seed_scores": scores}, history, 2.0)
    assert set(pictures) == {"training_curve", "temperature_sweep", "paired_seeds"} and all(map(is_small_png, pictures.values()))
    # Order of the sweep does not matter, its values do.
    assert figures.temperature_sweep(sweep[::-1], 2.0) == pictures["temperature_sweep"]
    assert figures.temperature_sweep(sweep, 4.0) != pictures["temperature_sweep"]
    assert set(figures.student_figures({}, history, 2.0)) == {"training_curve"}


def test_a_race_shows_winner_and_histogram(race):
    pictures = figures.latency_figures(race)
    assert set(pictures) == {"race", "latency"} and all(map(is_small_png, pictures.values()))
    other = figures.latency_histogram({**race, "winner": "onnxruntime-fp32"})
    assert other != pictures["latency"] and figures.race({**race, "winner": "onnxruntime-fp32"}) != pictures["race"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l1_rsrp_loss_db_cdf", "L1-RSRP loss: share of test samples above it"),
        ("top1_by_site", "Top-1 by site, 95 % intervals by drop (* held out)"),
        ("A caption of one's own", "A caption of one's own"),
    ],
)
def test_captions(name, text):
    assert figures.caption(name) == text


def test_names_are_written_as_people_do():
    assert [figures.readable(n) for n in ("best_of_set_b", "knn", "student_int8", "nlos")] == [
        "best of Set B",
        "kNN",
        "student INT8",
        "NLoS",
    ]
    assert (
        figures.readable("l1_rsrp_loss_db") == "L1-RSRP loss"
        and figures.readable("l1_rsrp_loss_db", unit=True) == "L1-RSRP loss [dB]"
    )
