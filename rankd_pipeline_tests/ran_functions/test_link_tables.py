"""The MCS and CQI tables and the tabulated link-level truth, against Sionna's own."""

import json

import numpy as np
import pytest
import torch
from sionna.phy.nr.utils import decode_mcs_index
from sionna.sys import EESM, PHYAbstraction

from rankd_pipeline.ran_functions.link_adaptation import tables
from rankd_pipeline.ran_functions.link_adaptation.bler_extension import EXTENSION
from rankd_pipeline.ran_functions.link_adaptation.tables import (
    CQI_BLER,
    CQI_TABLE,
    CQI_TO_MCS,
    EFFICIENCY,
    MCS_TABLE,
    N_MCS,
    SINR_DB,
    effective_sinr_db,
    link_tables,
)

PRBS, SYMBOLS = (8, 24, 72), 12


@pytest.fixture(scope="module")
def links():
    return link_tables(PRBS, SYMBOLS)


def test_mcs_table_is_sionna_s():
    order, rate = decode_mcs_index(torch.arange(N_MCS), table_index=2, is_pusch=False)
    assert [int(x) for x in order] == [entry[0] for entry in MCS_TABLE]
    np.testing.assert_allclose(rate.numpy(), [entry[1] / 1024 for entry in MCS_TABLE], rtol=1e-6)
    assert (np.diff(EFFICIENCY) > 0).all()


def test_a_cqi_stands_for_the_mcs_of_its_modulation_and_code_rate():
    assert all(MCS_TABLE[CQI_TO_MCS[cqi]] == CQI_TABLE[cqi - 1] for cqi in range(2, 16))
    assert CQI_TO_MCS[0] == CQI_TO_MCS[1] == 0


def test_bler_is_that_of_the_phy_abstraction_which_takes_sinr_as_a_ratio(links):
    """On the grid, for MCS of the shipped table: dB here, linear there."""
    phy = PHYAbstraction(snr_db_interp_min_max_delta=(float(SINR_DB[0]), float(SINR_DB[-1]) + 0.05, 0.1), device="cpu")
    mcs = torch.arange(2, 26, dtype=torch.int32)
    for sinr_db in (-3.0, 4.3, 11.0, 18.7):
        sinr = torch.full((24,), 10 ** (sinr_db / 10))
        elements = torch.full((24,), PRBS[1] * 12 * SYMBOLS, dtype=torch.int32)
        *_, tbler, _ = phy(mcs, sinr_eff=sinr, num_allocated_re=elements, mcs_table_index=2, mcs_category=1)
        mine = links.bler(np.full(N_MCS, sinr_db, np.float32), 1)[2:26]
        # The running minimum takes out wiggles of the Monte Carlo table, nothing else.
        np.testing.assert_allclose(mine, tbler.numpy(), atol=2e-3)


def test_bler_falls_with_sinr_from_one_to_zero_for_every_mcs(links):
    assert np.isfinite(links.bler_AMS).all()
    assert (np.diff(links.bler_AMS, axis=-1) <= 0).all()
    # Sionna's MCS 26 ends at 25 dB with a last lost block in a thousand, which stays.
    assert (links.bler_AMS[..., 0] > 0.99).all() and (links.bler_AMS[..., -1] < 1e-2).all()


def test_bler_hardly_ever_falls_with_the_mcs(links):
    """Where it does, by less than a Monte Carlo table knows: the networks' monotone head is a fair model of it."""
    assert (links.bler_AMS[:, :-1] - links.bler_AMS[:, 1:]).max() < 0.01


def test_thresholds_rise_with_the_mcs_through_the_simulated_ends(links):
    """MCS 0, 1 and 27 come from the extension: they must continue what the shipped table begins, about 2 dB a step at most."""
    at = np.array([[tables._crossing_db(links.bler_AMS[a, m], 0.1) for m in range(N_MCS)] for a in range(len(PRBS))])
    steps = np.diff(at, axis=1)
    assert (steps > 0).all() and steps.max() < 2.7
    stored = json.loads(EXTENSION.read_text())["category"]["1"]["index"]["2"]["MCS"]
    assert sorted(stored, key=int) == ["0", "1", "27"]
    # Repeating a rate 1/5 code's bits: the curves of MCS 0 and 1 differ by the ratio of their rates alone.
    shift = np.array(stored["1"]["SNR_db"]) - np.array(stored["0"]["SNR_db"])
    np.testing.assert_allclose(shift, 10 * np.log10(193 / 120), atol=2e-3)


def test_a_cqi_s_threshold_keeps_its_promise(links):
    for cqi in range(2, 16):
        bler = links.bler(np.full(N_MCS, links.cqi_sinr_db_Q[cqi], np.float32), 1)[CQI_TO_MCS[cqi]]
        assert bler == pytest.approx(CQI_BLER, abs=2e-3)
    assert (np.diff(links.cqi_sinr_db_Q) > 0).all()


def test_effective_sinr_is_sionna_s_eesm(links):
    rng = np.random.default_rng(0)
    sinr = (10 ** rng.uniform(-1.5, 3.5, (20, 12))).astype(np.float64)
    eesm, mine = EESM(device="cpu"), effective_sinr_db(sinr, links.beta_M)
    for mcs in (0, 4, 12, 27):
        # [..., symbols, subcarriers, users, streams]
        found = eesm(torch.from_numpy(sinr).float()[:, None, :, None, None], torch.full((20, 1), mcs, dtype=torch.int32), 2)
        np.testing.assert_allclose(mine[:, mcs], 10 * np.log10(found.numpy()[:, 0]), atol=2e-2)


def test_effective_sinr_of_a_strong_link_does_not_underflow(links):
    """Sionna's sum of exponentials is zero in float32 beyond some 20 dB for a small beta; the truth lies at the weakest entry."""
    strong = np.array([[1e3, 1.2e3, 2e3]])
    found = 10 ** (effective_sinr_db(strong, links.beta_M) / 10)
    assert np.isfinite(found).all() and (found >= 999).all() and (found <= 1001).all()


def test_flat_channel_is_its_own_effective_sinr_and_clips_at_30_db(links):
    for level_db in (-20.0, 7.0, 29.0, 40.0):
        found = effective_sinr_db(np.full((1, 12), 10 ** (level_db / 10)), links.beta_M)
        np.testing.assert_allclose(found, min(level_db, 30.0), atol=1e-3)


def test_bler_at_takes_each_row_s_allocation(links):
    sinr, allocation = np.array([5.0, 5.0, 14.0], np.float32), np.array([0, 2, 1])
    found = links.bler_at(sinr, allocation)
    for row in range(3):
        np.testing.assert_allclose(found[row], links.bler(np.full(N_MCS, sinr[row], np.float32), allocation[row]), rtol=1e-6)
    assert links.allocation_index(np.array([7, 30, 273])).tolist() == [0, 1, 2]
