"""Intervals: against scipy, against the truth they should cover, and fast enough for 10,000 drops."""

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.bootstrap import estimate, resampled_weights, slices
from rankd_pipeline.evaluation.table import concat_tables, validate_table
from rankd_pipeline_tests.evaluation.planted import planted_table


def table_of(value, n=1, *, model="m", split="test", metric="top1", cell="site=a", unit=None):
    value = np.asarray(value, float)
    unit = np.arange(len(value)) if unit is None else unit
    return validate_table(
        pd.DataFrame({"model": model, "split": split, "unit": unit, "cell": cell, "metric": metric, "value": value, "n": n})
    )  # fmt: skip


def test_mean_is_weighted_by_samples():
    assert estimate(table_of([1.0, 0.0], n=[3, 1]), "m@test", metric="top1").value == 0.75


def test_agrees_with_scipy_on_ratio_of_sums():
    rng = np.random.default_rng(1)
    n = rng.integers(1, 20, 120)
    value = rng.normal(3, 1, 120) + 0.05 * n
    ours = estimate(table_of(value, n), "m@test", metric="top1", resamples=6000)

    def ratio(total, count, axis=-1):
        return total.sum(axis) / count.sum(axis)

    theirs = stats.bootstrap(
        (value * n, n), ratio, paired=True, method="percentile", n_resamples=6000, random_state=np.random.default_rng(2)
    )
    assert ours.value == pytest.approx(ratio(value * n, n))
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.ci95 == pytest.approx(tuple(theirs.confidence_interval), abs=0.06 * width)


