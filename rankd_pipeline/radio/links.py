"""Single-user uplink channels of Sionna over one slot, with the second-order statistics that they were drawn from.

TR 38.901 delay lines (TDL, CDL, clause 7.7) and users dropped in a sector (UMi, UMa, clause 7.5). Path loss and shadowing are
left out: the mean power of a channel is 1, and the SNR says how strong it is. The user has one vertical omnidirectional
antenna, the base station a horizontal line of them, half a wavelength apart.

Axis legend: B slots, A receive antennas, T OFDM symbols (14), K subcarriers, L paths, D lags in symbols.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import j0
from sionna.phy.channel import cir_to_ofdm_channel, gen_single_sector_topology, subcarrier_frequencies
from sionna.phy.channel.tr38901 import CDL, TDL, PanelArray, UMa, UMi

from rankd_pipeline.radio.pusch import SYMBOLS, symbol_seconds
from rankd_pipeline.radio.waves import LIGHT_MPS

LAGS = 12  # symbols between a DMRS and any other symbol: at most 11
INDOOR_SPEED_KMH = 3.0


@dataclass(frozen=True)
class Statistics:
    """What an all-knowing receiver knows of a slot before it looks: powers [B, L] that add up to 1, delays [B, L] in s, and how
    each path turns and fades, E[a(t+d) a*(t)] / power, complex64 [B, L, D]."""

    power: np.ndarray
    delay_s: np.ndarray
    correlation: np.ndarray


@dataclass(frozen=True)
class Links:
    """Channels complex64 [B, A, T, K] of unit mean power, with each slot's statistics, delay spread and speed [B]."""

    channel: torch.Tensor
    statistics: Statistics
    delay_spread_ns: np.ndarray
    speed_kmh: np.ndarray


@dataclass(frozen=True)
class Grid:
    """Where a channel is wanted."""

    ghz: float
    scs_khz: float
    subcarriers: int
    antennas: int

    @property
    def wavelength_m(self) -> float:
        return LIGHT_MPS / (self.ghz * 1e9)

    @property
    def lags_s(self) -> np.ndarray:
        return np.arange(LAGS) * symbol_seconds(self.scs_khz)

    def channel(self, paths: torch.Tensor, delay_s: torch.Tensor) -> torch.Tensor:
        """Sionna's path coefficients and delays as a frequency response [B, A, T, K]."""
        frequencies = subcarrier_frequencies(self.subcarriers, self.scs_khz * 1e3)
        return cir_to_ofdm_channel(frequencies, paths, delay_s, normalize=False)[:, 0, :, 0, 0]


