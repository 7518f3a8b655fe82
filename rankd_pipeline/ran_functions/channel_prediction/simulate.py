"""Simulates the channel prediction corpus: TR 38.901 channels over time, antennas and frequency, as patches, in shards.

Differences from the published sets (QuaDRiGa): Sionna keeps ray angles and delays fixed over a sample's instants (Doppler
phase only, plane waves), elements are omnidirectional, and below 6 GHz (UMi: 2 GHz) TR 38.901 takes the same large-scale
parameters for all carriers. So these sets carry names of their own, and their NMSE is not comparable with the paper's.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from sionna.phy.channel import cir_to_ofdm_channel
from sionna.phy.channel.tr38901 import InH, PanelArray, RMa, UMa, UMi

from rankd_pipeline.radio.seeding import seeded
from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, ChannelCorpusConfig, ChannelSet, SetChoice
from rankd_pipeline.ran_functions.channel_prediction.matfile import ChannelFile
from rankd_pipeline.ran_functions.channel_prediction.patches import patchify
from rankd_pipeline.settings import inside, settings
from rankd_pipeline.store.tensors import tensor_array

# Heights of BS and UE and the range of their distance, m (WiFo's own geometry is not published).
GEOMETRY = {
    "UMi": (10.0, 1.5, 10.0, 200.0),
    "UMa": (25.0, 1.5, 35.0, 250.0),
    "RMa": (35.0, 1.5, 35.0, 500.0),
    "InH": (3.0, 1.0, 2.0, 20.0),
}
SECTOR_DEG = 120.0


@dataclass(frozen=True)
class Shard:
    """A piece of the corpus that can be made alone: consecutive samples of one set, all of one split."""

    index: int
    name: str
    split: str
    first_sample: int
    first_of_set: int
    samples: int
    seed: int


def plan_shards(cfg: ChannelCorpusConfig, seed: int) -> list[Shard]:
    """Cut the corpus into shards; ids are dense over the plan, a shard's seed depends on (seed, set, split, part) alone."""
    shards: list[Shard] = []
    first = 0
    for choice in cfg.sets:
        of_set = 0
        for split, samples in _splits(cfg, choice):
            for part, start in enumerate(range(0, samples, cfg.shard_samples)):
                count = min(cfg.shard_samples, samples - start)
                key = [seed, *choice.name.encode(), *split.encode(), part]
                own = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
                shards.append(Shard(len(shards), choice.name, split, first, of_set, count, own))
                first, of_set = first + count, of_set + count
    return shards


def _splits(cfg: ChannelCorpusConfig, choice: SetChoice) -> tuple[tuple[str, int], ...]:
    if choice.file is not None:
        with _file_of(choice) as file:
            total = len(file)
        if choice.role != "seen":
            return ((choice.role, total),)
        val, test = (round(share * total) for share in cfg.split_shares[1:])
        return ("train", total - val - test), ("val", val), ("test", test)
    if choice.role != "seen":
        return ((choice.role, cfg.test_samples),)
    return ("train", cfg.train_samples), ("val", cfg.val_samples), ("test", cfg.test_samples)


def simulate_shard(cfg: ChannelCorpusConfig, shard: Shard) -> tuple[pa.Table, pa.Table]:
    """(features, truth) of one shard, on one thread, from its own seed: the same bytes wherever and whenever it runs."""
    choice = cfg.choice(shard.name)
    if choice.file is not None:
        return _imported_shard(cfg, choice, shard)
    channel_set = cfg.resolved[shard.name]
    with seeded(shard.seed):
        rng = np.random.default_rng([shard.seed, 1])
        channel = SetChannel(channel_set)
        counts = [min(cfg.batch_samples, shard.samples - start) for start in range(0, shard.samples, cfg.batch_samples)]
        batches = [channel.draw(count, rng) for count in counts]
    clean, speed_kmh, spread_ns = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return tables(cfg, shard, clean, with_noise(clean, cfg.snr_db, rng), speed_kmh, spread_ns, "sionna")


def _imported_shard(cfg: ChannelCorpusConfig, choice: SetChoice, shard: Shard) -> tuple[pa.Table, pa.Table]:
    """A shard read from the set's file; its noise is ours, its truth what the file holds."""
    with _file_of(choice) as file:
        clean = file.read(shard.first_of_set, shard.samples) * np.float32(file.scale())
    noisy = with_noise(clean, cfg.snr_db, np.random.default_rng([shard.seed, 1]))
    speed = np.full(shard.samples, np.mean(cfg.resolved[shard.name].speed_kmh))
    return tables(cfg, shard, clean, noisy, speed, np.full(shard.samples, np.nan), Path(str(choice.file)).stem)


def _file_of(choice: SetChoice) -> ChannelFile:
    path = inside(settings().home, str(choice.file), f"sets.{choice.name}.file")
    return ChannelFile(path, choice.key, choice.as_published(), choice.resolved())