def test_quantile_agrees_with_scipy_and_numpy():
    rng = np.random.default_rng(3)
    value = rng.exponential(2.0, 400)
    ours = estimate(table_of(value), "m@test", metric="top1", aggregate="quantile(0.9)", resamples=4000)
    assert ours.value == np.quantile(value, 0.9, method="inverted_cdf")
    theirs = stats.bootstrap(
        (value,), lambda x, axis=-1: np.quantile(x, 0.9, axis=axis, method="inverted_cdf"), method="percentile",
        n_resamples=4000, random_state=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    assert ours.ci95 == pytest.approx(tuple(theirs), rel=0.03)


def test_quantile_weighs_by_samples():
    assert estimate(table_of([1.0, 5.0], n=[1, 9]), "m@test", metric="top1", aggregate="quantile(0.5)").value == 5.0


def test_the_95_percent_interval_covers_the_truth_when_samples_of_a_drop_agree():
    """Resampling rows instead of drops would cover about half of the time here: each drop counts once, not 20 times."""
    rng = np.random.default_rng(5)
    hits, runs = 0, 200
    for run in range(runs):
        drop = rng.normal(1.0, 1.0, 80)
        value = np.repeat(drop, 20) + rng.normal(0, 0.2, 1600)
        e = estimate(table_of(value, unit=np.repeat(np.arange(80), 20)), "m@test", metric="top1", seed=run, resamples=200)
        assert e.ci95 is not None and e.n_units == 80 and e.n_samples == 1600
        hits += e.ci95[0] <= 1.0 <= e.ci95[1]
    assert 0.90 <= hits / runs <= 0.985


def test_models_on_one_split_are_paired():
    table = planted_table({"a@test": 0.65, "b@test": 0.60, "b@other": 0.60}, spread=0.25, drops=300, per_drop=200)

    def width(ci95):
        return ci95[1] - ci95[0]

    paired = estimate(table, ["a@test"], ["b@test"], metric="top1")
    independent = estimate(table, ["a@test"], ["b@other"], metric="top1")
    assert width(paired.ci95) < 0.4 * width(independent.ci95)


def test_a_model_minus_itself_is_exactly_zero():
    table = planted_table({"a@test": 0.6, "a@other": 0.5})
    e = estimate(table, ["a@test", "a@other"], ["a@other", "a@test"], metric="top1")
    assert e.value == 0 and e.ci95 == pytest.approx((0, 0), abs=1e-12)


def test_splits_with_the_same_drop_numbers_are_not_paired():
    weights = [next(resampled_weights(50, 100, 0, split)) for split in ("test", "heldout_site", "test")]
    assert (weights[0] == weights[2]).all() and (weights[0] != weights[1]).any()
    assert (weights[0].sum(1) == 50).all()


def test_weights_do_not_depend_on_the_chunk():
    whole = next(resampled_weights(30, 40, 7, "test", chunk=40))
    parts = np.concatenate(list(resampled_weights(30, 40, 7, "test", chunk=7)))
    assert (whole == parts).all()


def test_ece_from_bins_and_its_interval_holds_the_estimate():
    rng = np.random.default_rng(6)
    bins = [
        table_of(rng.normal(gap, 0.3, 300), n=rng.integers(1, 9, 300), metric=f"ece_bin_{i:02d}")
        for i, gap in enumerate([0.1, -0.05, 0.0, 0.02])
    ]
    table = concat_tables([*bins, table_of(np.ones(300))])
    e = estimate(table, "m@test", metric="ece", aggregate="ece")
    by_hand = sum(abs((b["value"] * b["n"]).sum()) for b in bins) / sum(b["n"].sum() for b in bins)
    assert e.value == pytest.approx(by_hand)
    assert e.ci95[0] < e.value < e.ci95[1] and e.n_samples == sum(b["n"].sum() for b in bins)


def test_worst_cell_by_direction_by_part_and_without_tiny_cells():
    table = concat_tables(
        [
            table_of(np.full(40, 0.9), cell="site=a|link=los"),
            table_of(np.full(40, 0.5), cell="site=a|link=nlos", unit=np.arange(40, 80)),
            table_of(np.full(40, 0.6), cell="site=b|link=nlos", unit=np.arange(80, 120)),
            table_of([0.0], cell="site=c|link=los", unit=[120]),
        ]
    )
    worst = estimate(table, "m@test", metric="top1", aggregate="worst_cell")
    assert worst.value == 0.5
    assert estimate(table, "m@test", metric="top1", aggregate="worst_cell", higher_is_better=False).value == 0.9
    assert estimate(table, "m@test", metric="top1", aggregate="worst_cell(site)").value == pytest.approx(0.6)
    with pytest.raises(RankdError, match="no part 'band'"):
        estimate(table, "m@test", metric="top1", aggregate="worst_cell(band)")


def test_one_drop_has_no_interval():
    assert estimate(table_of([0.5, 0.6], unit=[3, 3]), "m@test", metric="top1").ci95 is None


def test_a_missing_term_says_what_there_is():
    with pytest.raises(RankdError, match=r"no top1 for teacher@test.*m@test"):
        estimate(table_of([1.0]), "teacher@test", metric="top1")
    with pytest.raises(RankdError, match="where"):
        estimate(table_of([1.0]), "m@test", metric="top1", where={"site": "zz"})


def test_slices_hold_one_row_for_each_part_and_model():
    table = concat_tables(
        [planted_table({"t@test": p, "b@test": p - 0.2}, cell=f"site={s}", drops=60, spread=0) for s, p in [("x", 0.9), ("y", 0.7)]]
    )  # fmt: skip
    got = slices(table, by="site", metric="top1", models=["t", "b"], splits=["test"])
    assert list(got["site"]) == ["x", "x", "y", "y"] and list(got["model"]) == ["t", "b", "t", "b"]
    assert (got["lo"] < got["value"]).all() and (got["value"] < got["hi"]).all() and (got["n"] == 600).all()
    assert np.allclose(got["value"], [0.9, 0.7, 0.7, 0.5], atol=0.06)


def test_ten_thousand_drops_take_about_a_second():
    table = planted_table({"a@test": 0.6, "b@test": 0.5}, drops=10_000)
    start = time.process_time()
    estimate(table, ["a@test"], ["b@test"], metric="top1")
    assert time.process_time() - start < 2.0  # about 0.5 s on an idle core


def cells_of(values: dict[str, list[float]]) -> pd.DataFrame:
    return concat_tables([table_of(value, cell=cell, metric="nmse", unit=np.arange(len(value))) for cell, value in values.items()])


def test_decibels_come_where_the_aggregate_says():
    table = cells_of({"set=a|snr=0": [0.1, 0.1], "set=b|snr=0": [0.001] * 6})
    find = lambda aggregate: estimate(table, "m@test", metric="nmse", aggregate=aggregate, higher_is_better=False).value  # noqa: E731
    assert find("db") == pytest.approx(10 * np.log10((2 * 0.1 + 6 * 0.001) / 8))
    assert find("db_of_cells(set)") == pytest.approx(10 * np.log10((0.1 + 0.001) / 2))
    assert find("cells_db(set)") == pytest.approx((-10 - 30) / 2)
    assert find("cells_db(set, snr)") == find("cells_db") == find("cells_db(set)")
    assert find("cells_db(snr)") == find("db")
    with pytest.raises(RankdError, match="no part 'speed'"):
        find("db_of_cells(set,speed)")


def test_decibel_intervals_cover_the_truth():
    """The true value is inside in about 95 of 100 studies, for a paired difference too."""
    rng = np.random.default_rng(5)
    hits = np.zeros(2)
    for study in range(120):
        hard = rng.exponential(1.0, 80)
        a = table_of(0.02 * hard * rng.uniform(0.5, 1.5, 80), metric="nmse")
        b = table_of(0.05 * hard * rng.uniform(0.5, 1.5, 80), metric="nmse", model="other")
        table = concat_tables([a, b])
        one = estimate(table, "m@test", metric="nmse", aggregate="db", seed=study, resamples=400).ci95
        gap = estimate(table, "m@test", ["other@test"], metric="nmse", aggregate="db", seed=study, resamples=400).ci95
        for i, (ci95, true) in enumerate(((one, 10 * np.log10(0.02)), (gap, 10 * np.log10(0.4)))):
            assert ci95 is not None
            hits[i] += ci95[0] <= true <= ci95[1]
    assert (hits >= 105).all() and (hits <= 120).all()


def test_off_by_is_the_distance_from_what_was_promised():
    table = table_of([0.8, 0.9], metric="covered")
    assert estimate(table, "m@test", metric="covered", aggregate="off_by(0.9)").value == pytest.approx(0.05)
    many = table_of(np.random.default_rng(0).binomial(100, 0.9, 400) / 100, n=100, metric="covered")
    ci95 = estimate(many, "m@test", metric="covered", aggregate="off_by(0.9)").ci95
    assert ci95 is not None and 0.0 <= ci95[0] < ci95[1] < 0.01


def cells_table(models: dict[str, dict[str, float]], drops: int = 300, noise: float = 0.3, seed: int = 0) -> pd.DataFrame:
    """Each model's mean error power in each cell (dB), on drops that are hard or easy for all models alike."""
    rng = np.random.default_rng(seed)
    luck = {cell: np.exp(rng.normal(0, noise, drops)) for cell in next(iter(models.values()))}
    parts = []
    for model, cells in models.items():
        for cell, db in cells.items():
            value = 10 ** (db / 10) * luck[cell] / luck[cell].mean() * np.exp(rng.normal(0, 0.02, drops))
            parts.append(table_of(value, 4, model=model, metric="nmse", cell=f"snr={cell}|site=a"))
    return concat_tables(parts)


def test_worst_difference_is_that_of_one_cell_not_of_worst_cells():
    table = cells_table({"new": {"0": -10.0, "10": -19.0, "20": -25.0}, "old": {"0": -5.0, "10": -15.0, "20": -26.0}})
    found = estimate(table, ["new@test"], ["old@test"], metric="nmse", aggregate="worst_cell_db(snr)", higher_is_better=False)
    assert found.value == pytest.approx(1.0, abs=0.02)
    assert found.ci95 is not None and found.ci95[0] < found.value < found.ci95[1] < 1.1
    without = estimate(table, ["new@test"], ["old@test"], metric="nmse", aggregate="worst_cell_db(snr)", higher_is_better=False,
                       where={"snr": ["0", "10"]})  # fmt: skip
    assert without.value == pytest.approx(-4.0, abs=0.02)
    with pytest.raises(RankdError, match="cells of one split"):
        estimate(concat_tables([table, table.assign(split="other")]), ["new@test"], ["old@other"], metric="nmse",
                 aggregate="worst_cell_db(snr)", higher_is_better=False)  # fmt: skip


def test_simultaneous_bound_holds_for_all_cells_where_single_ones_do_not():
    equal = {str(cell): -10.0 for cell in range(40)}
    outside = {"simultaneous": 0, "single": 0}
    for seed in range(40):
        table = cells_table({"new": equal, "old": equal}, drops=60, seed=seed)
        together = estimate(table, ["new@test"], ["old@test"], metric="nmse", aggregate="worst_cell_db(snr)",
                            higher_is_better=False, resamples=300)  # fmt: skip
        # No cell is better or worse; a bound below zero for the largest of 40 would claim that one is.
        assert together.ci95 is not None
        outside["simultaneous"] += together.ci95[0] > 0
        single = [
            estimate(table, ["new@test"], ["old@test"], metric="nmse", aggregate="db", where={"snr": cell}, resamples=100).ci95
            for cell in list(equal)[:10]
        ]
        outside["single"] += any(ci is not None and ci[0] > 0 for ci in single)
    assert outside["simultaneous"] <= 6
    assert outside["single"] > outside["simultaneous"]


def test_crossing_is_where_the_curve_meets_the_level():
    snr = np.arange(0.0, 6.0)
    curve = [table_of([10 ** (-0.5 * x)] * 50, model="m", metric="block_error", cell=f"snr_db={x:g}") for x in snr]
    found = estimate(concat_tables(curve), "m@test", metric="block_error", aggregate="crossing(0.1,snr_db)")
    assert found.value == pytest.approx(2.0)
    shifted = [
        table_of([min(1.0, 10 ** (-0.5 * (x - 1.3)))] * 50, model="b", metric="block_error", cell=f"snr_db={x:g}") for x in snr
    ]
    gap = estimate(concat_tables(curve + shifted), ["b@test"], ["m@test"], metric="block_error", aggregate="crossing(0.1,snr_db)")
    assert gap.value == pytest.approx(1.3) and gap.ci95 == pytest.approx((1.3, 1.3))


@pytest.mark.parametrize(("errors", "at"), [([0.0, 0.0, 0.0], 0.0), ([1.0, 0.9, 0.5], 4.0)])
def test_crossing_outside_what_was_measured_is_its_end(errors, at):
    rows = [table_of([e] * 20, metric="block_error", cell=f"snr_db={2 * i}") for i, e in enumerate(errors)]
    assert estimate(concat_tables(rows), "m@test", metric="block_error", aggregate="crossing(0.1,snr_db)").value == at


@pytest.mark.parametrize("text", ["crossing(0.1)", "crossing(2,snr_db)", "quantile(0.5,a)", "worst_cell_db()"])
def test_aggregates_that_say_too_little_are_refused(text):
    with pytest.raises(RankdError, match="is unknown; expected mean"):
        estimate(table_of([1.0]), "m@test", metric="top1", aggregate=text)
