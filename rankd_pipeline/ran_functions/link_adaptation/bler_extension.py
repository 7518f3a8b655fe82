"""Simulates what Sionna's PDSCH BLER tables lack, once: `python -m rankd_pipeline.ran_functions.link_adaptation.bler_extension`.

The tables that Sionna 2.2 ships for MCS table 2 (TS 38.214 Table 5.1.3.1-2) end at 25 dB, where MCS 27 still has a BLER
of 0.15, and lack MCS 0 and 1. Here Sionna's own coded AWGN link (LDPC encoder, QAM mapper, 20 iterations of belief
propagation) fills these three in; the result is committed beside this module. MCS 0 and 1 have code rates below 1/5, the
lowest mother code (TS 38.212 clause 5.3.2), and repeat its bits: their curve is that of rate 1/5, moved by the energy
that repetition adds. Some ten minutes on one core; seeded.
"""

import json
import math
from pathlib import Path

import numpy as np

EXTENSION = Path(__file__).with_name("bler_extension.json")
CATEGORY, TABLE = 1, 2  # PDSCH, MCS table 2 (256QAM)
SEED = 5
STEP_DB = 0.75
BLOCKS = {100: 1000, 500: 500, 2000: 200}  # code block size in bits -> simulated blocks a point
MOTHER_RATE = 0.2
REPEATED = {0: 120 / 1024, 1: 193 / 1024}  # MCS -> code rate
QPSK_RANGE_DB, TOP_RANGE_DB = (-7.0, 0.5), (22.0, 29.5)
TOP_MCS, TOP_BITS, TOP_RATE = 27, 8, 948 / 1024


def simulate() -> dict:
    """The missing part of the table, in the layout of Sionna's own BLER tables."""
    mother = _curves(2, MOTHER_RATE, *QPSK_RANGE_DB)
    entries = {}
    for mcs, rate in REPEATED.items():
        gain_db = 10 * math.log10(MOTHER_RATE / rate)
        entries[str(mcs)] = {**mother, "SNR_db": [round(x - gain_db, 3) for x in mother["SNR_db"]]}
    entries[str(TOP_MCS)] = _curves(TOP_BITS, TOP_RATE, *TOP_RANGE_DB)
    return {"category": {str(CATEGORY): {"index": {str(TABLE): {"MCS": entries}}}}}


def _curves(bits_per_symbol: int, rate: float, first_db: float, last_db: float) -> dict:
    """BLER over SNR of one modulation and code rate, for each code block size.

    A longer block falls from 1 to 0 within the fall of a shorter one, so what is 1 for the shorter is taken as 1.
    """
    import torch
    from sionna.phy.nr.utils import CodedAWGNChannelNR
    from sionna.phy.utils import sim_ber

    snr_db = np.arange(first_db, last_db + 1e-6, STEP_DB)
    ebno_db = snr_db - 10 * math.log10(bits_per_symbol * rate)
    by_size, start = {}, 0
    for size, blocks in BLOCKS.items():
        link = CodedAWGNChannelNR(bits_per_symbol, size, rate)
        _, simulated = sim_ber(
            link, torch.from_numpy(ebno_db[start:]), 100, blocks // 100, soft_estimates=False, early_stop=True, verbose=False
        )
        bler = np.concatenate([np.ones(start), np.asarray(simulated)])
        start = int(np.flatnonzero(bler < 0.99)[0])
        by_size[str(size)] = {"BLER": [round(float(x), 4) for x in bler]}
        print(bits_per_symbol, rate, size, by_size[str(size)]["BLER"], flush=True)
    return {"SNR_db": [round(float(x), 3) for x in snr_db], "CBS": by_size}


if __name__ == "__main__":
    import torch
    from sionna.phy import config

    torch.set_num_threads(1)
    config.seed = SEED
    EXTENSION.write_text(json.dumps(simulate(), indent=1) + "\n")
