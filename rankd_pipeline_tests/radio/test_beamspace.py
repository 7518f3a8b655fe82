"""The beamspace channel: equal to Sionna's own antenna coefficients path by path, and to plain OFDM in its RSRP."""

from typing import Any

import numpy as np
import pytest
import torch
from sionna.phy.channel.tr38901 import ChannelCoefficientsGenerator, PanelArray
from sionna.phy.channel.tr38901 import Topology as SionnaTopology
from sionna.phy.channel.utils import deg_2_rad

from rankd_pipeline.radio.beamspace import BeamspaceChannel, Topology, beam_rsrp_dbm
from rankd_pipeline.radio.codebooks import dft_codebook
from rankd_pipeline.radio.seeding import seeded

ROWS, COLS = 2, 3
RATE_HZ = 50.0


def topology(
    drops: int, users: int, speed_mps: float, indoor_share: float = 0.3, downtilt_deg: float = 7.0, seed: int = 2
) -> Topology:
    rng = np.random.default_rng(seed)
    radius, azimuth = rng.uniform(25, 150, (drops, users)), np.radians(rng.uniform(-60, 60, (drops, users)))
    place = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), np.full_like(radius, 1.5)], -1)
    heading = rng.uniform(-np.pi, np.pi, (drops, users))
    velocity = speed_mps * np.stack([np.cos(heading), np.sin(heading), np.zeros_like(heading)], -1)
    indoor = rng.random((drops, users)) < indoor_share
    return Topology(place.astype(np.float32), velocity.astype(np.float32), indoor, 10.0, downtilt_deg)


