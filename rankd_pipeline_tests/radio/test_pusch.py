"""The PUSCH slot: what it measures is Sionna's own estimate, and what it decodes is what was sent."""

import numpy as np
import pytest
import torch
from sionna.phy.nr import PUSCHLSChannelEstimator

from rankd_pipeline.radio.pusch import (
    DMRS_SYMBOLS,
    SYMBOLS,
    PuschSlot,
    noise_power,
    pilot_positions,
    symbol_seconds,
)
from rankd_pipeline.radio.seeding import seeded
from rankd_pipeline.radio.waves import max_doppler_hz

SLOT = PuschSlot(4, 30)


def fading(slots: int, antennas: int, seed: int = 0) -> torch.Tensor:
    """Smooth random channels [B, A, T, K]: three paths each, static over the slot."""
    rng = np.random.default_rng(seed)
    gain = (rng.normal(size=(slots, antennas, 3)) + 1j * rng.normal(size=(slots, antennas, 3))) / np.sqrt(6)
    turns = np.exp(-2j * np.pi * 30e3 * np.array([0.0, 100e-9, 300e-9])[:, None] * np.arange(48))
    return torch.from_numpy((gain @ turns)[:, :, None].repeat(SYMBOLS, 2).astype(np.complex64))


def test_pilots_are_where_the_standard_puts_them():
    assert SLOT.pilots == 12 and SLOT.subcarriers == 48 and DMRS_SYMBOLS == (2, 11)
    assert pilot_positions(4).tolist() == [4 * i + 1.0 for i in range(12)]
    assert symbol_seconds(30) == pytest.approx(0.5e-3 / 14)
    assert max_doppler_hz(120.0, 3.5) == pytest.approx(389.2, abs=0.1)


def test_without_noise_a_flat_channel_is_measured_exactly():
    with seeded(1):
        sent, _ = SLOT.transmit(3)
        channel = torch.full((3, 2, SYMBOLS, 48), 0.6 - 0.8j)
        measured = SLOT.measure(SLOT.receive(sent, channel, torch.full((3,), 1e-12)))
    assert torch.allclose(measured.ls, torch.full_like(measured.ls, 0.6 - 0.8j), atol=1e-4)
    assert float(measured.noise_variance.max()) < 1e-11


def test_the_noise_of_an_estimate_is_what_the_empty_pilots_say():
    with seeded(2):
        sent, _ = SLOT.transmit(400)
        channel, noise = torch.ones(400, 2, SYMBOLS, 48, dtype=torch.complex64), torch.from_numpy(noise_power(np.full(400, 3.0)))
        measured = SLOT.measure(SLOT.receive(sent, channel, noise))
    really = (measured.ls - 1.0).abs().square().mean()
    assert float(measured.noise_variance.mean()) == pytest.approx(float(really), rel=0.03)
    assert float(really) == pytest.approx(10 ** (-0.3) / 4, rel=0.03)


@pytest.mark.parametrize("kind", ["nn", "lin", "lin_time_avg"])
def test_interpolation_is_that_of_sionnas_estimator_on_the_received_grid(kind):
    channel, noise = fading(5, 2), torch.full((5,), 0.05)
    with seeded(3):
        sent, _ = SLOT.transmit(5)
        received = SLOT.receive(sent, channel, noise)
    whole = PUSCHLSChannelEstimator(SLOT._transmitter.resource_grid, 1, 1, 2, interpolation_type=kind)
    expected, _ = whole(received[:, None], noise)
    assert torch.allclose(SLOT.interpolate(SLOT.measure(received).ls, kind), expected[:, 0, :, 0, 0], atol=1e-5)


def test_receive_is_channel_times_grid_plus_noise():
    channel = fading(4, 3)
    with seeded(4):
        sent, _ = SLOT.transmit(4)
        assert torch.allclose(SLOT.receive(sent, channel, torch.zeros(4)), channel * sent[:, None], atol=1e-5)


def test_blocks_are_decoded_with_the_channel_and_lost_without():
    channel, noise = fading(8, 2), torch.from_numpy(noise_power(np.full(8, 15.0)))
    with seeded(5):
        sent, bits = SLOT.transmit(8)
        received = SLOT.receive(sent, channel, noise)
    variance = torch.full(channel.shape, 1e-3)
    assert bits.shape == (8, SLOT.transport_block_bits)
    assert torch.equal(SLOT.decode(received, channel, variance, noise), bits)
    wrong = SLOT.decode(received, -channel, variance, noise)
    assert bool((wrong != bits).any(1).all())
