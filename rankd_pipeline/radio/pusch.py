"""One PUSCH slot of Sionna: what a user sends, what the receiver measures on the DMRS, and the chain down to the decoded block.

One user with one layer (TS 38.211 clause 6.4.1.1): DMRS type 1, one front-loaded and one additional symbol (mapping type A,
symbols 2 and 11), two CDM groups without data, so that the DMRS is sent 3 dB above data and the second CDM group stays
empty. That group is where a receiver sees noise alone.

Axis legend: B slots, A receive antennas, S DMRS symbols (2), P channel estimates of a DMRS symbol (3 a resource block), T OFDM
symbols (14), K subcarriers.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sionna.phy.channel import ApplyOFDMChannel
from sionna.phy.mimo import StreamManagement
from sionna.phy.nr import PUSCHConfig, PUSCHLSChannelEstimator, PUSCHTransmitter, TBDecoder
from sionna.phy.nr.layer_mapping import LayerDemapper
from sionna.phy.ofdm import LinearInterpolator, NearestNeighborInterpolator
from sionna.phy.ofdm.detection import LinearDetector

SYMBOLS = 14
DMRS_SYMBOLS = (2, 11)
PILOTS_A_BLOCK = 3  # per resource block and DMRS symbol, after two pilots of a CDM pair have become one estimate
# Two DMRS of power 2 are averaged, so an estimate has a quarter of a resource element's noise.
NOISE_OF_ESTIMATE = 0.25
Interpolation = Literal["nn", "lin", "lin_time_avg"]


@dataclass(frozen=True)
class Measured:
    """What the receiver knows after the DMRS: estimates complex64 [B, A, S, P] and the noise variance of one of them [B]."""

    ls: torch.Tensor
    noise_variance: torch.Tensor


def symbol_seconds(scs_khz: float) -> float:
    """Mean duration of an OFDM symbol with its cyclic prefix: 14 of them fill a slot (TS 38.211 clause 4.3.1)."""
    return 15e-3 / scs_khz / SYMBOLS


def pilot_positions(resource_blocks: int) -> np.ndarray:
    """Subcarrier [P] that each channel estimate stands for: the middle of its CDM pair (0, 2), (4, 6), …"""
    return 4.0 * np.arange(PILOTS_A_BLOCK * resource_blocks) + 1.0


class PuschSlot:
    """Transmitter and receiver of one allocation; `mcs_index` of TS 38.214 Table 5.1.3.1-1 matters for the data only."""

    def __init__(self, resource_blocks: int, scs_khz: float, mcs_index: int = 7) -> None:
        cfg = PUSCHConfig()
        cfg.carrier.n_size_grid = resource_blocks
        cfg.carrier.subcarrier_spacing = scs_khz
        cfg.dmrs.config_type, cfg.dmrs.length, cfg.dmrs.additional_position = 1, 1, 1
        cfg.dmrs.num_cdm_groups_without_data = 2
        cfg.tb.mcs_table, cfg.tb.mcs_index = 1, mcs_index
        self.subcarriers = 12 * resource_blocks
        self.pilots = PILOTS_A_BLOCK * resource_blocks
        self.transport_block_bits = int(cfg.tb_size)
        self._transmitter = PUSCHTransmitter(cfg)
        self._estimator = PUSCHLSChannelEstimator(self._transmitter.resource_grid, 1, 1, 2)
        self._channel = ApplyOFDMChannel()
        self._receiver: _Receiver | None = None

    def transmit(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random transport blocks: (resource grids complex64 [B, T, K] of mean power 1, bits [B, transport_block_bits])."""
        grid, bits = self._transmitter(slots)
        return grid[:, 0, 0], bits[:, 0]

    def receive(self, grid_BTK: torch.Tensor, channel_BATK: torch.Tensor, noise_B: torch.Tensor) -> torch.Tensor:
        """Received grids complex64 [B, A, T, K]; `noise_B` is the noise power of a resource element."""
        y = self._channel(grid_BTK[:, None, None], channel_BATK[:, None, :, None, None], noise_B)
        return y[:, 0]

    def measure(self, received_BATK: torch.Tensor) -> Measured:
        """Sionna's CDM-aware LS estimates, and the noise as measured on the empty CDM group of all antennas."""
        y = received_BATK[:, None]
        pilots = self._estimator._extract_pilots(y)
        ls, _ = self._estimator.estimate_at_pilot_locations(pilots, torch.ones(()))
        ls_BASK = ls[:, 0, :, 0, 0].unflatten(-1, (len(DMRS_SYMBOLS), self.subcarriers))
        # Both pilots of a CDM pair carry the same estimate: one of them is enough.
        empty = received_BATK[:, :, DMRS_SYMBOLS, 1::2]
        return Measured(ls_BASK[..., 0::4], NOISE_OF_ESTIMATE * empty.abs().square().mean((1, 2, 3)))

    def interpolate(self, ls_BASP: torch.Tensor, kind: Interpolation) -> torch.Tensor:
        """Sionna's interpolation of LS estimates over the grid: complex64 [B, A, T, K]."""
        pattern = self._transmitter.resource_grid.pilot_pattern
        interpolator = NearestNeighborInterpolator(pattern) if kind == "nn" else LinearInterpolator(pattern, kind == "lin_time_avg")
        spread = torch.zeros(*ls_BASP.shape[:-1], self.subcarriers, dtype=ls_BASP.dtype)
        spread[..., 0::4] = spread[..., 2::4] = ls_BASP
        spread = spread.flatten(-2)[:, None, :, None, None]
        return interpolator(spread, torch.zeros(spread.shape))[0][:, 0, :, 0, 0]

    def decode(
        self, received_BATK: torch.Tensor, estimate_BATK: torch.Tensor, error_variance_BATK: torch.Tensor, noise_B: torch.Tensor
    ) -> torch.Tensor:
        """LMMSE equalisation, demapping and LDPC decoding with these channel estimates; bits [B, transport_block_bits]."""
        if self._receiver is None:
            self._receiver = _Receiver(self._transmitter)
        return self._receiver(received_BATK, estimate_BATK, error_variance_BATK, noise_B)


class _Receiver:
    """What comes after the channel estimate. 12 iterations lose 0.1 dB against 20 and take two thirds of the time."""

    ITERATIONS = 12

    def __init__(self, transmitter: PUSCHTransmitter) -> None:
        bits = int(transmitter._num_bits_per_symbol)  # type: ignore[arg-type]
        streams = StreamManagement(np.ones([1, 1], bool), 1)
        self.detector = LinearDetector("lmmse", "bit", "maxlog", transmitter.resource_grid, streams, "qam", bits)
        self.demapper = LayerDemapper(transmitter._layer_mapper, num_bits_per_symbol=bits)
        self.decoder = TBDecoder(transmitter._tb_encoder, num_bp_iter=self.ITERATIONS)

    def __call__(self, y: torch.Tensor, h: torch.Tensor, variance: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        grid = (slice(None), None, slice(None), None, None)
        llr = self.detector(y[:, None], h[grid], variance[grid], noise)
        return self.decoder(self.demapper(llr))[0][:, 0]


def noise_power(snr_db: np.ndarray | float) -> np.ndarray:
    """Noise power of a resource element for a channel and data of mean power 1."""
    return np.asarray(10.0 ** (-np.asarray(snr_db, np.float64) / 10.0), np.float32)
