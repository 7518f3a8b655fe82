"""MCS and CQI tables, and the link-level truth: BLER over MCS and SINR from Sionna's PHY abstraction, tabulated once.

Axis legend: A allocations, M MCS indices, S grid of the effective SINR, F frequencies, Q CQI indices; ... any leading axes.
"""

import math
import os
from dataclasses import dataclass
from functools import cache

import numpy as np

from rankd_pipeline.ran_functions.link_adaptation.bler_extension import CATEGORY, EXTENSION, TABLE

# (modulation order, code rate x 1024) of PDSCH MCS table 2, TS 38.214 Table 5.1.3.1-2; a test compares Sionna's.
MCS_TABLE = (
    (2, 120), (2, 193), (2, 308), (2, 449), (2, 602), (4, 378), (4, 434), (4, 490), (4, 553), (4, 616), (4, 658), (6, 466),
    (6, 517), (6, 567), (6, 616), (6, 666), (6, 719), (6, 772), (6, 822), (6, 873), (8, 682.5), (8, 711), (8, 754), (8, 797),
    (8, 841), (8, 885), (8, 916.5), (8, 948),
)  # fmt: skip
# CQI 1 to 15 of CQI table 2, TS 38.214 Table 5.2.2.1-3; CQI 0 means out of range.
CQI_TABLE = (
    (2, 78), (2, 193), (2, 449), (4, 378), (4, 490), (4, 616), (6, 466), (6, 567), (6, 666), (6, 772), (6, 873), (8, 711),
    (8, 797), (8, 885), (8, 948),
)  # fmt: skip
N_MCS, N_CQI = len(MCS_TABLE), len(CQI_TABLE) + 1
EFFICIENCY = np.array([order * rate / 1024 for order, rate in MCS_TABLE], np.float32)
"""Information bits a resource element carries [M]."""
CQI_BLER = 0.1  # TS 38.214 clause 5.2.2.1: the error probability that a CQI promises not to exceed
# The MCS of like modulation and code rate; CQI 1 lies below MCS 0, CQI 0 promises nothing: the most robust MCS for both.
CQI_TO_MCS = np.array([0, 0, *(MCS_TABLE.index(entry) for entry in CQI_TABLE[1:])], np.int64)
SINR_DB = np.arange(-14.0, 32.0 + 1e-9, 0.1)
SINR_LIMITS_DB = (-30.0, 30.0)  # what Sionna's EESM clips to


@dataclass(frozen=True)
class LinkTables:
    """bler_AMS over SINR_DB, beta_M of the EESM, cqi_sinr_db_Q: the effective SINR where each CQI meets its promise.

    CQI 0 stands 3 dB below CQI 1.
    """

    allocations_prb: tuple[int, ...]
    bler_AMS: np.ndarray
    beta_M: np.ndarray
    cqi_sinr_db_Q: np.ndarray

    def bler(self, sinr_eff_db: np.ndarray, allocation: int) -> np.ndarray:
        """BLER [..., M] of a transport block on `allocation` (an index), from its effective SINR in dB under each MCS [..., M]."""
        return _interpolated(self.bler_AMS[allocation], sinr_eff_db)

    def bler_at(self, sinr_db: np.ndarray, allocation: np.ndarray) -> np.ndarray:
        """BLER [n, M] of every MCS at one SINR a row [n] (dB) on the row's allocation (index [n])."""
        wide = np.broadcast_to(sinr_db[:, None], (len(sinr_db), N_MCS))
        out = np.empty(wide.shape, np.float32)
        for index in np.unique(allocation):
            rows = allocation == index
            out[rows] = _interpolated(self.bler_AMS[index], wide[rows])
        return out

    def allocation_index(self, prb: np.ndarray) -> np.ndarray:
        """Index of the tabulated allocation nearest to each number of PRBs (in ratio)."""
        ratio = np.log(np.asarray(prb, np.float64)[..., None] / np.array(self.allocations_prb, np.float64))
        return np.abs(ratio).argmin(axis=-1)


