"""TR 38.901 channels of Sionna, projected on beams without ever building the full antenna tensor.

Sionna draws the topology, large-scale parameters and rays (TR 38.901 clause 7.5 steps 1-10). Its step 11 then forms one
complex coefficient per (ray, antenna), 20 rays x 20 clusters x 64 antennas per link, and that is where the time goes.
A uniform rectangular array separates: the response of a ray is (rows) x (columns), so the sum over the rays of a cluster
is one small matrix product. The result equals Sionna's own coefficients (a test compares them path by path).

Axis legend: D drops, U users of a drop, L clusters, M rays of a cluster, P paths, R rows, C columns, A = R*C antennas,
T instants, N beams.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from sionna.phy import SPEED_OF_LIGHT
from sionna.phy.channel.tr38901 import PanelArray, UMa, UMi
from sionna.phy.channel.tr38901.metrics import angular_spreads_from_rays, delay_spread_from_rays

# TR 38.901 Table 7.5-5: the rays of the two strongest clusters split into three sub-clusters, delayed by 0, 1.28 and
# 2.56 times the cluster delay spread.
SUBCLUSTER_RAYS = ([0, 1, 2, 3, 4, 5, 6, 7, 18, 19], [8, 9, 10, 11, 16, 17], [12, 13, 14, 15])
SUBCLUSTER_DELAY = (0.0, 1.28, 2.56)


@dataclass(frozen=True)
class Topology:
    """Where the users of a batch of drops are. The BS is at the origin, boresight along +x.

    ut_xyz_m float32 [D, U, 3], ut_velocity_mps float32 [D, U, 3], indoor bool [D, U]
    """

    ut_xyz_m: np.ndarray
    ut_velocity_mps: np.ndarray
    indoor: np.ndarray
    bs_height_m: float
    downtilt_deg: float


@dataclass(frozen=True)
class Links:
    """One batch of BS-user links: paths at the antennas and the true large-scale parameters.

    paths_DUTPA complex64 [D*U, T, P, A] (path loss, shadowing and element gains included), delay_s float32 [D*U, P];
    every parameter is a float32 or bool array [D*U].
    """

    paths: torch.Tensor
    delay_s: torch.Tensor
    los: np.ndarray
    k_factor_db: np.ndarray
    delay_spread_ns: np.ndarray
    asd_deg: np.ndarray
    asa_deg: np.ndarray
    pathloss_db: np.ndarray
    coupling_loss_db: np.ndarray


class BeamspaceChannel:
    """UMi or UMa downlink of one band from a rows x cols BS panel (vertical polarisation) to an omni user."""

    def __init__(self, scenario: str, carrier_ghz: float, rows: int, cols: int, v_spacing: float, h_spacing: float) -> None:
        self.wavelength_m = SPEED_OF_LIGHT / (carrier_ghz * 1e9)
        self.rows, self.cols, self.v_spacing, self.h_spacing = rows, cols, v_spacing, h_spacing
        # Sionna gets one element: the array is applied here, per cluster.
        element = PanelArray(1, 1, "single", "V", "38.901", carrier_ghz * 1e9)
        user = PanelArray(1, 1, "single", "V", "omni", carrier_ghz * 1e9)
        model = {"UMi": UMi, "UMa": UMa}[scenario]
        self._model = model(carrier_ghz * 1e9, "low", user, element, "downlink")
        self._pattern = element.ant_pol1

    def links(self, topology: Topology, instants_s: np.ndarray, generator: torch.Generator) -> Links:
        """Draw the channel of every user. :param instants_s: [T] relative to the position in `topology`; rays stay and
        turn by their Doppler (eq. 7.5-22), so the way covered must stay far below the decorrelation distance (7 m and up,
        Table 7.5-6)."""
        drops, users = topology.indoor.shape
        orientation = torch.tensor([0.0, math.radians(topology.downtilt_deg), 0.0]).expand(drops, 1, 3)
        self._model.reset_topology()
        self._model.set_topology(
            torch.from_numpy(topology.ut_xyz_m),
            torch.tensor([0.0, 0.0, topology.bs_height_m]).expand(drops, 1, 3).contiguous(),
            torch.zeros(drops, users, 3),
            orientation.contiguous(),
            torch.from_numpy(topology.ut_velocity_mps),
            torch.from_numpy(topology.indoor),
        )
        scenario = self._model._scenario
        lsp = self._model._lsp_sampler()
        rays = self._model._ray_sampler(lsp)
        phases = torch.rand(*rays.aod.shape, 2, generator=generator) * (2 * math.pi)
        paths, delay = self.paths(rays, lsp, phases, topology, torch.from_numpy(instants_s).float())
        spreads = angular_spreads_from_rays(rays, lsp, scenario)
        los = scenario.los[:, 0].reshape(-1)

        def flat(x: torch.Tensor) -> np.ndarray:
            return x.reshape(-1).numpy().astype(np.float32)

        return Links(
            paths=paths,
            delay_s=delay,
            los=los.numpy(),
            k_factor_db=np.where(los.numpy(), flat(10 * torch.log10(lsp.k_factor)), 0.0).astype(np.float32),
            delay_spread_ns=flat(delay_spread_from_rays(rays, lsp, scenario)) * np.float32(1e9),
            asd_deg=np.degrees(flat(spreads["asd"])),
            asa_deg=np.degrees(flat(spreads["asa"])),
            pathloss_db=flat(lsp.pathloss),
            coupling_loss_db=flat(-10 * torch.log10(paths[:, -1].abs().square().sum(1).mean(1))),
        )

    def paths(self, rays, lsp, phases, topology: Topology, instants_s: torch.Tensor):
        """Step 11 of TR 38.901 clause 7.5: rays → paths at the antennas.

        :param phases: [D, 1, U, L, M, 2] initial phases of the theta-theta and theta-phi terms; a vertically polarised
            user sees only those two
        :returns: (complex64 [D*U, T, P, A], delays float32 [D*U, P])
        """
        scenario = self._model._scenario

        def links(x: torch.Tensor) -> torch.Tensor:  # [D, 1, U, ...] → [D*U, ...]
            return x.squeeze(1).flatten(0, 1)

        aod, zod, aoa, zoa = (links(x) for x in (rays.aod, rays.zod, rays.aoa, rays.zoa))
        phase, xpr = links(phases), links(rays.xpr)
        amplitude, slant = self._element(zod, aod, topology.downtilt_deg)
        ray = torch.polar(torch.cos(slant), phase[..., 0]) + torch.polar(torch.sin(slant) / xpr.sqrt(), phase[..., 1])
        ray = ray * (amplitude * (links(rays.powers).unsqueeze(-1) / aod.shape[-1]).sqrt())
        velocity = torch.from_numpy(topology.ut_velocity_mps).reshape(-1, 1, 1, 3)
        doppler = self._doppler(zoa, aoa, velocity)
        vertical, horizontal = self._steering(zod, aod, topology.downtilt_deg)

        strongest = links(rays.strongest_cluster_indices)
        cluster_ds = links(scenario.get_param("cDS") * 1e-9)
        paths, delays = self._reduce(ray, doppler, vertical, horizontal, links(rays.delays), strongest, cluster_ds, instants_s)
        return self._add_los(paths, delays, lsp, topology, velocity, instants_s)

    def _local(self, zenith: torch.Tensor, azimuth: torch.Tensor, downtilt_deg: float):
        """Unit direction in the tilted panel's own axes (eq. 7.1-7/8 for bearing 0): x out, y right, z up."""
        tilt = math.radians(downtilt_deg)
        x = torch.sin(zenith) * torch.cos(azimuth)
        y = torch.sin(zenith) * torch.sin(azimuth)
        z = torch.cos(zenith)
        return x * math.cos(tilt) - z * math.sin(tilt), y, x * math.sin(tilt) + z * math.cos(tilt)

    def _element(self, zenith: torch.Tensor, azimuth: torch.Tensor, downtilt_deg: float):
        """Element amplitude (Table 7.3-1) and the polarisation turn psi by the tilt (eq. 7.1-15)."""
        x, y, z = self._local(zenith, azimuth, downtilt_deg)
        theta = torch.acos(z.clamp(-1.0, 1.0))
        amplitude, _ = self._pattern.field(theta, torch.atan2(y, x))
        tilt = math.radians(downtilt_deg)
        real = math.cos(tilt) * torch.sin(zenith) - math.sin(tilt) * torch.cos(zenith) * torch.cos(azimuth)
        return amplitude, torch.atan2(math.sin(tilt) * torch.sin(azimuth), real)

    def _steering(self, zenith: torch.Tensor, azimuth: torch.Tensor, downtilt_deg: float):
        """Row and column responses complex64 [..., R] and [..., C], phase centre in the middle of the panel."""
        _, y, z = self._local(zenith, azimuth, downtilt_deg)
        rows = (torch.arange(self.rows) - (self.rows - 1) / 2) * (-2 * math.pi * self.v_spacing)
        cols = (torch.arange(self.cols) - (self.cols - 1) / 2) * (2 * math.pi * self.h_spacing)
        one = torch.ones(())
        return torch.polar(one, z.unsqueeze(-1) * rows), torch.polar(one, y.unsqueeze(-1) * cols)

    def _doppler(self, zenith: torch.Tensor, azimuth: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """Phase rate of a ray [rad/s] for a moving user."""
        along = (
            torch.sin(zenith) * (torch.cos(azimuth) * velocity[..., 0] + torch.sin(azimuth) * velocity[..., 1])
            + torch.cos(zenith) * velocity[..., 2]
        )
        return along * (2 * math.pi / self.wavelength_m)

    def _reduce(self, ray, doppler, vertical, horizontal, delays, strongest, cluster_ds, instants_s):
        """Sum the rays of every cluster, and of every sub-cluster of the two strongest (Table 7.5-5)."""
        n = ray.shape[0]
        pick = torch.arange(n).unsqueeze(-1)
        weak = torch.ones(ray.shape[:2])
        weak[pick, strongest] = 0.0
        paths = []
        for t in instants_s.tolist():
            turned = ray if t == 0.0 else ray * torch.polar(torch.ones(()), doppler * t)
            rows = vertical * turned.unsqueeze(-1)  # [n, L, M, R]
            parts = [_outer_sum(rows * weak[..., None, None], horizontal)]
            rows_2, cols_2 = rows[pick, strongest], horizontal[pick, strongest]
            parts += [_outer_sum(rows_2[:, :, members], cols_2[:, :, members]) for members in SUBCLUSTER_RAYS]
            paths.append(torch.cat(parts, dim=1))
        strong_delay = torch.gather(delays, 1, strongest)
        late = [strong_delay + offset * cluster_ds.unsqueeze(-1) for offset in SUBCLUSTER_DELAY]
        return torch.stack(paths, dim=1), torch.cat([delays, *late], dim=1)

    def _add_los(self, paths, delays, lsp, topology: Topology, velocity, instants_s):
        """Add the LoS path with the K factor (eq. 7.5-29/30), then path loss and shadowing (step 12)."""
        scenario = self._model._scenario
        rad = math.pi / 180.0

        def links(x: torch.Tensor) -> torch.Tensor:
            return x[:, 0].reshape(-1)

        aod, zod, aoa, zoa = (links(x) * rad for x in (scenario.los_aod, scenario.los_zod, scenario.los_aoa, scenario.los_zoa))
        amplitude, slant = self._element(zod, aod, topology.downtilt_deg)
        vertical, horizontal = self._steering(zod, aod, topology.downtilt_deg)
        array = (horizontal.unsqueeze(-1) * vertical.unsqueeze(-2)).flatten(-2)  # column first
        rate = self._doppler(zoa, aoa, velocity[:, 0, 0])
        turn = rate.unsqueeze(-1) * instants_s - (2 * math.pi / self.wavelength_m) * links(scenario.distance_3d).unsqueeze(-1)
        is_los = links(scenario.los)
        k = torch.where(is_los, links(lsp.k_factor), torch.zeros(()))
        direct = torch.polar(torch.ones(()), turn) * (amplitude * torch.cos(slant) * (k / (k + 1)).sqrt()).unsqueeze(-1)
        direct = direct[:, :, None, None] * array[:, None, None, :]
        paths = paths * (1 / (k + 1)).sqrt()[:, None, None, None]
        gain = 10 ** (-links(lsp.pathloss) / 20) * links(lsp.sf).sqrt()
        paths = torch.cat([direct, paths], dim=2) * gain[:, None, None, None]
        return paths, torch.cat([torch.zeros(len(k), 1), delays], dim=1)


def _outer_sum(rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """[n, L, M, R], [n, L, M, C] → sum over rays of the outer products, column first: [n, L, C*R]."""
    return torch.matmul(cols.transpose(-1, -2), rows).flatten(-2)


def beam_rsrp_dbm(
    paths: torch.Tensor,
    delay_s: torch.Tensor,
    beams: torch.Tensor,
    tx_power_per_re_dbm: float,
    n_re: int,
    scs_khz: float,
) -> np.ndarray:
    """RSRP of every beam: received power per RE, averaged over the `n_re` adjacent REs of the reference signal.

    The mean over subcarriers of |sum_p a_p exp(-j 2 pi f tau_p)|^2 is the quadratic form a^H D a with the Dirichlet
    kernel D_pq = sin(pi n x)/(n sin(pi x)), x = scs*(tau_p - tau_q): exact, and cheaper than any frequency grid.

    :param paths: complex64 [B, T, P, A]; :param delay_s: [B, P]; :param beams: complex64 [N, A]
    :returns: float32 [B, T, N] [dBm]
    """
    beamed = paths @ beams.T  # [B, T, P, N]
    x = (delay_s.unsqueeze(-1) - delay_s.unsqueeze(-2)) * (scs_khz * 1e3)
    near = x.abs() < 1e-9
    safe = torch.where(near, torch.full_like(x, 0.5), x)
    kernel = torch.sin(math.pi * n_re * safe) / (n_re * torch.sin(math.pi * safe))
    kernel = torch.where(near, torch.ones_like(x), kernel).unsqueeze(1)
    # Centring the band makes the kernel real: D acts on real and imaginary parts alike.
    shift = torch.polar(torch.ones(()), delay_s * (-math.pi * (n_re - 1) * scs_khz * 1e3))
    beamed = torch.view_as_real(beamed * shift[:, None, :, None]).flatten(-2)  # [B, T, P, 2N]
    power = (beamed * (kernel @ beamed)).sum(2)
    power = power.unflatten(-1, (-1, 2)).sum(-1).clamp_min(1e-30)
    return (10.0 * torch.log10(power) + tx_power_per_re_dbm).numpy()
