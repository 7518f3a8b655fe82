"""Simulates the link adaptation corpus: Sionna channels → SINR → CQI reports, logged MCS and HARQ; the BLER of every MCS as truth.

Axis legend: N traces (users), T slots, L slots of a window, M MCS indices, R receive antennas, P paths, F frequencies.
"""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from sionna.phy.channel.tr38901 import TDL, PanelArray, UMa, UMi

from rankd_pipeline.errors import RankdError
from rankd_pipeline.radio.seeding import seeded
from rankd_pipeline.radio.waves import max_doppler_hz
from rankd_pipeline.ran_functions.drops import SPLIT_OF_CODE, pools_by_role
from rankd_pipeline.ran_functions.link_adaptation.config import SLOT_US, LinkCorpusConfig, PolicyConfig, Range, SiteConfig
from rankd_pipeline.ran_functions.link_adaptation.policies import CqiTable, Learned, Logged, OuterLoop
from rankd_pipeline.ran_functions.link_adaptation.rollout import Policy, Rollout, Traces, roll_out
from rankd_pipeline.ran_functions.link_adaptation.tables import CQI_TO_MCS, LinkTables, effective_sinr_db, link_tables
from rankd_pipeline.runtime.bundle import load_bundle
from rankd_pipeline.settings import inside, settings
from rankd_pipeline.store.tensors import tensor_array

SCS_HZ = 30e3
POLICIES = ("cqi_table", "illa", "olla", "random", "learned")
GEOMETRY = {"UMi": (10.0, (20.0, 150.0)), "UMa": (25.0, (50.0, 400.0))}  # BS height and distance range, m (TR 38.901 Table 7.2-1)
JITTER_HOLD_SLOTS = (1, 16)
MAX_AGE_SLOTS = 255


@dataclass(frozen=True)
class Shard:
    """A piece of the corpus that can be simulated alone: some traces of one site at one band, one letter of SPLIT_OF_CODE each."""

    index: int
    site: str
    band_ghz: float
    first_trace: int
    codes: str
    seed: int


def plan_shards(cfg: LinkCorpusConfig, seed: int) -> list[Shard]:
    """Cut the corpus into shards. Trace ids are dense over the plan; splits are by whole trace in every (site, band) cell."""
    pools = pools_by_role(cfg.sites, cfg.bands, (cfg.seen_traces, cfg.heldout_site_traces, cfg.heldout_band_traces))
    shards: list[Shard] = []
    first = 0
    for number, pool in enumerate(pools):
        cells = [(name, ghz) for name in pool.sites for ghz in pool.bands_ghz]
        if not pool.drops or not cells:
            continue
        count = math.ceil(pool.drops / len(cells))
        rng = np.random.default_rng([seed, number])
        split = [pool.code * count] * len(cells) if pool.code else _split_codes(cfg, len(cells), count, rng)
        for (name, ghz), codes in zip(cells, split, strict=True):
            for start in range(0, count, cfg.shard_traces):
                part = codes[start : start + cfg.shard_traces]
                index = len(shards)
                own = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
                shards.append(Shard(index, name, ghz, first, part, own))
                first += len(part)
    return shards


def _split_codes(cfg: LinkCorpusConfig, cells: int, count: int, rng: np.random.Generator) -> list[str]:
    """Splits of the traces of each cell, in random order within it.

    Each trace goes where most is missing of what is due so far, so that the shares of the corpus are exact to a trace.
    """
    train, val, test = cfg.split_shares
    due = {"t": test, "v": val, "L": train * cfg.labelled_share, "u": train * (1 - cfg.labelled_share)}
    given = dict.fromkeys(due, 0)
    codes = []
    for trace in range(cells * count):
        code = max(due, key=lambda name: due[name] * (trace + 1) - given[name])
        given[code] += 1
        codes.append(code)
    return ["".join(rng.permutation(codes[cell * count : (cell + 1) * count])) for cell in range(cells)]


