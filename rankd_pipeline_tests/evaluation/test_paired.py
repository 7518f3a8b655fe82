"""The paired test over seeds: its p-value against scipy, its error rate, and the decision it carries."""

import numpy as np
import pytest
from scipy import stats

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.paired import paired_gain


def test_five_seeds_that_all_gain_are_useful_and_four_are_not():
    scratch = np.array([0.50, 0.52, 0.49, 0.51, 0.50])
    gain = paired_gain(scratch + [0.02, 0.01, 0.03, 0.02, 0.01], scratch)
    assert gain.p_one_sided == 1 / 32 and gain.useful and gain.mean == pytest.approx(0.018) and gain.n == 5
    assert not paired_gain(scratch[:4] + 0.02, scratch[:4]).useful
    assert not paired_gain(scratch, scratch + 0.02).useful
    assert not paired_gain(scratch, scratch).useful


def test_p_value_and_interval_agree_with_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 0.02, 8), rng.normal(0.49, 0.02, 8)
    gain = paired_gain(a, b)
    exact = stats.permutation_test((a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples",
                                   alternative="greater", n_resamples=np.inf)  # fmt: skip
    assert gain.p_one_sided == pytest.approx(exact.pvalue)
    assert gain.ci95 == pytest.approx(tuple(stats.ttest_rel(a, b).confidence_interval(0.95)))


def test_without_a_gain_at_most_one_in_twenty_is_called_useful():
    rng = np.random.default_rng(1)
    called = [paired_gain(d[0], d[1]).useful for d in rng.normal(0, 1, (2000, 2, 6))]
    assert np.mean(called) <= 0.06


def test_many_seeds_are_sampled_not_enumerated():
    rng = np.random.default_rng(2)
    b = rng.normal(0, 1, 40)
    assert 0 < paired_gain(b + 0.5, b).p_one_sided < 0.001


def test_bad_scores_are_refused():
    with pytest.raises(RankdError, match="2 or more seeds"):
        paired_gain([0.5], [0.4])
    with pytest.raises(RankdError, match="diverged"):
        paired_gain([0.5, np.nan], [0.4, 0.4])
