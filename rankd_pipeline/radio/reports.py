"""From true RSRP to what the gNB gets to see: RS measurement noise and the L1-RSRP report of the standard."""

import math

import numpy as np

THERMAL_NOISE_DBM_PER_HZ = -174.0
RSRP_REPORT_MIN_DBM = -140.0
RSRP_REPORT_MAX_DBM = -44.0
DIFFERENTIAL_STEP_DB = 2.0
DIFFERENTIAL_LEVELS = 16


def noise_per_re_dbm(scs_khz: float, noise_figure_db: float) -> float:
    """Receiver noise power in one resource element [dBm]: kTB over one subcarrier plus the noise figure."""
    return THERMAL_NOISE_DBM_PER_HZ + 10.0 * math.log10(scs_khz * 1e3) + noise_figure_db


def measure_rsrp(
    rsrp_dbm: np.ndarray,
    noise_dbm: float,
    n_re: int,
    coherent_re: int,
    implementation_error_db: float,
    detection_snr_db: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """What a UE measures of beams whose true RSRP is `rsrp_dbm`.

    The UE correlates with the known sequence coherently over `coherent_re` REs (one resource block, where the channel
    is flat), averages the `n_re/coherent_re` powers, and subtracts its noise estimate. The average of K noisy powers of
    mean S and noise variance N has variance (2SN + N^2)/K; with K around ten its sum is close to normal. On top comes
    the receiver's own error, log-normal and independent per beam. A beam whose SNR per RE is below the detection
    threshold (TS 38.133 asks accuracy only for SSB Es/Iot above about -3 dB) is not found at all.

    :param rsrp_dbm: true RSRP per RE [dBm], any shape
    :returns: (measured RSRP [dBm], detected bool), same shape; the value of an undetected beam means nothing
    """
    signal = 10.0 ** (rsrp_dbm.astype(np.float64) / 10.0)
    noise = 10.0 ** (noise_dbm / 10.0) / coherent_re
    groups = max(n_re // coherent_re, 1)
    spread = np.sqrt((2.0 * signal * noise + noise**2) / groups)
    power = signal + spread * rng.standard_normal(rsrp_dbm.shape)
    detected = (rsrp_dbm - noise_dbm >= detection_snr_db) & (power > 0.0)
    measured = 10.0 * np.log10(np.maximum(power, 1e-30))
    return measured + implementation_error_db * rng.standard_normal(rsrp_dbm.shape), detected


def quantize_report(measured_dbm: np.ndarray, detected: np.ndarray, reported_beams: int) -> tuple[np.ndarray, np.ndarray]:
    """The L1-RSRP report of TS 38.214 clause 5.2.1.4.3 and the mapping tables of TS 38.133 clause 10.1.6.

    The strongest beam is reported in 1 dB steps from -140 to -44 dBm (7 bit), the others as a difference to it in 2 dB
    steps (4 bit): step 0 is 0..-2 dB, the last of the 16 steps stands for "-30 dB or less". The gNB places a value at the upper
    edge of its step. Only the strongest `reported_beams` are in the report; the rest, and beams not detected, are missing.

    :param measured_dbm: [..., N]; :param detected: bool [..., N]
    :returns: (reported [dBm] float32 [..., N] with 0.0 where missing, mask uint8 [..., N], 1 = reported)
    """
    level = np.where(detected, measured_dbm, -np.inf)
    n_beams = level.shape[-1]
    if reported_beams < n_beams:
        rank = np.argsort(np.argsort(-level, axis=-1, kind="stable"), axis=-1, kind="stable")
        level = np.where(rank < reported_beams, level, -np.inf)
    strongest = level.max(axis=-1, keepdims=True)
    # Below -140 dBm the table has one open-ended code, which carries no level: nothing usable is reported.
    in_range = np.isfinite(strongest) & (strongest >= RSRP_REPORT_MIN_DBM)
    anchor = np.where(in_range, strongest, RSRP_REPORT_MIN_DBM)
    anchor_code = np.clip(np.floor(anchor), RSRP_REPORT_MIN_DBM, RSRP_REPORT_MAX_DBM)
    present = np.isfinite(level) & in_range
    difference = np.where(present, anchor - level, 0.0)
    step = np.clip(np.floor(difference / DIFFERENTIAL_STEP_DB), 0, DIFFERENTIAL_LEVELS - 1)
    reported = np.where(present, anchor_code - DIFFERENTIAL_STEP_DB * step, 0.0)
    return reported.astype(np.float32), present.astype(np.uint8)