def with_noise(clean: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """A channel of unit mean power as a receiver knows it: complex white noise snr_db below it, drawn once."""
    noise = rng.standard_normal((2, *clean.shape), np.float32) * np.float32(math.sqrt(0.5 * 10 ** (-snr_db / 10)))
    return (clean + noise[0] + 1j * noise[1]).astype(np.complex64)


def tables(
    cfg: ChannelCorpusConfig, shard: Shard, clean: np.ndarray, noisy: np.ndarray, speed_kmh: np.ndarray, spread_ns: np.ndarray,
    source: str,
) -> tuple[pa.Table, pa.Table]:  # fmt: skip
    """Features and truth of a shard of complex channels [n, T, N, K]; patches are padded with zeros to the largest grid.

    Every sample is a drop of its own. Its `task` is the question that a validation or calibration row asks; training
    masks anew in every step, and evaluation asks both. The label, the hidden patches, is a part of `csi`.
    """
    item, n = cfg.resolved[shard.name], len(clean)
    number = shard.first_of_set + np.arange(n)
    sample_id = pa.array(shard.first_sample + np.arange(n, dtype=np.int64))

    def constant(value: str) -> pa.Array:
        return pa.array([value] * n)

    features = pa.table({
        "sample_id": sample_id,
        "drop_id": sample_id,
        "group": constant(item.group),
        "source": constant(source),
        "site": constant(shard.name),
        "band_ghz": pa.array(np.full(n, item.carrier_ghz, np.float32)),
        "scenario": constant(f"{item.scenario}-{'LoS' if item.los else 'NLoS'}"),
        "split": constant(shard.split),
        "labelled": pa.array(np.ones(n, bool)),
        "speed_kmh": pa.array(speed_kmh.astype(np.float32)),
        # Samples are independent snapshots; they are stamped one second apart in their set.
        "time_s": pa.array(number.astype(np.float64)),
        "task": pa.array([cfg.tasks[i % len(cfg.tasks)] for i in number]),
        "grid": tensor_array(np.tile(np.asarray(item.grid, np.int16), (n, 1))),
        "csi": tensor_array(padded(patchify(noisy), cfg.most_tokens)),
        "csi_mask": tensor_array(_present(n, item.tokens, cfg.most_tokens)),
    })  # fmt: skip
    truth = pa.table(
        {
            "sample_id": sample_id,
            "csi_clean": tensor_array(padded(patchify(clean), cfg.most_tokens)),
            "delay_spread_ns": pa.array(spread_ns.astype(np.float32)),  # NaN where a file does not tell
        }
    )
    return features, truth


def _present(samples: int, tokens: int, most: int) -> np.ndarray:
    """Which numbers of a padded sample are there: uint8 [n, L, E]."""
    return np.broadcast_to((np.arange(most) < tokens)[:, None], (samples, most, ELEMENTS)).astype(np.uint8)


def padded(patches_nLE: np.ndarray, tokens: int) -> np.ndarray:
    """Patches with zero patches behind them [n, tokens, E]."""
    return np.pad(patches_nLE, ((0, 0), (0, tokens - patches_nLE.shape[1]), (0, 0)))


class SetChannel:
    """The links of one set: a BS panel, single-antenna users, each sample an independent drop."""

    def __init__(self, channel_set: ChannelSet) -> None:
        self.set = channel_set
        carrier_hz = channel_set.carrier_ghz * 1e9
        bs = PanelArray(channel_set.rows, channel_set.cols, "single", "V", "omni", carrier_hz)
        ut = PanelArray(1, 1, "single", "V", "omni", carrier_hz)
        options = {"enable_pathloss": False, "enable_shadow_fading": False}
        if channel_set.scenario in ("UMi", "UMa"):
            model = {"UMi": UMi, "UMa": UMa}[channel_set.scenario]
            self.model = model(carrier_hz, "low", ut, bs, "downlink", **options)
        else:
            model = {"RMa": RMa, "InH": InH}[channel_set.scenario]
            self.model = model(carrier_hz, ut, bs, "downlink", **options)
        self.frequencies_hz = torch.arange(channel_set.subcarriers, dtype=torch.float32) * channel_set.spacing_khz * 1e3

    def draw(self, samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(complex64 [samples, T, N, K] of unit expected power, speed in km/h [samples], RMS delay spread in ns [samples])."""
        item = self.set
        bs_m, ut_m, nearest, farthest = GEOMETRY[item.scenario]
        radius = np.sqrt(rng.uniform(nearest**2, farthest**2, samples))
        azimuth = np.radians(rng.uniform(-0.5, 0.5, samples) * SECTOR_DEG)
        place = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), np.full(samples, ut_m)], -1)
        speed = rng.uniform(*item.speed_kmh, samples)
        heading = rng.uniform(-np.pi, np.pi, samples)
        velocity = np.stack([np.cos(heading), np.sin(heading), np.zeros(samples)], -1) * (speed / 3.6)[:, None]
        self.model.reset_topology()  # the last batch of a shard is a smaller one
        self.model.set_topology(
            torch.from_numpy(place.astype(np.float32))[:, None],
            torch.tensor([0.0, 0.0, bs_m]).expand(samples, 1, 3).contiguous(),
            torch.zeros(samples, 1, 3),
            torch.zeros(samples, 1, 3),
            torch.from_numpy(velocity.astype(np.float32))[:, None],
            torch.full((samples, 1), item.scenario == "InH"),
            los=item.los,
        )
        gains, delays = self.model(item.instants, 1e3 / item.sampling_ms)[:2]
        delays = delays * item.delay_scale
        h = cir_to_ofdm_channel(self.frequencies_hz, gains, delays)  # [B, rx, rx_ant, tx, tx_ant, T, K]
        h_BNTK = h[:, 0, 0, 0].numpy()
        spread_ns = delay_spread_ns((gains[:, 0, 0, 0].abs() ** 2).mean(dim=(1, 3)).numpy(), delays[:, 0, 0].numpy())
        return h_BNTK.transpose(0, 2, 1, 3).astype(np.complex64), speed.astype(np.float32), spread_ns


def delay_spread_ns(power: np.ndarray, delay_s: np.ndarray) -> np.ndarray:
    """RMS delay spread [n] of paths [n, paths] (TR 38.901, annex A)."""
    share = power / power.sum(axis=1, keepdims=True)
    mean_s = (share * delay_s).sum(axis=1)
    return np.sqrt(np.maximum(0.0, (share * delay_s**2).sum(axis=1) - mean_s**2)) * 1e9
