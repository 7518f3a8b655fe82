"""What channel estimation has to beat: interpolation of LS estimates, and linear MMSE filters with and without knowledge.

All see what the networks see: LS estimates and the measured noise variance. `lmmse` and `wiener` assume one channel
statistic for every user, chosen on validation: the best that a receiver can do that does not adapt. `lmmse_true` knows each
slot's own power delay profile and Doppler; on Rayleigh fading it is the conditional mean, so no estimator that looks at one
antenna and one slot has a smaller error: a bound, not a rival.

Predictors return [n, 2, 2, T, K] like the networks' head: estimate and half width of its 90 % interval, of the real and the
imaginary part. Axis legend: n rows (slot and antenna), S DMRS symbols, P estimates of a DMRS symbol, T symbols, K subcarriers,
L paths; C = S*P.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import j0

from rankd_pipeline.distillation.heads import GAUSSIAN_90
from rankd_pipeline.radio.pusch import (
    DMRS_SYMBOLS,
    NOISE_OF_ESTIMATE,
    SYMBOLS,
    Interpolation,
    noise_power,
    pilot_positions,
    symbol_seconds,
)
from rankd_pipeline.ran_functions.channel_estimation.config import ChannelCorpusConfig
from rankd_pipeline.ran_functions.channel_estimation.simulate import pusch, real
from rankd_pipeline.ran_functions.contract import Arrays, Baseline, Predictor

# Tried on validation. Delays cover 30-300 ns of delay spread, Doppler the train bands at 3-120 km/h.
DELAY_SPREADS_NS = (60.0, 100.0, 150.0, 200.0, 260.0)
MAX_DELAYS_NS = (300.0, 600.0, 1000.0, 1500.0, 2200.0)
DOPPLERS_HZ = (60.0, 120.0, 200.0, 300.0)
TUNING_ROWS = 1500
PROFILE_COLUMNS = ("path_power", "path_delay_ns", "path_correlation", "snr_db")


def all_baselines(cfg: ChannelCorpusConfig) -> tuple[Baseline, ...]:
    """Non-learned all; the last one is the bound, which sets no gate."""
    return (
        Baseline("ls_nearest", False, lambda *_: lambda features: interpolated(features, cfg, "nn")),
        Baseline("ls_linear", False, lambda *_: lambda features: interpolated(features, cfg, "lin")),
        Baseline("ls_time_average", False, lambda *_: lambda features: interpolated(features, cfg, "lin_time_avg")),
        Baseline("wiener", False, lambda _, val, seed: tuned(val, seed, _wieners(cfg))),
        Baseline("lmmse", False, lambda _, val, seed: tuned(val, seed, _lmmses(cfg))),
        Baseline("lmmse_true", False, lambda *_: lambda features: true_lmmse(features, cfg), PROFILE_COLUMNS, gate=False),
    )


def interpolated(features: Arrays, cfg: ChannelCorpusConfig, kind: Interpolation) -> np.ndarray:
    """Sionna's nearest, linear or time-averaged linear interpolation."""
    ls = torch.from_numpy(complex_ls(features))
    estimate = pusch(cfg.resource_blocks, cfg.scs_khz).interpolate(ls[:, None], kind)[:, 0].numpy()
    variance = np.asarray(features["noise_variance"], np.float64)
    return with_interval(estimate, variance / len(DMRS_SYMBOLS) if kind == "lin_time_avg" else variance)


def complex_ls(features: Arrays) -> np.ndarray:
    """LS estimates complex64 [n, S, P]."""
    ls = np.asarray(features["ls"], np.float32)
    return (ls[:, 0] + 1j * ls[:, 1]).astype(np.complex64)


