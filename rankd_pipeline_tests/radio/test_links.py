"""Channels come with the statistics that they were drawn from: whitened by these, they are white."""

import numpy as np
import pytest
import torch

from rankd_pipeline.radio.links import LAGS, Grid, Links, Sector, Statistics, cdl, padded, sector, tdl
from rankd_pipeline.radio.seeding import seeded

GRID = Grid(3.5, 30, 48, 4)
SUBCARRIERS, SYMBOLS = np.array([0, 11, 23, 35, 47]), np.array([2, 6, 11])
NOISE = 1e-2


def whiteness(links: Links, grid: Grid = GRID) -> float:
    """Mean of y^H C^-1 y over its degrees of freedom, for points of the grid in noise: 1 if C is their covariance."""
    lags = SYMBOLS[:, None] - SYMBOLS
    turns = links.statistics.correlation[:, :, np.abs(lags)]
    turns = np.where(lags >= 0, turns, turns.conj())
    phase = np.exp(-2j * np.pi * grid.scs_khz * 1e3 * links.statistics.delay_s[:, :, None] * SUBCARRIERS)
    covariance = np.einsum("bl,blts,blf,blg->btfsg", links.statistics.power, turns, phase, phase.conj(), optimize=True)
    size = len(SYMBOLS) * len(SUBCARRIERS)
    covariance = covariance.reshape(-1, size, size) + NOISE * np.eye(size)
    points = links.channel.numpy()[:, :, SYMBOLS][..., SUBCARRIERS].reshape(len(covariance), -1, size)
    rng = np.random.default_rng(0)
    points = points + np.sqrt(NOISE / 2) * (rng.normal(size=points.shape) + 1j * rng.normal(size=points.shape))
    whitened = np.linalg.solve(covariance, points.transpose(0, 2, 1))
    return float(np.einsum("ban,bna->", points.conj(), whitened).real / points.size)


def users(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return np.exp(rng.uniform(np.log(30), np.log(300), count)), rng.uniform(3, 120, count)


@pytest.mark.parametrize("letter", ["A", "C", "D"])
def test_tapped_delay_lines(letter):
    spread, speed = users(40)
    with seeded(1):
        links = tdl(letter, GRID, 4, spread, speed)
    assert links.channel.shape == (160, 4, 14, 48)
    assert whiteness(links) == pytest.approx(1.0, abs=0.04)
    assert np.array_equal(links.speed_kmh, np.repeat(speed, 4)) and np.allclose(links.statistics.power.sum(1), 1.0)
    mean = (links.statistics.power * links.statistics.delay_s).sum(1)
    rms = np.sqrt((links.statistics.power * links.statistics.delay_s**2).sum(1) - mean**2) * 1e9
    assert np.allclose(rms, links.delay_spread_ns, rtol=0.02)


@pytest.mark.parametrize("letter", ["B", "E"])
def test_clustered_delay_lines(letter):
    spread, speed = users(40)
    with seeded(2):
        links = cdl(letter, GRID, 4, spread, speed, np.random.default_rng(2))
    assert whiteness(links) == pytest.approx(1.0, abs=0.04)
    assert np.allclose(links.statistics.power.sum(1), 1.0, atol=1e-5)


@pytest.mark.parametrize("scenario", ["UMi", "UMa"])
def test_users_of_a_sector(scenario):
    place = Sector(scenario, None, None, 0.3, (50.0, 200.0), (30.0, 120.0))
    with seeded(3):
        links = sector(place, GRID, 40, 3, np.random.default_rng(3))
    assert links.channel.shape == (120, 4, 14, 48) and len(links.delay_spread_ns) == 120
    assert links.delay_spread_ns.min() >= 50.0 and links.delay_spread_ns.max() <= 200.0
    assert whiteness(links) == pytest.approx(1.0, abs=0.06)
    assert set(links.speed_kmh[links.speed_kmh < 30.0]) == {3.0}, "who is indoors walks"
    # Slots of a user share its large-scale parameters, not its rays.
    assert len(np.unique(links.delay_spread_ns)) == 40
    assert not np.allclose(links.statistics.delay_s[0], links.statistics.delay_s[1])


def test_a_wrong_doppler_is_not_white():
    spread, _ = users(40)
    with seeded(4):
        fast = tdl("A", GRID, 2, spread, np.full(40, 120.0))
        slow = tdl("A", GRID, 2, spread, np.full(40, 3.0))
    assert whiteness(Links(fast.channel, slow.statistics, fast.delay_spread_ns, fast.speed_kmh)) > 1.3


def test_the_same_seed_gives_the_same_channels():
    def draw(seed: int) -> torch.Tensor:
        with seeded(seed):
            return cdl("C", GRID, 1, *users(5), np.random.default_rng(seed)).channel

    assert torch.equal(draw(5), draw(5)) and not torch.equal(draw(5), draw(6))


def test_padding_adds_paths_without_power():
    statistics = Statistics(np.full((2, 3), 1 / 3), np.ones((2, 3)), np.ones((2, 3, LAGS), np.complex64))
    wide = padded(statistics, 5)
    assert wide.power.shape == (2, 5) and np.allclose(wide.power.sum(1), 1.0) and wide.correlation.shape == (2, 5, LAGS)
    with pytest.raises(ValueError, match="5 paths do not fit into 4"):
        padded(wide, 4)
