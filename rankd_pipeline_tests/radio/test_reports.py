"""Reports: the L1-RSRP quantisation of TS 38.133 clause 10.1.6 / TS 38.214 clause 5.2.1.4, and the measurement noise."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rankd_pipeline.radio.reports import measure_rsrp, noise_per_re_dbm, quantize_report

BEAMS = 8
levels = arrays(np.float64, st.tuples(st.integers(1, 4), st.just(BEAMS)), elements=st.floats(-190, -20, width=32))
found = arrays(np.bool_, BEAMS)


def report(*dbm: float, detected: list[bool] | None = None, reported_beams: int = 16) -> tuple[list[float], list[int]]:
    values, mask = quantize_report(np.array([dbm]), np.array([detected or [True] * len(dbm)]), reported_beams)
    return values[0].tolist(), mask[0].tolist()


@pytest.mark.parametrize(
    ("measured_dbm", "reported_dbm"),
    [(-80.0, -80), (-80.01, -81), (-79.01, -80), (-139.5, -140), (-140.0, -140), (-44.5, -45), (-44.0, -44), (-31.0, -44)],
)
def test_the_strongest_is_in_steps_of_1_db_between_the_ends_of_the_range(measured_dbm, reported_dbm):
    assert report(measured_dbm) == ([reported_dbm], [1])


def test_below_the_range_nothing_usable_is_reported():
    assert report(-140.1, -150.0) == ([0, 0], [0, 0])


@pytest.mark.parametrize(
    ("below_db", "reported_below_db"),
    # DIFFRSRP_0: 0 >= d > -2 dB, DIFFRSRP_1: -2 >= d > -4 … DIFFRSRP_15: -30 >= d
    [(0.0, 0), (1.9, 0), (2.0, 2), (3.9, 2), (4.0, 4), (29.9, 28), (30.0, 30), (31.0, 30), (80.0, 30)],
)
def test_the_others_are_in_steps_of_2_db_below_it_down_to_30(below_db, reported_below_db):
    assert report(-60.0, -60.0 - below_db) == ([-60, -60 - reported_below_db], [1, 1])


def test_the_difference_is_taken_from_the_measured_value_not_from_its_code():
    assert report(-60.9, -62.8) == ([-61, -61], [1, 1])  # 1.9 dB apart, although -61 and -62.8 are 1.8 apart
    assert report(-60.1, -62.2) == ([-61, -63], [1, 1])


def test_only_the_strongest_four_are_reported_and_undetected_beams_never():
    values, mask = report(-70, -60, -90, -65, -80, -75, reported_beams=4)
    assert mask == [1, 1, 0, 1, 0, 1] and values == [-70, -60, 0, -64, 0, -74]
    values, mask = report(-70, -60, -90, -65, -80, -75, detected=[True, False, True, True, True, True], reported_beams=4)
    assert mask == [1, 0, 0, 1, 1, 1] and values == [-69, 0, 0, -65, -79, -75]
    assert report(-70, -60, detected=[False, False]) == ([0, 0], [0, 0])


@given(levels, found, st.integers(1, BEAMS + 2))
def test_a_report_is_finite_on_the_grid_and_masked(measured, detected, reported_beams):
    values, mask = quantize_report(measured, np.broadcast_to(detected, measured.shape), reported_beams)
    assert values.dtype == np.float32 and mask.dtype == np.uint8 and values.shape == mask.shape == measured.shape
    assert np.isfinite(values).all() and np.array_equal(mask == 0, values == 0) and (mask <= detected).all()
    assert (mask.sum(1) <= reported_beams).all()
    for value, there in zip(values, mask > 0, strict=True):
        if there.any():
            below = value[there].max() - value[there]
            assert -140 <= value[there].max() <= -44 and np.all(below % 2 == 0) and below.max() <= 30
            assert np.all(value[there] % 1 == 0)


@given(levels, found, st.integers(1, BEAMS))
def test_quantising_a_report_again_changes_nothing(measured, detected, reported_beams):
    values, mask = quantize_report(measured, np.broadcast_to(detected, measured.shape), reported_beams)
    again, mask_again = quantize_report(values, mask > 0, BEAMS)
    assert np.array_equal(again, values) and np.array_equal(mask_again, mask)


@given(levels)
def test_a_stronger_beam_is_never_reported_weaker(measured):
    values, mask = quantize_report(measured, np.ones_like(measured, bool), BEAMS)
    for level, value, there in zip(measured, values, mask > 0, strict=True):
        order = np.argsort(level[there], kind="stable")
        assert np.all(np.diff(value[there][order]) >= 0)


@given(levels, st.integers(0, BEAMS - 1), st.floats(0, 40))
def test_raising_the_strongest_never_lowers_its_own_report(measured, beam, more_db):
    top = measured.max(1) + 0.5
    measured[:, beam] = top
    assume((top >= -140).all())
    raised = measured.copy()
    raised[:, beam] += more_db
    everything = np.ones_like(measured, bool)
    before, after = (quantize_report(m, everything, BEAMS)[0][:, beam] for m in (measured, raised))
    assert np.all(after >= before)


@given(levels, st.integers(1, BEAMS))
def test_reported_beams_keeps_the_strongest(measured, reported_beams):
    assume((measured.max(1) >= -140).all())
    _, mask = quantize_report(measured, np.ones_like(measured, bool), reported_beams)
    assert (mask.sum(1) == reported_beams).all()
    for level, there in zip(measured, mask > 0, strict=True):
        assert level[there].min() >= level[~there].max(initial=-np.inf)


@given(array_shapes(min_dims=1, max_dims=3))
def test_any_leading_shape(shape):
    values, mask = quantize_report(np.full(shape, -70.0), np.ones(shape, bool), 4)
    assert values.shape == mask.shape == shape and mask.sum() == np.prod(shape[:-1]) * min(4, shape[-1])


def test_noise_floor():
    assert noise_per_re_dbm(30.0, 9.0) == pytest.approx(-174 + 44.77 + 9, abs=0.01)
    assert noise_per_re_dbm(120.0, 9.0) - noise_per_re_dbm(30.0, 9.0) == pytest.approx(6.02, abs=0.01)


@pytest.mark.parametrize("snr_db", [-3.0, 3.0, 10.0, 30.0])
def test_noise_of_a_measurement_follows_its_snr(snr_db):
    """The mean of K = 10 powers |s + n|^2 less the noise: unbiased, variance (2 S N + N^2)/K with N after 12 coherent REs.

    Held against the real thing: complex Gaussian noise on 10 x 12 REs, correlated, squared, averaged.
    """
    rng = np.random.default_rng(3)
    n, noise_dbm = 20_000, -100.0
    measured, _ = measure_rsrp(np.full(n, noise_dbm + snr_db), noise_dbm, 127, 12, 0.0, -100.0, rng)
    power = 10 ** ((measured - noise_dbm) / 10)
    signal = 10 ** (snr_db / 10)
    noise = (rng.standard_normal((n, 10)) + 1j * rng.standard_normal((n, 10))) * np.sqrt(1 / 12 / 2)
    plain = (np.abs(np.sqrt(signal) + noise) ** 2).mean(1) - 1 / 12
    assert power.mean() == pytest.approx(signal, rel=0.01) and plain.mean() == pytest.approx(signal, rel=0.01)
    assert power.std() == pytest.approx(plain.std(), rel=0.05)


def test_implementation_error_comes_on_top_in_db_and_noise_fades_with_snr():
    rng = np.random.default_rng(4)
    error = [np.std(measure_rsrp(np.full(4000, -100.0 + snr), -100.0, 127, 12, 0.5, -3.0, rng)[0]) for snr in (0, 10, 60)]
    assert error[0] > error[1] > error[2] and error[2] == pytest.approx(0.5, rel=0.1)


def test_detection_threshold_is_on_the_snr_per_re():
    rsrp = np.array([-103.1, -102.9, -80.0, -120.0])
    _, detected = measure_rsrp(rsrp, -100.0, 127, 12, 0.5, -3.0, np.random.default_rng(0))
    assert detected.tolist() == [False, True, True, False]
    # Far below the noise the power estimate goes negative: such a beam has no level to report, whatever the threshold.
    measured, detected = measure_rsrp(np.full(1000, -160.0), -100.0, 127, 12, 0.5, -200.0, np.random.default_rng(0))
    assert 0.3 < detected.mean() < 0.7 and np.isfinite(measured).all()


def test_same_seed_same_measurement():
    rsrp = np.full((3, 5), -90.0)
    first, second = (measure_rsrp(rsrp, -100.0, 127, 12, 0.5, -3.0, np.random.default_rng(8))[0] for _ in range(2))
    assert np.array_equal(first, second)