def simulate_shard(cfg: LinkCorpusConfig, shard: Shard) -> tuple[pa.Table, pa.Table]:
    """(features, truth) of one shard, one row a window, on one thread, from its own seed: the same bytes wherever it runs."""
    site = next(site for site in cfg.sites if site.name == shard.site)
    tables = link_tables(cfg.allocations_prb, cfg.symbols)
    with seeded(shard.seed):
        users = _Users(cfg, site, shard.band_ghz, len(shard.codes), np.random.default_rng([shard.seed, 1]), tables)
        traces = users.traces()
        policy, names = logged_policies(cfg, tables, len(shard.codes), np.random.default_rng([shard.seed, 2]))
        rollout = roll_out(traces, policy)
    return _tables(cfg, shard, site, users, traces, rollout, names)


class _Users:
    """Users of one site at one band: their motion, channel, interference and feedback, one trace each."""

    def __init__(
        self, cfg: LinkCorpusConfig, site: SiteConfig, band_ghz: float, n: int, rng: np.random.Generator, tables: LinkTables
    ) -> None:
        self.cfg, self.site, self.ghz, self.n, self.rng, self.tables = cfg, site, band_ghz, n, rng, tables
        feedback = cfg.feedback
        self.indoor = rng.random(n) < site.indoor_share
        # Whoever is inside a house walks.
        speed = rng.uniform(*site.speed_kmh, n)
        self.speed_kmh = np.where(self.indoor, np.minimum(speed, 3.0), speed)
        self.snr_db = rng.uniform(*site.snr_db, n)
        self.allocation = rng.integers(0, len(cfg.allocations_prb), n)
        self.prb = np.array(cfg.allocations_prb)[self.allocation]
        self.cqi_period = rng.choice(feedback.cqi_period_slots, n)
        self.cqi_delay = rng.integers(feedback.cqi_delay_slots[0], feedback.cqi_delay_slots[1] + 1, n)
        self.harq_delay = rng.integers(feedback.harq_delay_slots[0], feedback.harq_delay_slots[1] + 1, n)
        # Slots before the trace begins, so that its first slot already has a report.
        self.lead = int(max(feedback.cqi_period_slots) + feedback.cqi_delay_slots[1])
        self.slots = cfg.trace_slots + self.lead
        doppler = max_doppler_hz(self.speed_kmh, band_ghz)
        self.doppler_hz = doppler * np.exp(rng.normal(0.0, feedback.doppler_error, n))

    def traces(self) -> Traces:
        """Everything that does not depend on the policy."""
        cfg, rng = self.cfg, self.rng
        level_db, step_slot = self._level_db()
        sinr_NTF = self._fading() * (10 ** (level_db / 10))[..., None]
        self.sinr_db = (10 * np.log10(sinr_NTF.mean(axis=-1))).astype(np.float32)[:, self.lead :]
        effective_NTM = effective_sinr_db(sinr_NTF, self.tables.beta_M)
        cqi, age = self._reports(effective_NTM)
        bler = np.stack([self.tables.bler(effective_NTM[i, self.lead :], self.allocation[i]) for i in range(self.n)])
        return Traces(
            cqi_NT=cqi, cqi_age_slots_NT=age, doppler_hz_N=self.doppler_hz.astype(np.float32),
            allocated_prb_N=self.prb.astype(np.int16), harq_delay_N=self.harq_delay, bler_NTM=bler.astype(np.float16),
            draw_NT=rng.random((self.n, cfg.trace_slots)).astype(np.float32), step_slot_N=step_slot.astype(np.int16),
        )  # fmt: skip

    def _level_db(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean SINR of each slot [N, T] (shadowing, steps and interference on it), and the slot of each trace's step or -1."""
        cfg, site, rng = self.cfg, self.site, self.rng
        stepped = rng.random(self.n) < cfg.step_share
        step_slot = np.where(stepped, rng.integers(int(0.4 * cfg.trace_slots), int(0.6 * cfg.trace_slots), self.n), -1)
        size_db = rng.uniform(*cfg.step_db, self.n)
        low, high = site.snr_db
        # Up or down as the draw says, but not out of coverage, nor beyond the highest MCS.
        up = (rng.random(self.n) < 0.5) & (self.snr_db + size_db <= high) | (self.snr_db - size_db < low)
        step_db = np.where(up, size_db, -size_db)
        after = stepped[:, None] & (np.arange(self.slots) >= (step_slot + self.lead)[:, None])
        way_m = self.speed_kmh / 3.6 * SLOT_US * 1e-6
        shadow = _gauss_markov(np.exp(-way_m / site.shadow_distance_m), site.shadow_sigma_db, self.slots, rng)
        return self.snr_db[:, None] + shadow + after * step_db[:, None] - self._interference_db(), step_slot

    def _interference_db(self) -> np.ndarray:
        """By how much a neighbour that switches on and off raises noise plus interference [N, T]."""
        site, rng, slot_ms = self.site, self.rng, SLOT_US / 1e3
        load = rng.uniform(*site.interference_load, self.n) * (rng.random(self.n) < site.interfered_share)
        burst = np.maximum(rng.uniform(*site.burst_ms, self.n) / slot_ms, 1.0)
        mean_inr_db = rng.uniform(*site.inr_db, self.n)
        off = 1.0 / burst
        on = np.minimum(off * load / np.maximum(1.0 - load, 1e-6), 1.0)
        sending = rng.random(self.n) < load
        inr_db = mean_inr_db + rng.normal(0.0, 2.0, self.n)
        rise = np.empty((self.n, self.slots))
        for slot in range(self.slots):
            rise[:, slot] = np.where(sending, 10 * np.log10(1.0 + 10 ** (inr_db / 10)), 0.0)
            turned = rng.random(self.n) < np.where(sending, off, on)
            # Every burst comes from another user's beam: its level is its own.
            inr_db = np.where(turned & ~sending, mean_inr_db + rng.normal(0.0, 2.0, self.n), inr_db)
            sending = sending ^ turned
        return rise

    def _fading(self) -> np.ndarray:
        """Power of the channel after maximum ratio combining [N, T, F], mean 1 over each trace."""
        paths, delay_s = self._tdl() if self.site.scenario.startswith("TDL") else self._umi_uma()
        span_hz = self.prb[:, None] * 12 * SCS_HZ * (np.linspace(-0.5, 0.5, self.cfg.subcarrier_samples))
        phase = torch.from_numpy(-2 * np.pi * span_hz[:, None, :] * delay_s[:, :, None].double().numpy())
        turn_NPF = torch.polar(torch.ones_like(phase), phase).to(torch.complex64)
        h = torch.matmul(paths.transpose(2, 3), turn_NPF[:, None])  # [N, R, T, F]
        power = h.abs().square().sum(dim=1).numpy()
        return power / power.mean(axis=(1, 2), keepdims=True)

    def _tdl(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(paths [N, R, P, T], delays [N, P] in s) of a TDL channel, one speed and delay spread a user."""
        parts = []
        for speed_kmh, spread_ns in zip(self.speed_kmh, self.rng.uniform(*self.site.delay_spread_ns, self.n), strict=True):
            model = TDL(
                self.site.scenario[-1], float(spread_ns) * 1e-9, self.ghz * 1e9, min_speed=float(speed_kmh) / 3.6,
                max_speed=float(speed_kmh) / 3.6, num_rx_ant=self.cfg.rx_antennas, device="cpu",
            )  # fmt: skip
            parts.append(model(1, self.slots, 1e6 / SLOT_US))
        return torch.cat([a[:, 0, :, 0, 0] for a, _ in parts]), torch.cat([tau[:, 0, 0] for _, tau in parts])

    def _umi_uma(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(paths [N, R, P, T], delays [N, P] in s) of UMi or UMa links; the level is set by the trace, not by path loss."""
        height, (near, far) = GEOMETRY[self.site.scenario]
        carrier = self.ghz * 1e9
        base = PanelArray(1, 1, "single", "V", "38.901", carrier)
        dual = self.cfg.rx_antennas == 2
        user = PanelArray(1, 1, "dual" if dual else "single", "cross" if dual else "V", "omni", carrier)
        model = {"UMi": UMi, "UMa": UMa}[self.site.scenario](
            carrier, "low", user, base, "downlink", enable_pathloss=False, enable_shadow_fading=False, device="cpu"
        )
        radius = np.sqrt(self.rng.uniform(near**2, far**2, self.n))
        azimuth, heading = np.radians(self.rng.uniform(-60, 60, self.n)), self.rng.uniform(-np.pi, np.pi, self.n)
        place = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), np.full(self.n, 1.5)], axis=-1)
        motion = np.stack([np.cos(heading), np.sin(heading), np.zeros(self.n)], axis=-1) * (self.speed_kmh / 3.6)[:, None]

        def single(values: np.ndarray) -> torch.Tensor:  # one drop a user
            return torch.from_numpy(values.astype(np.float32))[:, None]

        still = torch.zeros(self.n, 1, 3)
        model.set_topology(
            single(place), torch.tensor([0.0, 0.0, height]).expand(self.n, 1, 3).contiguous(), still, still.clone(), single(motion),
            torch.from_numpy(self.indoor)[:, None],
        )  # fmt: skip
        a, tau = model(self.slots, 1e6 / SLOT_US)
        return a[:, 0, :, 0, 0], tau[:, 0, 0]

    def _reports(self, effective_NTM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Newest CQI that has arrived and its age in slots, both uint8 [N, T].

        The user reports the highest CQI whose modulation and code rate it believes to decode with a BLER of 0.1 (TS 38.214
        clause 5.2.2.1); it believes its own measurement, which has a bias of the receiver and an error of the moment.
        """
        feedback, rng = self.cfg.feedback, self.rng
        bias = rng.normal(feedback.cqi_bias_mean_db, feedback.cqi_bias_db, self.n)
        claimed = effective_NTM[..., CQI_TO_MCS] + bias[:, None, None]
        claimed += rng.normal(0.0, feedback.cqi_error_db, (self.n, self.slots, 1)).astype(np.float32)
        index = np.arange(len(CQI_TO_MCS), dtype=np.uint8)
        measured = np.where(claimed >= self.tables.cqi_sinr_db_Q, index, 0).max(axis=-1)
        phase = rng.integers(0, self.cqi_period)
        now = np.arange(self.lead, self.slots)
        newest = now - self.cqi_delay[:, None]
        at = newest - (newest - phase[:, None]) % self.cqi_period[:, None]
        return np.take_along_axis(measured, at, axis=1), np.minimum(now - at, MAX_AGE_SLOTS).astype(np.uint8)


def _gauss_markov(keep: np.ndarray, sigma: float, slots: int, rng: np.random.Generator) -> np.ndarray:
    """Stationary Gaussian processes [N, slots] of standard deviation sigma, correlation `keep` [N] from slot to slot."""
    x = np.empty((len(keep), slots))
    x[:, 0] = rng.normal(0.0, sigma, len(keep))
    noise = rng.normal(0.0, 1.0, (len(keep), slots)) * (sigma * np.sqrt(1.0 - keep**2))[:, None]
    for slot in range(1, slots):
        x[:, slot] = keep * x[:, slot - 1] + noise[:, slot]
    return x


def logged_policies(cfg: LinkCorpusConfig, tables: LinkTables, n: int, rng: np.random.Generator) -> tuple[Logged, np.ndarray]:
    """The policy that writes the log of n users, and what each is called [n]: drawn from the shares, settings and all."""
    p = cfg.policies
    shares = np.array([getattr(p, name) for name in POLICIES])
    kind = rng.choice(len(POLICIES), n, p=shares / shares.sum())

    def log_uniform(bounds: Range) -> np.ndarray:
        return np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]), n))

    def uses(name: str) -> np.ndarray:
        return kind == POLICIES.index(name)

    outer = uses("olla")
    target, up, offset = log_uniform(p.bler_target), log_uniform(p.olla_delta_up_db), rng.uniform(*p.olla_offset_db, n)
    loop = OuterLoop(tables, target, np.where(outer, up, 0.0), np.where(outer, offset, 0.0))
    jitter = np.zeros((n, cfg.trace_slots), np.int64)
    for user in np.flatnonzero(uses("random")):
        hold = rng.integers(*JITTER_HOLD_SLOTS)
        steps = rng.integers(-p.random_spread, p.random_spread + 1, math.ceil(cfg.trace_slots / hold))
        jitter[user] = np.repeat(steps, hold)[: cfg.trace_slots]
    table, learned = uses("cqi_table"), uses("learned")
    parts: list[tuple[np.ndarray, Policy]] = [(~(table | learned), loop), (table, CqiTable())]
    if learned.any():
        parts.append((learned, _learned(p, target)))
    return Logged(parts, jitter), np.array(POLICIES)[kind]


def _learned(p: PolicyConfig, target: np.ndarray) -> Learned:
    """The deployed model that a DAgger round follows, with a BLER target for each user [N].

    Raises: RankdError if the bundle is damaged or holds another model than the configuration says.
    """
    path = inside(settings().home, str(p.learned_bundle), "steps.corpus.simulation.policies.learned_bundle")
    predictor = load_bundle(path)
    found = predictor.manifest.about["model_sha256"]
    if found != p.learned_model:
        raise RankdError(
            f"{path}: it holds model {found[:12]}, learned_model says {str(p.learned_model)[:12]}; set learned_model to the "
            "model_sha256 in its manifest.json."
        )
    state = next(spec for spec in predictor.signature.inputs if spec.name == "state")
    return Learned(predictor, state.elements, target)


def _tables(
    cfg: LinkCorpusConfig, shard: Shard, site: SiteConfig, users: _Users, traces: Traces, rollout: Rollout, policies: np.ndarray
) -> tuple[pa.Table, pa.Table]:
    """Rows of one shard: the windows of a trace follow each other."""
    n, windows, length = users.n, cfg.windows, cfg.window_slots
    trace_id = shard.first_trace + np.arange(n)
    sample_id = pa.array((trace_id[:, None] * windows + np.arange(windows)).ravel().astype(np.int64))
    # Traces are independent; they are stamped one after the other, a second apart, in their cell.
    duration_s = cfg.trace_slots * SLOT_US * 1e-6
    start_s = trace_id[:, None] * (duration_s + 1.0) + np.arange(windows) * length * SLOT_US * 1e-6

    def each(values: np.ndarray, dtype: type | None = None) -> pa.Array:  # [N], repeated for the windows
        return pa.array(np.repeat(values, windows).astype(dtype or values.dtype))

    def cut(values_NT: np.ndarray, dtype: type) -> pa.Array:  # [N, T, ...] into windows [N*W, L, ...]
        return tensor_array(values_NT.reshape(n * windows, length, *values_NT.shape[2:]).astype(dtype))

    def constant(value: str) -> pa.Array:
        return pa.array([value] * (n * windows))

    codes = np.array(list(shard.codes))
    features = pa.table({
        "sample_id": sample_id,
        "drop_id": each(trace_id, np.int64),
        "group": constant("main"),
        "source": constant("sionna"),
        "site": constant(shard.site),
        "band_ghz": each(np.full(n, shard.band_ghz), np.float32),
        "scenario": constant(site.scenario),
        "split": pa.array(np.repeat([SPLIT_OF_CODE[code] for code in shard.codes], windows).tolist()),
        "labelled": each(codes != "u"),
        "speed_kmh": each(users.speed_kmh, np.float32),
        "time_s": pa.array(start_s.ravel()),
        "policy": pa.array(np.repeat(policies, windows).tolist()),
        "harq_delay_slots": each(traces.harq_delay_N, np.uint8),
        "doppler_hz": each(traces.doppler_hz_N, np.float32),
        "allocated_prb": each(traces.allocated_prb_N, np.int16),
        "cqi": cut(traces.cqi_NT, np.uint8),
        "cqi_age_slots": cut(traces.cqi_age_slots_NT, np.uint8),
        "harq_ack": cut(rollout.harq_ack_NT, np.uint8),
        "harq_mask": cut(rollout.harq_mask_NT, np.uint8),
        "harq_mcs": cut(rollout.harq_mcs_NT, np.uint8),
    })  # fmt: skip
    truth = pa.table({
        "sample_id": sample_id,
        "bler": cut(traces.bler_NTM, np.float16),
        "draw": cut(traces.draw_NT, np.float32),
        "sinr_db": cut(users.sinr_db, np.float32),
        "sent_mcs": cut(rollout.mcs_NT, np.uint8),
        "sent_ack": cut(rollout.ack_NT, np.uint8),
        "step_slot": each(traces.step_slot_N, np.int16),
        "indoor": each(users.indoor),
    })  # fmt: skip
    return features, truth
