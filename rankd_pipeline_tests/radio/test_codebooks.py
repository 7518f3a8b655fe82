"""Codebooks: they address the elements in Sionna's order, radiate equal power, and wide beams point where narrow ones do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sionna.phy import config as sionna_config
from sionna.phy.channel.tr38901 import PanelArray, UMi
from sionna.phy.mimo.precoding import grid_of_beams_dft

from rankd_pipeline.radio.codebooks import dft_codebook, parent_beams, steered_beams, wide_beams

ROWS, COLS = 4, 16
SIZES = st.sampled_from([(1, 8), (2, 8), (4, 4), (4, 16), (3, 6), (8, 8)])


@pytest.fixture(scope="module")
def los_channels() -> np.ndarray:
    """[n, A] strongest (LoS) path of 300 outdoor users at a real PanelArray, straight out of Sionna, seen from 10 m."""
    drops, users = 50, 6
    rng = np.random.default_rng(5)
    radius, azimuth = rng.uniform(20, 120, (drops, users)), np.radians(rng.uniform(-60, 60, (drops, users)))
    place = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), np.full_like(radius, 1.5)], -1)
    sionna_config.seed = 11
    panel = PanelArray(ROWS, COLS, "single", "V", "38.901", 28e9, element_vertical_spacing=0.5, element_horizontal_spacing=0.5)
    model = UMi(28e9, "low", PanelArray(1, 1, "single", "V", "omni", 28e9), panel, "downlink")
    none = torch.zeros(drops, users, 3)
    model.set_topology(
        torch.tensor(place, dtype=torch.float32), torch.tensor([0.0, 0.0, 10.0]).expand(drops, 1, 3), none, none[:, :1],
        none, torch.zeros(drops, users, dtype=torch.bool), los=True,
    )  # fmt: skip
    paths, _ = model(1, 1.0)  # [D, U, 1, 1, A, P, 1]
    paths = paths[:, :, 0, 0, :, :, 0].flatten(0, 1)
    strongest = paths.abs().square().sum(1).argmax(-1)
    return paths[torch.arange(len(paths)), :, strongest].numpy()


def best_gain_db(channels: np.ndarray, codebook: np.ndarray) -> float:
    """Median over users of the best beam's power against that of one element."""
    power = np.abs(channels @ codebook.T) ** 2
    return float(np.median(10 * np.log10(power.max(1) / (np.abs(channels) ** 2).mean(1))))


def test_antenna_order_trap(los_channels):
    """A codebook flattened the other way addresses wrong elements: no error, but dB lost (design facts, section 1)."""
    ours = dft_codebook(ROWS, COLS)
    row_first = ours.reshape(-1, COLS, ROWS).transpose(0, 2, 1).reshape(len(ours), -1)
    right, wrong = best_gain_db(los_channels, ours), best_gain_db(los_channels, row_first)
    limit = 10 * np.log10(ROWS * COLS)
    # A DFT grid without oversampling loses 0 dB on a grid point and 3.9 dB a dimension half-way between two.
    assert limit - 4.0 < right <= limit
    assert right - wrong > 1.5
    # Sionna's own codebook (same order) reaches the same.
    grid = grid_of_beams_dft(ROWS, COLS).reshape(-1, ROWS * COLS).numpy()
    assert best_gain_db(los_channels, grid) == pytest.approx(right, abs=0.3)


@given(SIZES)
def test_every_beam_of_both_sets_radiates_the_same_power(size):
    rows, cols = size
    sub = (rows // 2 if rows % 2 == 0 else rows, cols // 2)
    for beams in (dft_codebook(rows, cols), wide_beams(rows, cols, *sub), parent_beams(rows, cols, 1, cols // 2)[0]):
        assert beams.dtype == np.complex64 and beams.shape[1] == rows * cols
        assert np.allclose((np.abs(beams) ** 2).sum(1), 1, atol=1e-6)


@given(SIZES)
def test_set_a_is_a_unitary_basis(size):
    beams = dft_codebook(*size)
    assert np.allclose(beams @ beams.conj().T, np.eye(len(beams)), atol=1e-5)


def plane_wave(rows: int, cols: int, v: np.ndarray, h: np.ndarray) -> np.ndarray:
    """[n, A] responses, column first, of plane waves with spatial frequencies v and h in cycles per element."""
    phase = v[:, None, None] * np.arange(rows)[None, None, :] + h[:, None, None] * np.arange(cols)[None, :, None]
    return np.exp(2j * np.pi * phase).reshape(len(v), -1)


def test_wide_beams_point_where_narrow_ones_do_and_are_wider():
    """Peak of wide beam (k_v, k_h) = direction of narrow beam (2 k_v, 2 k_h); its main lobe is twice as wide."""
    wide, narrow = wide_beams(ROWS, COLS, 2, 8), dft_codebook(ROWS, COLS)
    grid_v, grid_h = (x.ravel() for x in np.meshgrid(np.arange(32) / 32, np.arange(128) / 128, indexing="ij"))
    waves = plane_wave(ROWS, COLS, grid_v, grid_h)
    for beams, peak_power in ((wide, 16), (narrow, 64)):
        assert np.allclose((np.abs(waves @ beams.T) ** 2).max(0), peak_power, rtol=1e-4)
    peak_wide = (np.abs(waves @ wide.T) ** 2).argmax(0)
    peak_narrow = (np.abs(waves @ narrow.T) ** 2).argmax(0).reshape(4, 16)
    assert np.array_equal(peak_wide, peak_narrow[::2, ::2].ravel())
    # Half-power width along azimuth: the 8-column beam covers two 16-column ones.
    along = plane_wave(ROWS, COLS, np.zeros(512), np.arange(512) / 512 - 0.5)
    width = [(np.abs(along @ b[0]) ** 2 > 0.5 * np.abs(along @ b[0]).max() ** 2).mean() for b in (wide, narrow)]
    assert width[0] / width[1] == pytest.approx(2, rel=0.1)


def test_a_narrow_beam_gains_on_a_wide_one_exactly_what_its_array_is_larger():
    wave = plane_wave(ROWS, COLS, np.array([0.25 * 2]), np.array([0.125 * 3]))
    gain = [10 * np.log10((np.abs(wave @ b.T) ** 2).max()) for b in (dft_codebook(ROWS, COLS), wide_beams(ROWS, COLS, 2, 8))]
    assert gain[0] - gain[1] == pytest.approx(10 * np.log10(4), abs=0.01)


@pytest.mark.parametrize("division", [(1, 1), (1, 8), (2, 4), (4, 16), (2, 16)])
def test_parents_partition_set_a_and_cover_their_children(division):
    parents, children = parent_beams(ROWS, COLS, *division)
    assert len(parents) == division[0] * division[1]
    assert np.array_equal(np.sort(children.ravel()), np.arange(ROWS * COLS))
    # A wave from a child's direction is at least as strong in its own parent as in any other.
    v, h = np.divmod(children, COLS)
    power = np.abs(plane_wave(ROWS, COLS, v.ravel() / ROWS, h.ravel() / COLS) @ parents.T) ** 2
    own = np.repeat(np.arange(len(parents)), children.shape[1])
    assert np.all(power[np.arange(len(own)), own] >= power.max(1) * (1 - 1e-4))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        steered_beams(2, 2, 4, 2, np.zeros(1), np.zeros(1))
    with pytest.raises(ValueError, match="do not divide"):
        parent_beams(4, 16, 3, 4)