def effective_sinr_db(sinr: np.ndarray, beta_M: np.ndarray) -> np.ndarray:
    """Exponential effective SINR in dB [..., M] of linear SINRs [..., F] for each MCS' beta, clipped as Sionna clips it."""
    low, high = (10 ** (limit / 10) for limit in SINR_LIMITS_DB)
    lowest = sinr.min(axis=-1, keepdims=True)
    excess = sinr - lowest  # taken out of the exponent, which would underflow for strong links
    out = np.empty((*sinr.shape[:-1], len(beta_M)), np.float32)
    for m, beta in enumerate(beta_M):
        mean = np.exp(excess * (-1.0 / beta)).mean(axis=-1)
        out[..., m] = lowest[..., 0] - beta * np.log(mean)
    return (10.0 * np.log10(np.clip(out, low, high))).astype(np.float32)


@cache
def link_tables(allocations_prb: tuple[int, ...], symbols: int) -> LinkTables:
    """Tabulate Sionna's `PHYAbstraction` for PDSCH blocks of these PRBs and OFDM symbols."""
    import sionna.sys
    import torch
    from sionna.sys import EESM, PHYAbstraction

    builtin = os.path.join(os.path.dirname(sionna.sys.__file__), "bler_tables", f"PDSCH_table{TABLE}.json")
    step = float(SINR_DB[1] - SINR_DB[0])
    # Half a step beyond the end: Sionna's grid excludes its upper limit.
    phy = PHYAbstraction(
        load_bler_tables_from=[builtin, str(EXTENSION)],
        snr_db_interp_min_max_delta=(float(SINR_DB[0]), float(SINR_DB[-1]) + step / 2, step),
        device="cpu",
    )
    # Sionna takes the effective SINR as a linear ratio.
    sinr = torch.from_numpy(10 ** (SINR_DB / 10)).float()[:, None].expand(-1, N_MCS).contiguous()
    mcs = torch.arange(N_MCS, dtype=torch.int32).expand(len(SINR_DB), N_MCS)
    tables = []
    for prb in allocations_prb:
        elements = torch.full(mcs.shape, prb * 12 * symbols, dtype=torch.int32)
        *_, tbler, _ = phy(mcs, sinr_eff=sinr, num_allocated_re=elements, mcs_table_index=TABLE, mcs_category=CATEGORY)
        tables.append(tbler.numpy().T)
    bler_AMS = np.minimum.accumulate(np.stack(tables).astype(np.float32), axis=-1)  # the few wiggles of a Monte Carlo table
    beta = EESM(device="cpu").beta_tensor[TABLE - 1, :N_MCS].numpy().astype(np.float64)
    return LinkTables(allocations_prb, bler_AMS, beta, _cqi_thresholds_db(bler_AMS[len(allocations_prb) // 2]))


def _cqi_thresholds_db(bler_MS: np.ndarray) -> np.ndarray:
    """SINR [Q] at which each CQI's modulation and code rate has a BLER of CQI_BLER."""
    thresholds = np.array([_crossing_db(bler_MS[m], CQI_BLER) for m in CQI_TO_MCS])
    # CQI 1 repeats the bits of the same mother code more often than MCS 0 does.
    thresholds[1] -= 10 * math.log10(MCS_TABLE[0][1] / CQI_TABLE[0][1])
    thresholds[0] = thresholds[1] - 3.0
    return thresholds.astype(np.float32)


def _crossing_db(bler_S: np.ndarray, level: float) -> float:
    """Where a falling BLER curve crosses `level`, between grid points."""
    at = int(np.argmax(bler_S <= level))
    above, below = float(bler_S[at - 1]), float(bler_S[at])
    return float(SINR_DB[at - 1] + (SINR_DB[at] - SINR_DB[at - 1]) * (above - level) / (above - below))


def _interpolated(bler_MS: np.ndarray, sinr_db: np.ndarray) -> np.ndarray:
    """bler_MS at sinr_db [..., M], linear between grid points, constant beyond the ends."""
    position = np.clip((sinr_db - SINR_DB[0]) * (1.0 / (SINR_DB[1] - SINR_DB[0])), 0, len(SINR_DB) - 1.0001).astype(np.float32)
    at = position.astype(np.int32)
    flat = bler_MS.ravel()
    index = at + np.arange(N_MCS, dtype=np.int32) * bler_MS.shape[1]
    left = flat[index]
    return left + (position - at) * (flat[index + 1] - left)
