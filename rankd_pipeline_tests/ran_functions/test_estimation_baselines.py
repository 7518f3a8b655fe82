"""The classical estimators on cases whose answer is known, and against Sionna's own LMMSE."""

import numpy as np
import pytest
import torch
from sionna.phy.nr import PUSCHLMMSEChannelEstimator
from sionna.phy.ofdm import tdl_freq_cov_mat, tdl_time_cov_mat

from rankd_pipeline.radio import links
from rankd_pipeline.radio.pusch import NOISE_OF_ESTIMATE, noise_power, symbol_seconds
from rankd_pipeline.radio.seeding import seeded
from rankd_pipeline.ran_functions.channel_estimation import baselines
from rankd_pipeline.ran_functions.channel_estimation.config import ChannelCorpusConfig
from rankd_pipeline.ran_functions.channel_estimation.simulate import pusch, real

CFG = ChannelCorpusConfig()
GRID = links.Grid(3.5, 30, 48, 1)


@pytest.fixture(scope="module")
def slots() -> tuple[dict[str, np.ndarray], np.ndarray, torch.Tensor, torch.Tensor]:
    """(features with true statistics, channel [n, T, K], received grids, noise) of TDL-C, 200 ns, 60 km/h at 5 dB."""
    count = 600
    with seeded(1):
        drawn = links.tdl("C", GRID, count, np.array([200.0]), np.array([60.0]))
        noise = torch.from_numpy(noise_power(np.full(count, 5.0)))
        slot = pusch(4, 30)
        sent, _ = slot.transmit(count)
        received = slot.receive(sent, drawn.channel, noise)
        measured = slot.measure(received)
    features = {
        "ls": real(measured.ls[:, 0].numpy()), "noise_variance": measured.noise_variance.numpy(),
        "path_power": drawn.statistics.power, "path_delay_ns": drawn.statistics.delay_s * 1e9,
        "path_correlation": real(drawn.statistics.correlation), "snr_db": np.full(count, 5.0),
    }  # fmt: skip
    return features, drawn.channel[:, 0].numpy(), received, noise


def nmse_db(predicted: np.ndarray, channel: np.ndarray) -> float:
    residual = predicted[:, 0] - real(channel)
    return 10 * np.log10(2 * np.mean(residual**2) / np.mean(np.abs(channel) ** 2))


def test_the_bound_is_as_good_as_sionnas_lmmse_with_the_true_profile(slots):
    few = 100  # Sionna's takes 20 ms a slot
    features, channel, received, noise = slots
    channel = channel[:few]
    ours = nmse_db(baselines.true_lmmse({name: values[:few] for name, values in features.items()}, CFG), channel)
    cov_f = tdl_freq_cov_mat("C", 30e3, 48, 200e-9)
    cov_t = tdl_time_cov_mat("C", 60 / 3.6, 3.5e9, symbol_seconds(30), 14)
    sionna = PUSCHLMMSEChannelEstimator(pusch(4, 30)._transmitter.resource_grid, 1, 1, 2, cov_t, cov_f, order="f-t")
    estimate, _ = sionna(received[:few, None], noise[:few])
    theirs = nmse_db(np.stack([real(estimate[:, 0, 0, 0, 0].numpy())] * 2, 1), channel)
    # Sionna takes the two pilots of a CDM pair for two measurements with noise of their own, which costs it about half a dB.
    assert theirs - 1.0 < ours < theirs + 0.02


def test_each_estimator_has_its_place(slots):
    features, channel, _, _ = slots
    found = {name: nmse_db(baselines.interpolated(features, CFG, kind), channel) for name, kind in
             (("nearest", "nn"), ("linear", "lin"), ("average", "lin_time_avg"))}  # fmt: skip
    frequency = baselines.frequency_covariances(baselines.exponential(200.0), CFG)
    time = baselines.time_covariances(baselines.jakes(195.0), CFG)
    found["lmmse"] = nmse_db(baselines.lmmse(features, frequency, time), channel)
    found["wiener"] = nmse_db(baselines.wiener(features, frequency, time), channel)
    found["bound"] = nmse_db(baselines.true_lmmse(features, CFG), channel)
    assert found["bound"] < found["lmmse"] < found["linear"] < found["nearest"]
    assert found["bound"] < found["wiener"] < found["linear"]
    assert found["lmmse"] - found["bound"] < 1.5, "an exponential profile of the right spread is nearly right"


def test_intervals_of_the_filters_hold_what_they_promise(slots):
    features, channel, _, _ = slots
    predicted = baselines.true_lmmse(features, CFG)
    covered = np.mean(np.abs(predicted[:, 0] - real(channel)) <= predicted[:, 1])
    assert covered == pytest.approx(0.9, abs=0.03)


def test_lmmse_is_the_conditional_mean_of_its_own_model():
    """For a channel drawn from the very covariances that the filter assumes, written out as one linear system."""
    rng = np.random.default_rng(0)
    frequency = baselines.frequency_covariances(baselines.exponential(150.0), CFG)
    time = baselines.time_covariances(baselines.jakes(300.0), CFG)
    ls, noise = rng.normal(size=(3, 2, 2, 12)).astype(np.float32), np.array([0.01, 0.1, 1.0])
    predicted = baselines.lmmse({"ls": ls, "noise_variance": noise}, frequency, time)
    for row in range(3):
        y = (ls[row, 0] + 1j * ls[row, 1]).reshape(-1)
        covariance = np.kron(time.observed, frequency.observed) + noise[row] * np.eye(24)
        expected = (np.kron(time.wanted, frequency.wanted) @ np.linalg.solve(covariance, y)).reshape(14, 48)
        assert np.allclose(predicted[row, 0, 0] + 1j * predicted[row, 0, 1], expected, atol=1e-4)


def test_covariances_of_estimates_are_those_of_the_mean_of_two_pilots():
    found = baselines.frequency_covariances(baselines.exponential(300.0), CFG)
    rng = np.random.default_rng(1)
    delay = rng.exponential(300e-9, (200_000, 1))
    at = 30e3 * np.array([0.0, 2.0, 4.0, 6.0, 7.0])
    h = np.exp(-2j * np.pi * at * delay)
    first, second = (h[:, 0] + h[:, 1]) / 2, (h[:, 2] + h[:, 3]) / 2
    assert found.observed[1, 0] == pytest.approx(np.mean(second * first.conj()), abs=0.01)
    assert found.observed[0, 0] == pytest.approx(np.mean(np.abs(first) ** 2), abs=0.01)
    assert found.wanted[7, 0] == pytest.approx(np.mean(h[:, 4] * first.conj()), abs=0.01)


def test_tuning_takes_what_fits_the_validation_slots(slots):
    features, channel, _, _ = slots
    val = {"ls": features["ls"], "noise_variance": features["noise_variance"], "label": real(channel)}
    names = {item.name: item for item in baselines.all_baselines(CFG)}
    tuned = nmse_db(names["lmmse"].fit({}, val, 0)(features), channel)
    frequency = baselines.frequency_covariances(baselines.exponential(60.0), CFG)
    worse = nmse_db(baselines.lmmse(features, frequency, baselines.time_covariances(baselines.jakes(60.0), CFG)), channel)
    assert tuned < worse
    assert (
        not names["lmmse_true"].gate and names["lmmse_true"].needs_truth and all(names[n].gate for n in names if n != "lmmse_true")
    )


def test_noise_of_an_estimate_is_a_quarter_of_an_elements():
    assert NOISE_OF_ESTIMATE * noise_power(0.0) == 0.25