def tdl(letter: str, grid: Grid, slots: int, delay_spread_ns: np.ndarray, speed_kmh: np.ndarray) -> Links:
    """`slots` slots of each user of a tapped delay line; delay_spread_ns and speed_kmh have one entry a user."""
    users = [_tdl_user(letter, grid, slots, *values) for values in zip(delay_spread_ns, speed_kmh, strict=True)]
    channel, power, delay, correlation = zip(*users, strict=True)

    def each_slot(values: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.repeat(np.stack(values), slots, axis=0)

    statistics = Statistics(each_slot(power), each_slot(delay), each_slot(correlation))
    return Links(torch.cat(channel), statistics, np.repeat(delay_spread_ns, slots), np.repeat(speed_kmh, slots))


def _tdl_user(letter: str, grid: Grid, slots: int, delay_spread_ns: float, speed_kmh: float):
    speed = float(speed_kmh) / 3.6
    model = TDL(letter, float(delay_spread_ns) * 1e-9, grid.ghz * 1e9, min_speed=speed, max_speed=speed, num_rx_ant=grid.antennas)
    channel = grid.channel(*model(slots, SYMBOLS, 1.0 / symbol_seconds(grid.scs_khz)))
    power, delay = model.mean_powers.numpy(), model.delays.numpy()
    turn = 2 * np.pi * speed / grid.wavelength_m * grid.lags_s
    correlation = np.tile(j0(turn).astype(np.complex64), (len(power), 1))
    if model.los:
        share = float(model.mean_power_los) / power[0]
        # Sionna's line of sight arrives at arccos(0.7) to the user's heading (TR 38.901 clause 7.7.2).
        correlation[0] = share * np.exp(0.7j * turn) + (1 - share) * correlation[0]
    return channel, power / power.sum(), delay[: len(power)], correlation


def cdl(letter: str, grid: Grid, slots: int, delay_spread_ns: np.ndarray, speed_kmh: np.ndarray, rng: np.random.Generator) -> Links:
    """`slots` slots of each user of a clustered delay line; each user moves in a direction of its own."""
    heading = rng.uniform(-np.pi, np.pi, len(speed_kmh))
    velocity = np.stack([np.cos(heading), np.sin(heading), np.zeros_like(heading)], -1) * (speed_kmh / 3.6)[:, None]
    velocity = np.repeat(velocity, slots, axis=0).astype(np.float32)
    nominal_ns = 100.0
    model = CDL(
        letter, nominal_ns * 1e-9, grid.ghz * 1e9, _array(grid, 1), _array(grid, grid.antennas), "uplink",
        ut_velocity=torch.from_numpy(velocity),
    )  # fmt: skip
    paths, delay_s = model(len(velocity), SYMBOLS, 1.0 / symbol_seconds(grid.scs_khz))
    # Delays scale with the delay spread and nothing else does, so one call serves users of any.
    scale = np.repeat(delay_spread_ns / nominal_ns, slots).astype(np.float32)
    channel = grid.channel(paths, delay_s * torch.from_numpy(scale)[:, None, None, None])
    # Rays are coupled at random, so a cluster's ray may leave at any of its azimuths and any of its zeniths.
    azimuth, zenith = (angles.numpy().astype(np.float64) for angles in (model._aod, model._zod))
    turning = _turning(azimuth[:, :, None], zenith[:, None, :], velocity[::slots, None, None, None], grid)
    correlation = turning.mean((2, 3))
    power, k = model._powers.numpy(), float(model._k_factor)  # type: ignore[arg-type]
    if k > 0:
        los_azimuth, los_zenith = (np.array(float(getattr(model, name))) for name in ("_los_aod", "_los_zod"))
        direct = _turning(los_azimuth, los_zenith, velocity[::slots], grid)
        power = power / (k + 1)
        share = k / (k + 1) / (power[0] + k / (k + 1))
        correlation[:, 0] = share * direct + (1 - share) * correlation[:, 0]
        power[0] += k / (k + 1)
    users = len(speed_kmh)
    delays = model._delays.numpy() / nominal_ns * delay_spread_ns[:, None]
    statistics = Statistics(
        np.repeat(np.tile(power / power.sum(), (users, 1)), slots, axis=0), np.repeat(delays, slots, axis=0),
        np.repeat(correlation, slots, axis=0),
    )  # fmt: skip
    return Links(channel, statistics, np.repeat(delay_spread_ns, slots), np.repeat(speed_kmh, slots))


@dataclass(frozen=True)
class Sector:
    """Users of a sector: scenario UMi or UMa, Sionna's defaults where a figure is None, and which users are of interest."""

    scenario: str
    isd_m: float | None
    bs_height_m: float | None
    indoor_share: float | None
    delay_spread_ns: tuple[float, float]
    speed_kmh: tuple[float, float]


def sector(place: Sector, grid: Grid, users: int, slots: int, rng: np.random.Generator) -> Links:
    """`slots` slots of `users` users whose delay spread lies in the wanted range; slots of a user share its large-scale
    parameters, and the rays are drawn anew for each."""
    parts: list[Links] = []
    while (missing := users - sum(len(part.speed_kmh) for part in parts) // slots) > 0:
        parts.append(_sector_batch(place, grid, 2 * missing + 4, slots, missing, rng))

    def joined(pick) -> np.ndarray:
        return np.concatenate([pick(part) for part in parts])

    widest = max(part.statistics.power.shape[1] for part in parts)
    statistics = [padded(part.statistics, widest) for part in parts]
    return Links(
        torch.cat([part.channel for part in parts]),
        Statistics(*(np.concatenate([getattr(item, name) for item in statistics]) for name in ("power", "delay_s", "correlation"))),
        joined(lambda part: part.delay_spread_ns), joined(lambda part: part.speed_kmh),
    )  # fmt: skip


def _sector_batch(place: Sector, grid: Grid, candidates: int, slots: int, wanted: int, rng: np.random.Generator) -> Links:
    """Drop `candidates` users and keep the first `wanted` of those with a fitting delay spread, slots of a user adjacent."""
    scenario = {"UMi": UMi, "UMa": UMa}[place.scenario]
    model = scenario(
        carrier_frequency=grid.ghz * 1e9, o2i_model="low", ut_array=_array(grid, 1), bs_array=_array(grid, grid.antennas),
        direction="uplink", enable_pathloss=False, enable_shadow_fading=False,
    )  # fmt: skip
    model.return_rays = True
    ut, bs, upright, facing, _, indoor = gen_single_sector_topology(
        candidates, 1, place.scenario.lower(), isd=place.isd_m, bs_height=place.bs_height_m, indoor_probability=place.indoor_share
    )
    speed = rng.uniform(*place.speed_kmh, candidates)
    speed = np.where(indoor.numpy()[:, 0], INDOOR_SPEED_KMH, speed)
    heading = rng.uniform(-np.pi, np.pi, candidates)
    velocity = np.stack([np.cos(heading), np.sin(heading), np.zeros(candidates)], -1) * (speed / 3.6)[:, None]
    velocity = velocity.astype(np.float32)
    # Antennas stay upright: a tilted one would trade power between polarisations, and the mean power would not be 1.
    model.set_topology(ut, bs, torch.zeros_like(upright), torch.zeros_like(facing), torch.from_numpy(velocity)[:, None], indoor)
    spread_ns = model._lsp.ds.reshape(-1).numpy() * 1e9
    chosen = np.flatnonzero((spread_ns >= place.delay_spread_ns[0]) & (spread_ns <= place.delay_spread_ns[1]))[:wanted]
    drawn = [_sector_slot(model, grid, velocity, chosen) for _ in range(slots)]
    channel = torch.stack([item[0] for item in drawn], 1).flatten(0, 1)
    power, delay, correlation = (np.stack([item[i] for item in drawn], 1).reshape(len(chosen) * slots, *drawn[0][i].shape[1:])
                                 for i in (1, 2, 3))  # fmt: skip
    return Links(
        channel, Statistics(power, delay, correlation), np.repeat(spread_ns[chosen], slots), np.repeat(speed[chosen], slots)
    )


def _sector_slot(model, grid: Grid, velocity: np.ndarray, chosen: np.ndarray):
    paths, delay_s, rays = model(SYMBOLS, 1.0 / symbol_seconds(grid.scs_khz))
    channel = grid.channel(paths[chosen], delay_s[chosen])
    azimuth, zenith, power, delay = (
        x.reshape(len(velocity), *x.shape[3:]).numpy()[chosen] for x in (rays.aod, rays.zod, rays.powers, rays.delays)
    )
    moving = velocity[chosen]
    correlation = _turning(azimuth, zenith, moving[:, None, None], grid).mean(2)
    scenario = model._scenario
    los = scenario.los.reshape(-1).numpy()[chosen]
    k = np.where(los, model._lsp.k_factor.reshape(-1).numpy()[chosen], 0.0)
    aod, zod = (np.radians(x.reshape(-1).numpy()[chosen]) for x in (scenario.los_aoa, scenario.los_zoa))
    direct = _turning(aod, zod, moving, grid)
    power = power / power.sum(1, keepdims=True)
    return (
        channel,
        np.concatenate([(k / (k + 1))[:, None], power / (k + 1)[:, None]], axis=1),
        np.concatenate([np.zeros((len(chosen), 1)), delay], axis=1),
        np.concatenate([direct[:, None], correlation], axis=1),
    )


def _turning(azimuth: np.ndarray, zenith: np.ndarray, velocity_mps: np.ndarray, grid: Grid) -> np.ndarray:
    """exp(j 2 pi f d): how far a ray at these angles [...] turns over each lag, for a user that moves [..., 3]; [..., D]."""
    along = (
        np.sin(zenith) * (np.cos(azimuth) * velocity_mps[..., 0] + np.sin(azimuth) * velocity_mps[..., 1])
        + np.cos(zenith) * velocity_mps[..., 2]
    )
    return np.exp(2j * np.pi / grid.wavelength_m * along[..., None] * grid.lags_s).astype(np.complex64)


def padded(statistics: Statistics, paths: int) -> Statistics:
    """The same with `paths` paths; those that are added carry no power."""
    more = paths - statistics.power.shape[1]
    if more < 0:
        raise ValueError(f"{statistics.power.shape[1]} paths do not fit into {paths}")
    pad = ((0, 0), (0, more))
    return Statistics(
        np.pad(statistics.power, pad), np.pad(statistics.delay_s, pad), np.pad(statistics.correlation, (*pad, (0, 0)))
    )


def _array(grid: Grid, antennas: int) -> PanelArray:
    return PanelArray(
        num_rows_per_panel=1, num_cols_per_panel=antennas, polarization="single", polarization_type="V", antenna_pattern="omni",
        carrier_frequency=grid.ghz * 1e9,
    )  # fmt: skip
