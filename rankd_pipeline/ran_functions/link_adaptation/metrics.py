"""What a link adaptation method is worth in the slot loop, as a long evaluation table.

    goodput          bits of acknowledged first transmissions over all slots, bit/s/Hz; one row a trace
    goodput_p5       the same rows, to be read by their 5th percentile over users
    goodput_share    the same over the genie's in the same trace: no strong link drowns the weak ones
    bler             share of NACKs; one row a trace, n = slots
    nack_bursts      runs of three NACKs or more, per second
    settling_slots   after a jump of the mean SNR: slots until the expected goodput over the next WINDOW slots is within
                     10 % of where it comes to rest, relative to the genie's; only traces that have a jump
    ece_bin_XX       mean of (predicted − true) BLER of the predictions in bin XX, over the chosen MCS and its neighbours,
                     in the loop that the predictions themselves close; only where a model predicts
    confidence_bin_XX mean prediction of the same

Cells are ``site=<site>|band=<GHz>GHz|doppler=<low|medium|high>``. Axis legend: N traces, T slots, M MCS indices, C
neighbours of the choice.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from rankd_pipeline.evaluation.calibration import BINS, confidence_bin
from rankd_pipeline.evaluation.table import format_cell, validate_table
from rankd_pipeline.ran_functions.link_adaptation.config import SLOT_US
from rankd_pipeline.ran_functions.link_adaptation.rollout import Rollout, Traces, around
from rankd_pipeline.ran_functions.link_adaptation.tables import EFFICIENCY

DOPPLER_EDGES_HZ = (30.0, 120.0)
DOPPLER_CLASSES = ("low", "medium", "high")
BURST = 3
WINDOW, REST, SETTLED = 20, 150, 0.9
"""Slots of a running mean; slots after a jump that count as its end; share of the final value that counts as settled."""


def evaluate_rollout(
    model: str, split: str, traces: Traces, rollout: Rollout, meta: Mapping[str, np.ndarray], calibrated: bool
) -> pd.DataFrame:
    """The rows of one model on one split.

    Args:
        meta: drop_id [N] (int), site [N], band_ghz [N], doppler_hz [N].
        calibrated: whether the model's predictions are probabilities, so that calibration rows are written.
    """
    n, slots = rollout.mcs_NT.shape
    keys = pd.DataFrame({"split": split, "unit": meta["drop_id"].astype(np.int64), "cell": cells(meta)})
    goodput, genie = goodput_bit_s_hz(rollout), genie_bit_s_hz(traces).mean(axis=1)
    parts = [
        keys.assign(metric="goodput", value=goodput, n=slots),
        keys.assign(metric="goodput_p5", value=goodput, n=slots),
        keys.assign(metric="goodput_share", value=goodput / np.maximum(genie, 1e-6), n=slots),
        keys.assign(metric="bler", value=1.0 - rollout.ack_NT.mean(axis=1), n=slots),
        keys.assign(metric="nack_bursts", value=bursts(~rollout.ack_NT, BURST) / (slots * SLOT_US * 1e-6), n=slots),
    ]
    settling = settling_slots(traces, rollout)
    jumped = np.isfinite(settling)
    parts.append(keys[jumped].assign(metric="settling_slots", value=settling[jumped], n=1))
    if calibrated and rollout.expected_NTC is not None:
        parts += _calibration_rows(keys, traces, rollout)
    return validate_table(pd.concat(parts, ignore_index=True).assign(model=model))


def goodput_bit_s_hz(rollout: Rollout) -> np.ndarray:
    """Mean goodput [N] of each trace."""
    return (EFFICIENCY[rollout.mcs_NT] * rollout.ack_NT).mean(axis=1)


def genie_bit_s_hz(traces: Traces) -> np.ndarray:
    """Highest expected goodput of each slot [N, T]."""
    return (EFFICIENCY * (1.0 - traces.bler_NTM.astype(np.float32))).max(axis=-1)


def expected_bit_s_hz(traces: Traces, rollout: Rollout) -> np.ndarray:
    """Expected goodput of the choices [N, T]: without the luck of the draw."""
    bler = np.take_along_axis(traces.bler_NTM, rollout.mcs_NT[..., None].astype(np.int64), axis=-1)[..., 0]
    return EFFICIENCY[rollout.mcs_NT] * (1.0 - bler.astype(np.float32))


def bursts(lost_NT: np.ndarray, length: int) -> np.ndarray:
    """Number [N] of runs of at least `length` losses."""
    run = lost_NT[:, length - 1 :].copy()
    for back in range(1, length):
        run &= lost_NT[:, length - 1 - back : lost_NT.shape[1] - back]
    # A run begins where the slot before the first full stretch was not the end of one.
    return run[:, 0].astype(int) + (run[:, 1:] & ~run[:, :-1]).sum(axis=1)


def settling_slots(traces: Traces, rollout: Rollout) -> np.ndarray:
    """Slots [N] after each trace's jump until it has settled, NaN without a jump, the slots that are left where it never does."""
    out = np.full(len(traces.step_slot_N), np.nan)
    jumped = np.flatnonzero(traces.step_slot_N >= 0)
    got, best = expected_bit_s_hz(traces, rollout)[jumped], genie_bit_s_hz(traces)[jumped]
    for row, (trace, mine, ideal) in enumerate(zip(jumped, got, best, strict=True)):
        after = slice(int(traces.step_slot_N[jumped[row]]), None)
        mine, ideal = mine[after], ideal[after]
        share = _running(mine) / np.maximum(_running(ideal), 1e-6)
        final = mine[REST:].sum() / max(float(ideal[REST:].sum()), 1e-6)
        settled = np.flatnonzero(share >= SETTLED * final)
        out[trace] = settled[0] if len(settled) else len(mine)
    return out


def _running(values: np.ndarray) -> np.ndarray:
    """Sum over each stretch of WINDOW values."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return total[WINDOW:] - total[:-WINDOW]


def cells(meta: Mapping[str, np.ndarray]) -> np.ndarray:
    """The cell of each trace [N] (str)."""
    doppler = np.array(DOPPLER_CLASSES)[np.searchsorted(DOPPLER_EDGES_HZ, meta["doppler_hz"])]
    rows = zip(meta["site"], meta["band_ghz"], doppler, strict=True)
    return np.array([format_cell(site=str(site), band=f"{ghz:g}GHz", doppler=str(kind)) for site, ghz, kind in rows], dtype=object)


def _calibration_rows(keys: pd.DataFrame, traces: Traces, rollout: Rollout) -> list[pd.DataFrame]:
    """Gap and confidence of each (trace, bin): sums over slots and neighbours of the choice."""
    assert rollout.expected_NTC is not None
    n, slots, close = rollout.expected_NTC.shape
    truth = around(traces.bler_NTM.reshape(n * slots, -1), rollout.mcs_NT.reshape(-1)).reshape(n, slots, close)
    said = np.isfinite(rollout.expected_NTC)
    confidence = rollout.expected_NTC[said].astype(np.float64)
    group = np.broadcast_to(np.arange(n)[:, None, None], said.shape)[said] * BINS + confidence_bin(confidence)
    count = np.bincount(group, minlength=n * BINS)
    full = np.flatnonzero(count)
    rows = keys.iloc[full // BINS].reset_index(drop=True).assign(n=count[full])
    parts = []
    for prefix, value in (("ece_bin", confidence - truth[said]), ("confidence_bin", confidence)):
        mean = np.bincount(group, value, n * BINS)[full] / count[full]
        parts.append(rows.assign(metric=[f"{prefix}_{b:02d}" for b in full % BINS], value=mean))
    return parts
