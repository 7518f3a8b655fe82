"""Blocks lost by each channel estimate: test channels again, at chosen SNRs, through Sionna's equaliser and LDPC decoder.

The same channels, payloads and noise for every model and, but for its strength, at every SNR, so that curves differ by the
estimates alone. The equaliser gets each model's own error variance and the noise that the receiver has measured.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field

from rankd_pipeline.distillation.heads import GAUSSIAN_90
from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.table import format_cell, validate_table
from rankd_pipeline.radio.pusch import NOISE_OF_ESTIMATE, PuschSlot, noise_power
from rankd_pipeline.radio.seeding import seeded
from rankd_pipeline.ran_functions.channel_estimation.config import ChannelCorpusConfig
from rankd_pipeline.ran_functions.channel_estimation.simulate import real
from rankd_pipeline.ran_functions.contract import Arrays, Predictor


class DecodingConfig(BaseModel):
    """Which blocks are sent. mcs_index: of TS 38.214 Table 5.1.3.1-1 (7: QPSK, rate 0.51)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slots: int = Field(default=400, ge=1)
    antennas: int = Field(default=2, ge=1, description="the first of a slot; slots with fewer are passed over")
    mcs_index: int = Field(default=7, ge=0, le=27)
    snr_db: tuple[float, ...] = Field(default=(-2.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0), min_length=2)
    batch: int = Field(default=64, ge=1)


def block_errors(
    models: Mapping[str, Predictor], features: Arrays, truth: Arrays, split: str, cfg: ChannelCorpusConfig,
    sent: DecodingConfig, seed: int, on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> pd.DataFrame:  # fmt: skip
    """The long table of `block_error`: a row a model, drop and SNR. :raises RankdError: no slot has enough antennas."""
    rows = _slots(features, truth, sent)
    slot = PuschSlot(cfg.resource_blocks, cfg.scs_khz, sent.mcs_index)
    channel = torch.from_numpy(_complex(np.asarray(truth["channel"], np.float32)[rows]))
    drop = np.asarray(features["drop_id"])[rows[:, 0]]
    parts = []
    for number, snr_db in enumerate(sent.snr_db):
        seen, received, noise, bits = _received(slot, channel, features, rows, snr_db, seed)
        for model, predict in models.items():
            lost = _lost(slot, predict(seen), received, noise, bits, sent.batch)
            on_progress(number * len(models) + len(parts) % len(models) + 1, len(sent.snr_db) * len(models))
            parts.append(pd.DataFrame({"model": model, "unit": drop, "cell": format_cell(snr_db=f"{snr_db:g}"), "value": lost}))
    table = pd.concat(parts, ignore_index=True).groupby(["model", "cell", "unit"], sort=False)["value"]
    return validate_table(table.agg(value="mean", n="size").reset_index().assign(split=split, metric="block_error"))


def _slots(features: Arrays, truth: Arrays, sent: DecodingConfig) -> np.ndarray:
    """Rows [slots, antennas] of the slots that are sent again, spread evenly over the split."""
    slot, antenna = np.asarray(truth["slot_id"]), np.asarray(truth["antenna"])
    order = np.lexsort((antenna, slot))
    order = order[antenna[order] < sent.antennas]
    ids, first, count = np.unique(slot[order], return_index=True, return_counts=True)
    first = first[count == sent.antennas]
    if not len(first):
        raise RankdError(f"block errors: no slot of the test split has {sent.antennas} antennas; lower end_metric.antennas.")
    chosen = first[np.unique(np.linspace(0, len(first) - 1, min(sent.slots, len(first))).astype(int))]
    return order[chosen[:, None] + np.arange(sent.antennas)]


def _received(slot: PuschSlot, channel_BATK: torch.Tensor, features: Arrays, rows: np.ndarray, snr_db: float, seed: int):
    """One SNR: (features as the models see them, one row an antenna; received grids; measured noise; bits)."""
    count, antennas = rows.shape
    with seeded(seed):
        grid, bits = slot.transmit(count)
        received = slot.receive(grid, channel_BATK, torch.from_numpy(noise_power(np.full(count, snr_db))))
        measured = slot.measure(received)
    flat = rows.reshape(-1)
    seen = {name: np.asarray(values)[flat] for name, values in features.items()}
    seen["ls"] = real(measured.ls.flatten(0, 1).numpy()).astype(np.float32)
    seen["noise_variance"] = np.repeat(measured.noise_variance.numpy(), antennas)
    seen["snr_db"] = np.full(len(flat), snr_db, np.float32)
    return seen, received, measured.noise_variance / NOISE_OF_ESTIMATE, bits


def _lost(
    slot: PuschSlot, predicted: np.ndarray, received: torch.Tensor, noise: torch.Tensor, bits: torch.Tensor, batch: int
) -> np.ndarray:
    """Whether each block [slots] is lost with these estimates."""
    shape = received.shape
    estimate = torch.from_numpy(_complex(predicted[:, 0])).reshape(shape)
    half = np.mean(predicted[:, 1] ** 2, axis=1)
    variance = torch.from_numpy((2.0 * half / GAUSSIAN_90**2).astype(np.float32)).reshape(shape)
    lost = []
    with torch.no_grad():
        for some in _batches(len(bits), batch):
            decoded = slot.decode(received[some], estimate[some], variance[some], noise[some])
            lost.append((decoded != bits[some]).any(1).numpy())
    return np.concatenate(lost).astype(np.float64)


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def _complex(parts: np.ndarray) -> np.ndarray:
    """Real and imaginary parts on the axis before the grid's last two: [..., 2, T, K] → complex64 [..., T, K]."""
    return (parts[..., 0, :, :] + 1j * parts[..., 1, :, :]).astype(np.complex64)
