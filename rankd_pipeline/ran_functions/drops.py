"""How a simulated corpus is cut: whole drops to splits, in every (site, band) cell, and drops to shards that run alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rankd_pipeline.audit.schema import ColumnSpec

if TYPE_CHECKING:
    import pyarrow as pa

# One letter a drop, so that a shard says by itself which of its drops go where.
SPLIT_OF_CODE = {
    "L": "train",
    "u": "train",
    "v": "val",
    "t": "test",
    "s": "heldout_site",
    "b": "heldout_band",
}


@dataclass(frozen=True)
class Shard:
    """A piece of the corpus that can be simulated alone: some drops of one site at one band.

    drop_codes has one letter a drop (see SPLIT_OF_CODE; L = labelled training drop, u = unlabelled).
    """

    index: int
    site: str
    band_ghz: float
    first_drop: int
    first_drop_of_cell: int
    drop_codes: str
    seed: int


@dataclass(frozen=True)
class ShardTables:
    """Rows of one shard, in the same order. Only oracle labels and evaluation may read `truth`."""

    features: "pa.Table"
    truth: "pa.Table"


@dataclass(frozen=True)
class Pool:
    """Drops of like role, spread evenly over all pairs of these sites and bands; code None: split by shares."""

    drops: float
    sites: Sequence[str]
    bands_ghz: Sequence[float]
    code: str | None


def drop_columns(highest_ghz: float = 114.25) -> tuple[ColumnSpec, ...]:
    """The columns of every corpus of drops: who, where and when. NR is studied up to 114.25 GHz (TR 38.807)."""
    return (
        ColumnSpec(name="sample_id", dtype="int64", role="id"),
        ColumnSpec(name="drop_id", dtype="int64", role="unit"),
        ColumnSpec(name="group", dtype="string", role="key"),
        ColumnSpec(name="source", dtype="string", role="key"),
        ColumnSpec(name="site", dtype="string", role="key"),
        ColumnSpec(name="band_ghz", dtype="float32", unit="GHz", valid_range=(0.41, highest_ghz), role="key"),
        ColumnSpec(name="scenario", dtype="string", role="key"),
        ColumnSpec(name="split", dtype="string", role="key"),
        ColumnSpec(name="labelled", dtype="bool", role="key"),
        ColumnSpec(name="speed_kmh", dtype="float32", unit="km/h", valid_range=(0.0, 500.0), role="context"),
        ColumnSpec(name="time_s", dtype="float64", unit="s", role="context"),
    )


class Place(Protocol):
    """A site or a delay profile: seen in training, or held out."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


class Carrier(Protocol):
    """A band: trained on, or held out."""

    @property
    def ghz(self) -> float: ...
    @property
    def role(self) -> str: ...


def pools_by_role(places: Sequence[Place], bands: Sequence[Carrier], drops: Sequence[float]) -> tuple[Pool, Pool, Pool]:
    """The pools of a corpus: seen places at training bands, held-out places at these, and seen places at held-out bands.

    drops: how many of each, in this order.
    """
    train, held_bands = ([band.ghz for band in bands if band.role == role] for role in ("train", "heldout"))
    seen, held_places = ([place.name for place in places if place.role == role] for role in ("seen", "heldout"))
    return Pool(drops[0], seen, train, None), Pool(drops[1], held_places, train, "s"), Pool(drops[2], seen, held_bands, "b")


def plan_pools(
    pools: Sequence[Pool], drops_a_shard: int, split_shares: tuple[float, float, float], labelled_share: float, seed: int
) -> list[Shard]:
    """Cut the pools into shards. Drop ids are dense over the plan, splits are by whole drop in every (site, band) cell, and a
    shard's seed depends on (seed, index) alone. A pool without drops is passed over, and keeps its number."""
    shards: list[Shard] = []
    first_drop = 0
    for number, pool in enumerate(pools):
        if not pool.drops:
            continue
        cells = [(site, band) for site in pool.sites for band in pool.bands_ghz]
        drops = math.ceil(pool.drops / len(cells))
        for cell, (site, band) in enumerate(cells):
            rng = np.random.default_rng([seed, number, cell])
            codes = pool.code * drops if pool.code else _split_codes(split_shares, labelled_share, drops, cell, rng)
            for start in range(0, drops, drops_a_shard):
                part = codes[start : start + drops_a_shard]
                index = len(shards)
                shard_seed = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
                shards.append(Shard(index, site, band, first_drop, start, part, shard_seed))
                first_drop += len(part)
    return shards


def _split_codes(
    split_shares: tuple[float, float, float], labelled_share: float, drops: int, cell: int, rng: np.random.Generator
) -> str:
    """Splits of one cell's drops, in random order. Fractions are carried on from cell to cell, so that the shares of
    the corpus are exact to a drop (rounded up: val, test and labels never starve)."""

    def carried(share: float) -> int:
        return math.ceil(share * drops * (cell + 1) - 1e-9) - math.ceil(share * drops * cell - 1e-9)

    _, val, test = split_shares
    n_val, n_test = carried(val), carried(test)
    n_labelled = min(carried((1 - val - test) * labelled_share), max(drops - n_val - n_test, 0))
    n_unlabelled = max(drops - n_val - n_test - n_labelled, 0)
    codes = "L" * n_labelled + "v" * n_val + "t" * n_test + "u" * n_unlabelled
    return "".join(np.array(list(codes[:drops]))[rng.permutation(drops)])
