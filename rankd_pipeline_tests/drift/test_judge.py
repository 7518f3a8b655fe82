"""One window against its reference, on telemetry made by hand: what moves is found and named, what does not is not."""

from typing import Any

import numpy as np
import pytest

from rankd_pipeline.drift.causes import DEFAULT_ACTIONS
from rankd_pipeline.drift.judge import Judgement, Rows, Rules, judge, quality_of
from rankd_pipeline.drift.plots import drift_figures
from rankd_pipeline.drift.series import context_series, input_series
from rankd_pipeline.telemetry.contract import CONTEXT, error_column
from rankd_pipeline_tests.telemetry.made import columns, schema

RULES = Rules(alpha=0.001, min_psi=0.2, min_labelled=100, budget_us=100.0, actions=DEFAULT_ACTIONS)


def rows(hour: int, n: int = 1000, **changes: Any) -> Rows:
    made = columns(n, hour, labelled=0.4, **changes)
    for quantity in CONTEXT:
        for name in (quantity.name, error_column(quantity.name)):
            made.setdefault(name, np.full(n, np.nan, np.float32))
    score = np.where(made["has_label"], made["output"].argmax(axis=1) == made["label"], np.nan)
    guess = np.where(made["has_label"], np.random.default_rng(hour).random(n) < 0.3, np.nan)
    return Rows(made, np.ones(n, bool), score, guess, made["confidence"].astype(float))


@pytest.fixture(scope="module")
def reference() -> Rows:
    parts = [rows(hour) for hour in range(4)]
    together = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Rows(
        together, *(np.concatenate([getattr(part, name) for part in parts]) for name in ("own", "score", "baseline", "expected"))
    )


def causes(verdict: Judgement) -> list[str]:
    return [found.cause for found in verdict.causes]


def test_an_ordinary_window_is_no_drift(reference: Rows) -> None:
    verdicts = [judge(reference, rows(hour), schema(), RULES) for hour in range(10, 20)]
    assert not any(verdict.drifted for verdict in verdicts)
    quality = verdicts[0].quality
    assert quality.score is not None and quality.baseline is not None and quality.score > quality.baseline
    assert quality.score_ci95 is not None and quality.score_ci95[0] < quality.score < quality.score_ci95[1]
    assert set(quality.by_site) == {"market_square", "old_town"}


def test_each_thing_that_moves_is_named(reference: Rows) -> None:
    base = columns(1000, 30)
    longer = base["delay_spread_ns"] * 3
    mask = base["l1_rsrp_mask"].copy()
    mask[:, 0, 7] = 0
    weak = base["l1_rsrp_dbm"].copy()
    weak[:, 0, 7] -= 12
    sites = np.where(np.arange(1000) % 3 == 0, "hill", base["site"]).astype(object)
    late = base["latency_us"].copy()
    late[:50] = 300
    for changes, expected in (
        ({"delay_spread_ns": longer}, ["delay_spread"]),
        ({"l1_rsrp_mask": mask}, ["broken_element"]),
        ({"l1_rsrp_dbm": weak}, ["broken_element"]),
        ({"site": sites}, ["new_site"]),
        ({"band_ghz": np.full(1000, 28.0, np.float32)}, ["refarmed_band"]),
        ({"latency_us": late}, ["slow_host"]),
        ({"snr_db": base["snr_db"] - 20}, ["power"]),
        ({"snr_db": base["snr_db"] - 20, "delay_spread_ns": longer}, ["scenario"]),
        ({"l1_rsrp_dbm": np.clip(base["l1_rsrp_dbm"] + 30, -140, -44)}, ["unexplained"]),
    ):
        assert causes(judge(reference, rows(30, **changes), schema(), RULES)) == expected, expected


def test_a_significant_but_tiny_move_is_none(reference: Rows) -> None:
    base = columns(1000, 31)
    moved = {"delay_spread_ns": base["delay_spread_ns"] * 1.1}
    assert not judge(reference, rows(31, **moved), schema(), RULES).drifted


def test_a_fall_of_the_score_alone_is_a_drift_of_its_own(reference: Rows) -> None:
    base = columns(1000, 32)
    wrong = ((base["output"].argmax(axis=1) + 1) % 64).astype(np.int32)
    verdict = judge(reference, rows(32, label=wrong), schema(), RULES)
    assert causes(verdict) == ["unexplained"] and "score" in verdict.causes[0].detail
    assert verdict.quality.score == 0.0
    few = judge(reference, rows(32, label=wrong, has_label=np.arange(1000) < 50), schema(), RULES)
    assert not few.drifted and few.quality.score is None and few.quality.labelled == 50


def test_accuracy_is_estimated_without_labels(reference: Rows) -> None:
    """Confidence promises more than labels bear out; the reference says by how much, and the estimate is shifted by that."""
    window = rows(33, has_label=np.zeros(1000, bool))
    truth = window.columns["output"].argmax(axis=1) == window.columns["label"]
    quality = judge(reference, window, schema(), RULES).quality
    assert quality.score is None and quality.expected_ci95 is not None and quality.expected is not None
    assert quality.expected_ci95[0] < truth.mean() < quality.expected_ci95[1]
    assert abs(quality.expected - truth.mean()) < abs(window.expected.mean() - truth.mean())
    assert quality_of(window, RULES).expected == pytest.approx(np.nanmean(window.expected), abs=0.02)


def test_rows_of_another_model_say_nothing_of_this_one(reference: Rows) -> None:
    window = rows(34)
    other = Rows(window.columns, np.zeros(1000, bool), window.score, window.baseline, window.expected)
    verdict = judge(reference, other, schema(), RULES)
    assert verdict.quality.labelled == 0 and verdict.quality.expected is None and not verdict.drifted


def test_series_tell_a_fault_of_one_element_from_a_move_of_all() -> None:
    made = columns(200)
    made["l1_rsrp_dbm"][:, 0, 7] -= 12.0
    by_name = {item.name: item for item in input_series(made, schema())}
    assert len(by_name) == 1 + 2 * 16
    assert np.median(by_name["l1_rsrp_dbm[ssb_beam 7]"].values) < -8
    np.testing.assert_allclose(by_name["l1_rsrp_dbm level"].values, made["l1_rsrp_dbm"].mean(axis=(1, 2)), rtol=1e-5)
    made["l1_rsrp_mask"][:50] = 0
    level = {item.name: item for item in input_series(made, schema())}["l1_rsrp_dbm level"].values
    assert np.isnan(level[:50]).all() and np.isfinite(level[50:]).all()
    made["k_factor_db"] = np.where(np.arange(200) % 2, 9.0, np.nan)
    for name in ("doppler_hz", "angle_spread_deg"):
        made[name] = np.full(200, np.nan)
    assert [item.name for item in context_series(made)] == ["delay_spread_ns", "k_factor_db", "k_factor_db known", "snr_db"]


def test_a_report_draws_itself(reference: Rows) -> None:
    verdict = judge(reference, rows(40), schema(), RULES).as_json()
    judged = {**verdict, "key": "2026-01-01T00:00", "state": "judged", "p999_us": 20.0}
    small = {"key": "2026-01-01T01:00", "state": "too small"}
    pictures = drift_figures([judged, {**judged, "action": "redistill"}, small], 100.0, "top1")
    assert set(pictures) == {"score_over_time", "latency_over_time", "drift_over_time"}
    assert all(data.startswith(b"\x89PNG") and len(data) < 100_000 for data in pictures.values())
    assert drift_figures([small], 100.0, "top1") == {}
