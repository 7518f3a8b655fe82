"""Simulates the beam management corpus: TR 38.901 links → Set B reports (features) and Set A truth, in shards."""

import math

import numpy as np
import pyarrow as pa
import torch

from rankd_pipeline.radio import codebooks, reports
from rankd_pipeline.radio.beamspace import BeamspaceChannel, Links, Topology, beam_rsrp_dbm
from rankd_pipeline.radio.seeding import seeded
from rankd_pipeline.ran_functions.beam_management.config import (
    BandConfig,
    BeamCorpusConfig,
    SiteConfig,
    transmit_power_per_re_dbm,
)
from rankd_pipeline.ran_functions.drops import SPLIT_OF_CODE, Shard, ShardTables, plan_pools, pools_by_role

INDOOR_HEIGHT_FLOOR_M = 3.0


def plan_shards(cfg: BeamCorpusConfig, seed: int) -> list[Shard]:
    """Cut the corpus into shards; sample ids are dense over the plan, as drop ids are."""
    rows = (cfg.seen_samples, cfg.heldout_site_samples, cfg.heldout_band_samples)
    pools = pools_by_role(cfg.sites, cfg.bands, [count / cfg.ues_per_drop for count in rows])
    return plan_pools(pools, max(cfg.shard_samples // cfg.ues_per_drop, 1), cfg.split_shares, cfg.labelled_share, seed)


def simulate_shard(cfg: BeamCorpusConfig, shard: Shard) -> ShardTables:
    """Simulate one shard, on one thread, from its own seed: the same bytes wherever and whenever it runs.

    :returns: features and truth, one row a sample in the same order (see `_tables` for the columns)
    """
    site = next(s for s in cfg.sites if s.name == shard.site)
    band = next(b for b in cfg.bands if b.ghz == shard.band_ghz)
    with seeded(shard.seed):
        link = _BeamLink(cfg, site, band, shard.seed)
        drops_a_batch = max(cfg.batch_samples // cfg.ues_per_drop, 1)
        batches = [
            link.batch(min(drops_a_batch, len(shard.drop_codes) - start))
            for start in range(0, len(shard.drop_codes), drops_a_batch)
        ]
    columns = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    return _tables(cfg, shard, site, columns)


class _BeamLink:
    """One site at one band: draws users and measures every beam they may see."""

    def __init__(self, cfg: BeamCorpusConfig, site: SiteConfig, band: BandConfig, seed: int) -> None:
        self.cfg, self.site, self.band = cfg, site, band
        self.rng = np.random.default_rng([seed, 1])
        self.generator = torch.Generator().manual_seed(seed)
        a = cfg.array
        self.channel = BeamspaceChannel(site.scenario, band.ghz, a.rows, a.cols, a.vertical_spacing, a.horizontal_spacing)
        self.parents, self.children = hierarchical_codebook(cfg)
        self.child_prior = self._child_prior()
        parts = [codebooks.wide_beams(a.rows, a.cols, cfg.set_b.rows, cfg.set_b.cols)]
        parts += [codebooks.dft_codebook(a.rows, a.cols), self.parents]
        self.beams = torch.from_numpy(np.concatenate(parts))
        self.fault_db = np.array([cfg.ssb_fault_db.get(beam, 0.0) for beam in range(cfg.n_set_b)], np.float32)
        self.noise_dbm = reports.noise_per_re_dbm(band.scs_khz, band.noise_figure_db)
        self.tx_per_re_dbm = transmit_power_per_re_dbm(cfg, band)

    def batch(self, drops: int) -> dict[str, np.ndarray]:
        """Simulate `drops` drops. :returns: columns, one row a user, users of a drop adjacent"""
        cfg = self.cfg
        topology, speed_kmh = self._topology(drops, self.rng)
        instants_s = -np.arange(cfg.history - 1, -1, -1) * cfg.ssb_period_ms * 1e-3
        links = self.channel.links(topology, instants_s, self.generator)
        delay_s = links.delay_s * cfg.delay_scale
        rsrp = beam_rsrp_dbm(links.paths, delay_s, self.beams, self.tx_per_re_dbm, cfg.measurement.n_re, self.band.scs_khz)
        set_b, now = rsrp[:, :, : cfg.n_set_b] - self.fault_db, rsrp[:, -1, cfg.n_set_b :]
        set_a, parents = now[:, : cfg.n_set_a], now[:, cfg.n_set_a :]
        reported, mask = reports.quantize_report(*self._measure(set_b), cfg.beams_in_report)
        sweep, sweep_found = self._measure(set_a)
        return {
            "l1_rsrp_dbm": reported,
            "l1_rsrp_mask": mask,
            "speed_kmh": speed_kmh,
            "rsrp_set_a_dbm": set_a,
            "best_beam": set_a.argmax(-1).astype(np.int16),
            "sweep_beam": _strongest(sweep, sweep_found),
            **self._sweeps(parents, set_a),
            "indoor": topology.indoor.reshape(-1),
            "distance_m": np.linalg.norm(topology.ut_xyz_m - np.array([0, 0, self.site.bs_height_m], np.float32), axis=-1).reshape(
                -1
            ),
            **_link_columns(links),
            "delay_spread_ns": links.delay_spread_ns * np.float32(cfg.delay_scale),
        }

    def _topology(self, drops: int, rng: np.random.Generator) -> tuple[Topology, np.ndarray]:
        """Users uniform over the sector's area; indoor users on a floor of a 4-8 storey house (TR 38.901 Table 7.2-1)."""
        site, users = self.site, self.cfg.ues_per_drop
        shape = (drops, users)
        # A hexagonal three-sector cell reaches ISD*2/3 in its boresight; the circle of equal area is what matters here.
        reach = site.isd_m * math.sqrt(math.sqrt(3) / 2 / math.pi)
        radius = np.sqrt(rng.uniform(site.min_distance_m**2, max(reach, site.min_distance_m + 10) ** 2, shape))
        azimuth = np.radians(rng.uniform(-0.5, 0.5, shape) * site.sector_deg)
        indoor = rng.random(shape) < site.indoor_share
        floor = np.floor(rng.random(shape) * rng.integers(4, 9, shape))
        height = np.where(indoor, INDOOR_HEIGHT_FLOOR_M * floor + 1.5, 1.5)
        xyz = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), height], axis=-1)
        # Whoever is inside a house walks.
        speed = rng.uniform(*site.speed_kmh, shape)
        speed = np.where(indoor, np.minimum(speed, 3.0), speed)
        heading = rng.uniform(-np.pi, np.pi, shape)
        velocity = np.stack([np.cos(heading), np.sin(heading), np.zeros(shape)], -1) * (speed / 3.6)[..., None]
        topology = Topology(xyz.astype(np.float32), velocity.astype(np.float32), indoor, site.bs_height_m, site.downtilt_deg)
        return topology, speed.reshape(-1).astype(np.float32)

    def _measure(self, rsrp_dbm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        m = self.cfg.measurement
        return reports.measure_rsrp(
            rsrp_dbm, self.noise_dbm, m.n_re, m.coherent_re, m.implementation_error_db, m.detection_snr_db, self.rng
        )

    def _sweeps(self, parents_dbm: np.ndarray, set_a_dbm: np.ndarray) -> dict[str, np.ndarray]:
        """Two-stage sweeps with measurement noise of their own: parents first, then narrow beams below them.

        `hierarchical_beam` costs the cell as much as Set B does: the parents are broadcast to all users of the drop, and
        what is left of n_set_b beams is a second stage that these users share. The gNB sweeps the narrow beams that most
        users ask for; each user takes the strongest, or, if none below its own parent was swept, that parent's likeliest
        child. `dedicated_beam` gives every user a second stage of its own, which costs n_set_b beams a *user*.
        Both are flattered: the second stage comes without the delay of the report in between.
        """
        measured, found = self._measure(parents_dbm)
        parent = _strongest(measured, found)
        narrow_dbm, narrow_found = self._measure(set_a_dbm)
        level = np.where(narrow_found, narrow_dbm, narrow_dbm - 1e3)
        child = self.children[parent]  # [users, children of a parent], every row in the order of the beam rows
        dedicated = child[np.arange(len(child)), np.take_along_axis(level, child, axis=1).argmax(axis=1)]
        prior = self.child_prior[parent]
        shared = np.empty(len(child), np.int64)
        beams_left = max(self.cfg.n_set_b - len(self.parents), 1)
        for first in range(0, len(child), self.cfg.ues_per_drop):
            drop = slice(first, first + self.cfg.ues_per_drop)
            demand = np.zeros(self.cfg.n_set_a)
            np.add.at(demand, child[drop], prior[drop])
            swept = np.argsort(-demand, kind="stable")[:beams_left]
            own = np.any(np.isin(child[drop], swept), axis=1)
            fallback = np.take_along_axis(child[drop], prior[drop].argmax(axis=1)[:, None], axis=1)[:, 0]
            shared[drop] = np.where(own, swept[level[drop][:, swept].argmax(axis=1)], fallback)
        return {"hierarchical_beam": shared.astype(np.int16), "dedicated_beam": dedicated.astype(np.int16)}

    def _child_prior(self) -> np.ndarray:
        """How likely each child of a parent is the best [parents, children], as planning knows it: by the line of sight
        to users spread over the sector, blocked or not."""
        a, draws = self.cfg.array, 400
        topology, _ = self._topology(draws, np.random.default_rng(0))
        xyz = topology.ut_xyz_m.reshape(-1, 3) - np.array([0, 0, self.site.bs_height_m], np.float32)
        azimuth, elevation = np.arctan2(xyz[:, 1], xyz[:, 0]), np.arctan2(xyz[:, 2], np.hypot(xyz[:, 0], xyz[:, 1]))
        tilt = math.radians(self.site.downtilt_deg)
        up = np.cos(elevation) * np.cos(azimuth) * math.sin(tilt) + np.sin(elevation) * math.cos(tilt)
        row = np.round(-up * a.vertical_spacing * a.rows).astype(int) % a.rows
        share = np.bincount(row, minlength=a.rows) / len(row)
        return share[self.children // a.cols]


def hierarchical_codebook(cfg: BeamCorpusConfig) -> tuple[np.ndarray, np.ndarray]:
    """Parents and children of the two-stage sweep that spends no more measurements than Set B has beams.

    Of all divisions into parents_v x parents_h blocks that fit (parents + children of one parent ≤ n_set_b), the one
    with the most parents is taken, and of those the finest in azimuth, where users are spread.
    """
    a = cfg.array
    divisions = [(v * h, h, v) for v in range(1, a.rows + 1) for h in range(1, a.cols + 1) if a.rows % v == 0 and a.cols % h == 0]
    fits = [d for d in divisions if d[0] + cfg.n_set_a // d[0] <= cfg.n_set_b]
    # A Set B too small for any two-stage sweep: the cheapest one, which then spends more than Set B does.
    cheapest = min(d[0] + cfg.n_set_a // d[0] for d in divisions)
    fits = fits or [d for d in divisions if d[0] + cfg.n_set_a // d[0] == cheapest]
    _, h, v = max(fits)
    return codebooks.parent_beams(a.rows, a.cols, v, h)


def _strongest(measured_dbm: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Index of the strongest detected beam; where none was detected, of the largest correlation."""
    level = np.where(found | ~found.any(-1, keepdims=True), measured_dbm, -np.inf)
    return level.argmax(-1).astype(np.int16)


def _link_columns(links: Links) -> dict[str, np.ndarray]:
    names = ("los", "k_factor_db", "delay_spread_ns", "asd_deg", "asa_deg", "coupling_loss_db")
    return {name: getattr(links, name) for name in names}


def _tensor(values: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def _tables(cfg: BeamCorpusConfig, shard: Shard, site: SiteConfig, columns: dict[str, np.ndarray]) -> ShardTables:
    users = cfg.ues_per_drop
    codes = np.repeat(np.array(list(shard.drop_codes)), users)
    n = len(codes)
    drop_id = shard.first_drop + np.arange(n) // users
    sample_id = pa.array(shard.first_drop * users + np.arange(n, dtype=np.int64))
    # Drops are independent snapshots; they are stamped one second apart in their cell.
    time_s = (shard.first_drop_of_cell + np.arange(n) // users).astype(np.float64)

    def constant(value: str) -> pa.Array:
        return pa.array([value] * n)

    features = pa.table({
        "sample_id": sample_id,
        "drop_id": pa.array(drop_id.astype(np.int64)),
        "group": constant("main"),
        "source": constant("sionna"),
        "site": constant(shard.site),
        "band_ghz": pa.array(np.full(n, shard.band_ghz, np.float32)),
        "scenario": constant(site.scenario),
        "split": pa.array([SPLIT_OF_CODE[c] for c in codes]),
        "labelled": pa.array(codes != "u"),
        "speed_kmh": pa.array(columns["speed_kmh"]),
        "time_s": pa.array(time_s),
        "l1_rsrp_dbm": _tensor(columns["l1_rsrp_dbm"]),
        "l1_rsrp_mask": _tensor(columns["l1_rsrp_mask"]),
    })  # fmt: skip
    truth = {"sample_id": sample_id, "rsrp_set_a_dbm": _tensor(columns["rsrp_set_a_dbm"])}
    for name in (
        "best_beam", "los", "indoor", "distance_m", "coupling_loss_db", "delay_spread_ns", "asd_deg", "asa_deg",
        "k_factor_db", "hierarchical_beam", "dedicated_beam", "sweep_beam",
    ):  # fmt: skip
        truth[name] = pa.array(columns[name])
    return ShardTables(features, pa.table(truth))