class Recorder:
    """One of Sionna's samplers that also remembers what it drew last."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.last = inner, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any) -> Any:
        self.last = self.inner(*args)
        return self.last


def recorded(model: torch.nn.Module, name: str) -> Recorder:
    """Puts a Recorder in the place of a submodule."""
    recorder = Recorder(model._modules.pop(name))
    model.__dict__[name] = recorder
    return recorder


def by_delay(delay_s: np.ndarray, paths: np.ndarray) -> dict[float, np.ndarray]:
    """Delay rounded to 0.1 ns → coefficients [T, A] of all paths there; those without power are left out."""
    found: dict[float, np.ndarray] = {}
    for delay, path in zip(np.round(delay_s * 1e10), np.moveaxis(paths, 1, 0), strict=True):
        if np.abs(path).max() > 0:
            found[delay] = found.get(delay, 0) + path
    return found


@pytest.mark.parametrize("scenario", ["UMi", "UMa"])
def test_equals_sionna_path_by_path(scenario):
    """Same rays, same phases: every path at every antenna and instant, LoS, NLoS and indoor, tilted panel, moving user."""
    top = topology(2, 5, speed_mps=8.0)
    instants = np.arange(3) / RATE_HZ
    with seeded(4):
        channel = BeamspaceChannel(scenario, 3.5, ROWS, COLS, 0.5, 0.7)
        model = channel._model
        lsp_sampler, ray_sampler = recorded(model, "_lsp_sampler"), recorded(model, "_ray_sampler")
        links = channel.links(top, instants, torch.Generator().manual_seed(9))
        scenario_, lsp, rays = model._scenario, lsp_sampler.last, ray_sampler.last
        panel = PanelArray(ROWS, COLS, "single", "V", "38.901", 3.5e9, element_vertical_spacing=0.5, element_horizontal_spacing=0.7)
        generator = ChannelCoefficientsGenerator(3.5e9, panel, PanelArray(1, 1, "single", "V", "omni", 3.5e9), True)
        drawn = torch.rand(*rays.aod.shape, 2, generator=torch.Generator().manual_seed(9)) * (2 * np.pi)
        # A vertically polarised user sees the theta-theta and theta-phi terms only; the others may be anything.
        rays.phases = torch.cat([drawn, torch.zeros_like(drawn)], -1)
        angles = {name: deg_2_rad(getattr(scenario_, name)) for name in ("los_aoa", "los_aod", "los_zoa", "los_zod")}
        where = SionnaTopology(
            velocities=scenario_.ut_velocities, moving_end="rx", los=scenario_.los, distance_3d=scenario_.distance_3d,
            tx_orientations=scenario_.bs_orientations, rx_orientations=scenario_.ut_orientations, **angles,
        )  # fmt: skip
        h, delay = generator(3, RATE_HZ, lsp.k_factor, rays, where, scenario_.get_param("cDS") * 1e-9)
        h = model._step_12(h, lsp.sf, lsp.pathloss)  # [D, 1, U, P, 1, A, T]
    theirs = h[:, 0, :, :, 0].permute(0, 1, 4, 2, 3).flatten(0, 1).numpy()  # [D*U, T, P, A]
    delay = delay[:, 0].flatten(0, 1).numpy()
    assert links.los.any() and not links.los.all() and top.indoor.any()
    for user in range(len(theirs)):
        ours = by_delay(links.delay_s[user].numpy(), links.paths[user].numpy())
        expected = by_delay(delay[user], theirs[user])
        assert ours.keys() == expected.keys()
        scale = max(np.abs(path).max() for path in expected.values())
        for at, path in expected.items():
            # The direct path turns by some 10,000 rad on its way, which float32 holds to 1e-3.
            assert np.abs(ours[at] - path).max() < 1e-3 * scale


def test_beams_of_a_unitary_codebook_share_out_all_the_power():
    with seeded(1):
        links = BeamspaceChannel("UMi", 28.0, 4, 8, 0.5, 0.5).links(topology(3, 4, 1.0), np.array([-0.02, 0.0]), torch.Generator())
    narrow = torch.from_numpy(dft_codebook(4, 8))
    beamed = (links.paths @ narrow.T).abs().square().sum(-1)
    assert torch.allclose(beamed, links.paths.abs().square().sum(-1), rtol=1e-4, atol=0)
    # Coupling loss is the loss per element, of the newest instant, over all paths.
    element = links.paths[:, -1].abs().square().sum(1).mean(1)
    assert np.allclose(links.coupling_loss_db, -10 * np.log10(element.numpy()), atol=1e-3)


def test_the_rays_of_an_array_carry_the_power_of_one_element():
    """Path loss, shadowing and element gain do not depend on the size of the array: only phases do."""
    level = []
    for rows, cols in ((1, 1), (4, 8)):
        with seeded(3):
            links = BeamspaceChannel("UMi", 3.5, rows, cols, 0.5, 0.5).links(
                topology(40, 4, 0.0), np.zeros(1), torch.Generator().manual_seed(1)
            )
        level.append(links)
    assert np.array_equal(level[0].pathloss_db, level[1].pathloss_db)
    assert np.median(level[0].coupling_loss_db) == pytest.approx(np.median(level[1].coupling_loss_db), abs=1.0)


def test_rsrp_equals_the_mean_over_plain_subcarriers():
    generator = torch.Generator().manual_seed(0)
    paths = torch.complex(torch.randn(5, 2, 7, 6, generator=generator), torch.randn(5, 2, 7, 6, generator=generator))
    delay_s = torch.rand(5, 7, generator=generator) * 2e-6
    delay_s[:, 1] = delay_s[:, 0]  # paths at one delay add up coherently
    beams = torch.from_numpy(dft_codebook(2, 3))
    ours = beam_rsrp_dbm(paths, delay_s, beams, tx_power_per_re_dbm=12.0, n_re=127, scs_khz=30.0)
    frequency = np.arange(127) * 30e3
    response = np.einsum("btpn,bpf->btnf", (paths @ beams.T).numpy(), np.exp(-2j * np.pi * delay_s.numpy()[..., None] * frequency))
    expected = 10 * np.log10((np.abs(response) ** 2).mean(-1)) + 12.0
    assert ours.dtype == np.float32 and ours.shape == (5, 2, 6)
    assert np.abs(ours - expected).max() < 0.02


def test_no_signal_is_very_weak_and_finite():
    silent = torch.zeros(1, 1, 3, 4, dtype=torch.complex64)
    assert beam_rsrp_dbm(silent, torch.zeros(1, 3), torch.eye(4, dtype=torch.complex64), 0.0, 127, 30.0).max() == -300.0


def test_the_channel_evolves_coherently_with_speed():
    """A still user sees one channel at every instant; the faster, the less of it is left 20 ms later."""
    left = []
    for speed_kmh in (0.0, 0.5, 2.0, 30.0):
        with seeded(6):
            top = topology(10, 4, speed_kmh / 3.6, indoor_share=0.0)
            links = BeamspaceChannel("UMi", 3.5, 2, 4, 0.5, 0.5).links(
                top, np.array([-0.02, 0.0]), torch.Generator().manual_seed(2)
            )
        before, now = links.paths[:, 0].flatten(1), links.paths[:, 1].flatten(1)
        inner = (before.conj() * now).sum(1).abs()
        left.append((inner / (before.norm(dim=1) * now.norm(dim=1)))[torch.from_numpy(~links.los)].mean().item())
    assert left[0] == pytest.approx(1, abs=1e-5)
    assert left == sorted(left, reverse=True) and left[1] > 0.9 and left[3] < 0.6