def with_interval(estimate_nTK: np.ndarray, error_variance: np.ndarray) -> np.ndarray:
    """Complex estimates [n, T, K] and their error variance [n] as predictors return them; half of it falls on each part."""
    half = GAUSSIAN_90 * np.sqrt(np.maximum(error_variance, 0.0) / 2)
    values = real(estimate_nTK).astype(np.float32)
    return np.stack([values, np.broadcast_to(half[:, None, None, None], values.shape)], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Covariances:
    """Of the channel over one axis: between what was observed, and between what is wanted and what was observed."""

    observed: np.ndarray
    wanted: np.ndarray


def frequency_covariances(correlation: Callable[[np.ndarray], np.ndarray], cfg: ChannelCorpusConfig) -> Covariances:
    """From a correlation over frequency differences [Hz]. An LS estimate is the mean of two DMRS, two subcarriers apart."""
    spacing = cfg.scs_khz * 1e3
    observed = pilot_positions(cfg.resource_blocks)[:, None] + np.array([-1.0, 1.0])
    wanted = np.arange(cfg.subcarriers, dtype=np.float64)
    pairs = observed[:, None, :, None] - observed[None, :, None, :]
    return Covariances(
        correlation(spacing * pairs).mean((-1, -2)),
        correlation(spacing * (wanted[:, None, None] - observed[None])).mean(-1),
    )


def time_covariances(correlation: Callable[[np.ndarray], np.ndarray], cfg: ChannelCorpusConfig) -> Covariances:
    """From a correlation over time differences [s]."""
    observed = np.array(DMRS_SYMBOLS) * symbol_seconds(cfg.scs_khz)
    wanted = np.arange(SYMBOLS) * symbol_seconds(cfg.scs_khz)
    return Covariances(correlation(observed[:, None] - observed), correlation(wanted[:, None] - observed))


def exponential(delay_spread_ns: float) -> Callable[[np.ndarray], np.ndarray]:
    """Frequency correlation of an exponential power delay profile."""
    return lambda hz: 1.0 / (1.0 + 2j * np.pi * hz * delay_spread_ns * 1e-9)


def uniform_delays(longest_ns: float) -> Callable[[np.ndarray], np.ndarray]:
    """Frequency correlation of power spread evenly over delays from 0: robust to any profile within (Li, Cimini 1998)."""
    return lambda hz: np.sinc(hz * longest_ns * 1e-9) * np.exp(-1j * np.pi * hz * longest_ns * 1e-9)


def jakes(doppler_hz: float) -> Callable[[np.ndarray], np.ndarray]:
    """Time correlation of waves that arrive evenly from all around (Clarke)."""
    return lambda seconds: j0(2 * np.pi * doppler_hz * seconds)


def uniform_doppler(doppler_hz: float) -> Callable[[np.ndarray], np.ndarray]:
    """Time correlation of power spread evenly over ± doppler_hz."""
    return lambda seconds: np.sinc(2 * doppler_hz * seconds)


def lmmse(features: Arrays, frequency: Covariances, time: Covariances) -> np.ndarray:
    """Joint LMMSE over time and frequency for a covariance that is their product, by its eigenvectors."""
    ls, noise = complex_ls(features), np.asarray(features["noise_variance"], np.float64)
    power_f, basis_f = np.linalg.eigh(frequency.observed)
    power_t, basis_t = np.linalg.eigh(time.observed)
    power = np.maximum(power_t[:, None] * power_f, 0.0)
    modes = np.einsum("st,nsp->ntp", basis_t.conj(), ls) @ basis_f.conj()
    shrunk = modes / (power + noise[:, None, None])
    estimate = (time.wanted @ basis_t) @ shrunk @ (frequency.wanted @ basis_f).T
    return with_interval(estimate, (power * noise[:, None, None] / (power + noise[:, None, None])).mean((1, 2)))


def wiener(features: Arrays, frequency: Covariances, time: Covariances) -> np.ndarray:
    """2x1-D Wiener filter: over frequency at each DMRS symbol, then over time with the noise that is left."""
    ls, noise = complex_ls(features), np.asarray(features["noise_variance"], np.float64)
    power_f, basis_f = np.linalg.eigh(frequency.observed)
    gain = 1.0 / (np.maximum(power_f, 0.0) + noise[:, None])
    smoothed = ((ls @ basis_f.conj()) * gain[:, None]) @ (frequency.wanted @ basis_f).T
    left = (power_f * noise[:, None] * gain).mean(1)
    power_t, basis_t = np.linalg.eigh(time.observed)
    modes = np.einsum("st,nsk->ntk", basis_t.conj(), smoothed)
    gain_t = 1.0 / (np.maximum(power_t, 0.0) + left[:, None])
    estimate = (time.wanted @ basis_t) @ (modes * gain_t[:, :, None])
    return with_interval(estimate, (power_t * left[:, None] * gain_t).mean(1))


def _lmmses(cfg: ChannelCorpusConfig) -> Iterator[Predictor]:
    for spread in DELAY_SPREADS_NS:
        for doppler in DOPPLERS_HZ:
            frequency, time = frequency_covariances(exponential(spread), cfg), time_covariances(jakes(doppler), cfg)
            yield lambda features, frequency=frequency, time=time: lmmse(features, frequency, time)


def _wieners(cfg: ChannelCorpusConfig) -> Iterator[Predictor]:
    for longest in MAX_DELAYS_NS:
        for doppler in DOPPLERS_HZ:
            frequency, time = frequency_covariances(uniform_delays(longest), cfg), time_covariances(uniform_doppler(doppler), cfg)
            yield lambda features, frequency=frequency, time=time: wiener(features, frequency, time)


def tuned(val: Arrays, seed: int, candidates: Iterator[Predictor]) -> Predictor:
    """The candidate with the best mean over SNR bands of the NMSE in dB, on validation."""
    rows = np.random.default_rng(seed).permutation(len(val["label"]))[:TUNING_ROWS]
    some = {name: np.asarray(values)[rows] for name, values in val.items()}
    truth, band = np.asarray(some["label"], np.float32), _snr_band(some["noise_variance"])

    def score(predictor: Predictor) -> float:
        error = ((predictor(some)[:, 0] - truth) ** 2).reshape(len(truth), -1).mean(1)
        return float(np.mean([10 * np.log10(error[band == each].mean()) for each in np.unique(band)]))

    return min(candidates, key=score)


def _snr_band(noise_variance: np.ndarray) -> np.ndarray:
    """Index [n] of the 5 dB band in which the noise lies."""
    return np.floor(-10 * np.log10(np.maximum(np.asarray(noise_variance, np.float64), 1e-12)) / 5.0).astype(int)


def true_lmmse(features: Arrays, cfg: ChannelCorpusConfig, rows: int = 256) -> np.ndarray:
    """LMMSE with the true statistics of each slot and the true noise power."""
    names = ("ls", *PROFILE_COLUMNS)
    count = len(np.asarray(features["ls"]))
    parts = [
        _true_lmmse({name: np.asarray(features[name][start : start + rows]) for name in names}, cfg)
        for start in range(0, count, rows)
    ]
    return np.concatenate(parts)


def _true_lmmse(features: Arrays, cfg: ChannelCorpusConfig) -> np.ndarray:
    power, delay_s = features["path_power"].astype(np.float64), features["path_delay_ns"].astype(np.float64) * 1e-9
    correlation = features["path_correlation"][:, 0] + 1j * features["path_correlation"][:, 1]
    spacing = 2j * np.pi * cfg.scs_khz * 1e3
    pairs = pilot_positions(cfg.resource_blocks)[:, None] + np.array([-1.0, 1.0])
    seen_nLP = np.exp(-spacing * delay_s[:, :, None, None] * pairs).mean(-1)
    wanted_nLK = np.exp(-spacing * delay_s[:, :, None] * np.arange(cfg.subcarriers))
    among_nLSS = _at_lags(correlation, np.array(DMRS_SYMBOLS)[:, None] - np.array(DMRS_SYMBOLS))
    toward_nLTS = _at_lags(correlation, np.arange(SYMBOLS)[:, None] - np.array(DMRS_SYMBOLS))
    n, size = len(power), among_nLSS.shape[-1] * seen_nLP.shape[-1]
    weighted = power[:, :, None] * seen_nLP
    # [n, S, S, P, P] one matrix product for each pair of DMRS symbols.
    blocks = (among_nLSS.transpose(0, 2, 3, 1)[..., None, :] * weighted.transpose(0, 2, 1)[:, None, None]) @ seen_nLP.conj()[
        :, None, None
    ]
    covariance = blocks.transpose(0, 1, 3, 2, 4).reshape(n, size, size)
    noise = NOISE_OF_ESTIMATE * noise_power(features["snr_db"]).astype(np.float64)
    covariance[:, np.arange(size), np.arange(size)] += noise[:, None]
    inverse = np.linalg.inv(covariance)
    solved = (inverse @ complex_ls(features).reshape(n, size, 1))[..., 0].reshape(n, -1, seen_nLP.shape[-1])
    paths_nLS = (solved @ weighted.conj().transpose(0, 2, 1)).transpose(0, 2, 1)
    estimate = np.einsum("nlt,nlk->ntk", np.einsum("nlts,nls->nlt", toward_nLTS, paths_nLS), wanted_nLK, optimize=True)
    trace = np.einsum("nii->n", inverse).real
    return with_interval(estimate, noise * (1.0 - noise * trace / size))


def _at_lags(correlation_nLD: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """Correlation [n, L, ...] at integer lags of either sign."""
    values = correlation_nLD[:, :, np.abs(lags)]
    return np.where(lags >= 0, values, values.conj())
