"""Simulates the channel estimation corpus: PUSCH slots over TR 38.901 channels → DMRS estimates (features) and the channel."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import torch

from rankd_pipeline.radio import links
from rankd_pipeline.radio.pusch import PuschSlot, noise_power
from rankd_pipeline.radio.seeding import seeded
from rankd_pipeline.ran_functions.channel_estimation.config import ChannelCorpusConfig, ProfileConfig
from rankd_pipeline.ran_functions.drops import SPLIT_OF_CODE, Shard, ShardTables, plan_pools, pools_by_role
from rankd_pipeline.store.tensors import tensor_array

PATHS = 26  # the longest profile (24 paths) with a line of sight of its own, rounded up


def plan_shards(cfg: ChannelCorpusConfig, seed: int) -> list[Shard]:
    """Cut the corpus into shards; sample ids are dense over the plan, as drop ids are."""
    rows = (cfg.seen_slots, cfg.heldout_profile_slots, cfg.heldout_band_slots)
    pools = pools_by_role(cfg.profiles, cfg.bands, [count / cfg.slots_per_drop for count in rows])
    return plan_pools(pools, max(cfg.shard_slots // cfg.slots_per_drop, 1), cfg.split_shares, cfg.labelled_share, seed)


def simulate_shard(cfg: ChannelCorpusConfig, shard: Shard) -> ShardTables:
    """Simulate one shard, on one thread, from its own seed: the same bytes wherever and whenever it runs."""
    profile = next(p for p in cfg.profiles if p.name == shard.site)
    rng = np.random.default_rng([shard.seed, 1])
    drops = len(shard.drop_codes)
    grid = links.Grid(shard.band_ghz, cfg.scs_khz, cfg.subcarriers, cfg.receive_antennas[1])
    with seeded(shard.seed):
        drawn = draw_links(profile, grid, drops, cfg.slots_per_drop, rng)
        slot = pusch(cfg.resource_blocks, cfg.scs_khz)
        snr_db = rng.uniform(*cfg.snr_db, len(drawn.speed_kmh)).astype(np.float32)
        noise = torch.from_numpy(noise_power(snr_db))
        antennas = np.repeat(rng.integers(cfg.receive_antennas[0], cfg.receive_antennas[1] + 1, drops), cfg.slots_per_drop)
        # Antennas that a drop does not have must not lend it their noise measurement: slots with as many antennas go together.
        ls = np.zeros((len(antennas), grid.antennas, 2, slot.pilots), np.complex64)
        variance = np.zeros(len(antennas), np.float32)
        for count in np.unique(antennas):
            rows = np.flatnonzero(antennas == count)
            sent, _ = slot.transmit(len(rows))
            measured = slot.measure(slot.receive(sent, drawn.channel[rows, :count], noise[rows]))
            ls[rows, :count], variance[rows] = measured.ls.numpy(), measured.noise_variance.numpy()
    return _tables(cfg, shard, profile, drawn, _Received(ls, variance, snr_db, antennas))


@dataclass(frozen=True)
class _Received:
    ls: np.ndarray
    noise_variance: np.ndarray
    snr_db: np.ndarray
    antennas: np.ndarray


def draw_links(profile: ProfileConfig, grid: links.Grid, drops: int, slots: int, rng: np.random.Generator) -> links.Links:
    """`slots` slots of each of `drops` users of a profile, with statistics of PATHS paths."""
    if profile.family in ("TDL", "CDL"):
        low, high = profile.delay_spread_ns
        spread = np.exp(rng.uniform(np.log(low), np.log(high), drops))
        speed = rng.uniform(*profile.speed_kmh, drops)
        letter = profile.model[-1]
        drawn = links.tdl(letter, grid, slots, spread, speed) if profile.family == "TDL" else links.cdl(
            letter, grid, slots, spread, speed, rng
        )  # fmt: skip
    else:
        place = links.Sector(
            profile.family, profile.isd_m, profile.bs_height_m, profile.indoor_share, profile.delay_spread_ns, profile.speed_kmh
        )
        drawn = links.sector(place, grid, drops, slots, rng)
    return links.Links(drawn.channel, links.padded(drawn.statistics, PATHS), drawn.delay_spread_ns, drawn.speed_kmh)


@cache
def pusch(resource_blocks: int, scs_khz: float) -> PuschSlot:
    """The slot of this allocation; made once a process."""
    return PuschSlot(resource_blocks, scs_khz)


def real(values: np.ndarray) -> np.ndarray:
    """Complex [n, ...] as real [n, 2, ...]: real parts, imaginary parts."""
    return np.stack([np.real(values), np.imag(values)], axis=1)


def _tables(cfg: ChannelCorpusConfig, shard: Shard, profile: ProfileConfig, drawn: links.Links, received: _Received) -> ShardTables:
    most = cfg.receive_antennas[1]
    there = np.arange(most)[None] < received.antennas[:, None]
    slot, antenna = np.nonzero(there)
    codes = np.repeat(np.array(list(shard.drop_codes)), cfg.slots_per_drop)[slot]
    drop = slot // cfg.slots_per_drop
    n = len(slot)
    # Ids leave room for the most antennas, so that every shard knows its own without the others.
    slot_id = shard.first_drop * cfg.slots_per_drop + slot
    sample_id = pa.array((slot_id * most + antenna).astype(np.int64))

    def constant(value: str) -> pa.Array:
        return pa.array([value] * n)

    def number(values: np.ndarray, dtype: type) -> pa.Array:
        return pa.array(values.astype(dtype))

    features = pa.table({
        "sample_id": sample_id,
        "drop_id": number(shard.first_drop + drop, np.int64),
        "group": constant("main"),
        "source": constant("sionna"),
        "site": constant(shard.site),
        "band_ghz": number(np.full(n, shard.band_ghz), np.float32),
        "scenario": constant(profile.family),
        "split": pa.array([SPLIT_OF_CODE[c] for c in codes]),
        "labelled": pa.array(codes != "u"),
        "speed_kmh": number(drawn.speed_kmh[slot], np.float32),
        # Slots of a drop are independent draws of one user, so they share a time; drops of a cell are a second apart.
        "time_s": number(shard.first_drop_of_cell + drop, np.float64),
        "ls": tensor_array(real(received.ls[slot, antenna]).astype(np.float32)),
        "noise_variance": number(received.noise_variance[slot], np.float32),
    })  # fmt: skip
    statistics = drawn.statistics
    truth = pa.table({
        "sample_id": sample_id,
        "slot_id": number(slot_id, np.int64),
        "antenna": number(antenna, np.int16),
        "snr_db": number(received.snr_db[slot], np.float32),
        "delay_spread_ns": number(drawn.delay_spread_ns[slot], np.float32),
        "channel": tensor_array(real(drawn.channel[slot, antenna].numpy()).astype(np.float16)),
        "path_power": tensor_array(statistics.power[slot].astype(np.float32)),
        "path_delay_ns": tensor_array((statistics.delay_s[slot] * 1e9).astype(np.float32)),
        "path_correlation": tensor_array(real(statistics.correlation[slot]).astype(np.float32)),
    })  # fmt: skip
    return ShardTables(features, truth)
