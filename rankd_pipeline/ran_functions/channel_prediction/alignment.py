"""What a channel's paths have in common: ramps of phase over time, antennas and frequency, taken out of it exactly.

A user at another speed or distance multiplies the channel by a phase that is linear in time, or frequency. A network that sees
a channel and its run (runs.py) in the frame of `Turn`, and learns the change against the run, need not learn any of it for
every carrier, speed and delay anew. Phases are in double precision, as far as they grow.

Shapes as in runs.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankd_pipeline.ran_functions.channel_prediction.config import PATCH
from rankd_pipeline.ran_functions.channel_prediction.runs import (
    TO_LAG,
    TO_POWER,
    bounded,
    cleaned,
    continued,
    lines_of,
    patches_of,
    planes_of,
    products_of,
    way_on,
)

TO_FACTOR = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, -1.0, 1.0, 0.0]])
"""A complex number as the matrix that planes (re, im) are multiplied by."""


@dataclass(frozen=True)
class Turn:
    """How a sample is brought to zero mean Doppler, delay and angle, zero phase and unit power: exactly, and exactly back.

    A user who moves at another speed, or stands at another distance, multiplies the channel by a phase that is linear in
    time, or frequency; where all paths share it, only this ramp differs between carriers, speeds and cells.
    step_B3: phase from one instant, antenna, subcarrier to the next, rad; of the sum of all lag-one products that lie
    within a visible patch, so any mask will do. cos_B1N: the cosine of that phase at every entry; sin_B2N: its sine, less
    and plus. into_B22, back_B22: phase and level of the whole, as matrices for planes (re, im).
    """

    step_B3: Tensor
    cos_B1N: Tensor
    sin_B2N: Tensor
    into_B22: Tensor
    back_B22: Tensor

    def into(self, patches_BLE: Tensor) -> Tensor:
        """Patches [B, L, E] in the frame in which samples are alike."""
        return patches_of(self.into_B22 @ _rotated(planes_of(patches_BLE), self.cos_B1N, self.sin_B2N))

    def back(self, patches_BLE: Tensor) -> Tensor:
        """The inverse of `into`."""
        scaled = self.back_B22 @ planes_of(patches_BLE)
        return patches_of(scaled * self.cos_B1N + scaled.flip(1) * self.sin_B2N)

    def behind(self, seen: int) -> "Turn":
        """That of the patches behind the first `seen`."""
        at = seen * PATCH**3
        return Turn(self.step_B3, self.cos_B1N[:, :, at:], self.sin_B2N[:, :, at:], self.into_B22, self.back_B22)


@dataclass(frozen=True)
class Aligned:
    """A sample in the frame of its turn.

    patches_BLE: the visible patches, then for each wanted one what the run says of it. run_BME: the latter alone. turn: that
    of the wanted patches.
    """

    patches_BLE: Tensor
    run_BME: Tensor
    turn: Turn

    def answer(self, trust_BME: Tensor, change_BME: Tensor) -> Tensor:
        """The wanted patches [B, M, E], out of the frame: the run, each number times its trust, and the change against it."""
        return self.turn.back(self.run_BME * trust_BME + change_BME)


def aligned(patches_BVE: Tensor, visible_at: Tensor, wanted_at: Tensor, noise: Tensor | float) -> Aligned:
    """Turn a sample, and run its visible patches on to the wanted ones.

    Where no run leads to a wanted patch, the nearest visible one is repeated (in the turned frame, so that its ramps go on).
    noise: its power over the channel's, which is taken out of the run.
    """
    patches, seen = patches_BVE.float(), patches_BVE.shape[1]
    lines = lines_of(patches)
    products = products_of(lines)
    way = way_on(visible_at, wanted_at)
    run, moves = continued(way, cleaned(way, lines, products, noise))
    planes = bounded(planes_of(torch.cat([patches, run], dim=1)), seen)
    planes, turn = _turned(planes, torch.cat([visible_at, wanted_at], dim=1), products, seen)
    visible, run = patches_of(planes).tensor_split([seen], dim=1)
    run = torch.where(moves, run, way.near_BMV @ visible)
    return Aligned(torch.cat([visible, run], dim=1), run, turn.behind(seen))


def _turned(planes_B2N: Tensor, at: Tensor, products: Tensor, seen: int) -> tuple[Tensor, Turn]:
    """All patches in the frame of the first `seen`, of whose lines `products` are."""
    half_steps = _half_steps(products)
    to_patch = at.to(half_steps.dtype) @ (2 * PATCH * half_steps)
    inside = torch.cartesian_prod(*[torch.arange(PATCH, dtype=half_steps.dtype, device=at.device)] * 3)
    within = (2 * inside) @ half_steps
    # Sines are slow: few of them, and their products. cos(x) is sin(x + pi / 2).
    quarters = (math.pi / 2) * torch.tensor([1, 0, 1, 2, 2, 3, 0, 1], dtype=half_steps.dtype, device=at.device)
    of_patch = torch.sin(to_patch + quarters[:2]).float()  # cos, sin
    of_entry = torch.sin(within + quarters[2:]).float()  # for the cosine of the sum, its sine with minus, its sine
    cos, sin = (of_patch[:, None] @ of_entry.transpose(1, 2).unflatten(1, (3, 2))).flatten(2).split([1, 2], dim=1)
    turned = _rotated(planes_B2N, cos, sin)
    total = turned[:, :, : seen * PATCH**3].double().sum(dim=-1)
    power = products[:, 0] @ (TO_POWER / (seen * PATCH**3)).to(products)
    scale = torch.sqrt((total * total).sum(dim=-1, keepdim=True) * power)
    # The phase of the whole over the root of its power: times the power, it is the way back. (In double precision until here:
    # a product of single numbers with constants is taken for a layer, and put into eight bits, by whoever makes an INT8 file.)
    back = (total / scale.clamp_min(1e-15) @ TO_FACTOR.to(total)).float().unflatten(-1, (2, 2))
    into = back.transpose(1, 2)
    return into @ turned, Turn(2 * half_steps[..., 0].float(), cos, sin, into, back * power.float()[:, None])


def _half_steps(products: Tensor) -> Tensor:
    """Half the phase [B, 3, 1] of the mean lag-one product along instants, antennas and subcarriers.

    An arctangent of two arguments is many operators in a runtime; tan(x / 2) = sin(x) / (1 + cos(x)) takes one of one
    argument. The least number in the numerator makes a product that is real and negative pi.
    """
    found = products @ TO_LAG.to(products)
    size = torch.sqrt((found * found).sum(dim=-1, keepdim=True))
    tangent = (found[..., 1:] + 1e-30) / (size + found[..., :1]).clamp_min(1e-36)
    # Onnxruntime has no arctangent in double precision; any step near the mean will do, as long as it is undone exactly.
    return torch.atan(tangent.float()).to(products.dtype)


def _rotated(planes_B2N: Tensor, cos_B1N: Tensor, sin_B2N: Tensor) -> Tensor:
    """Every entry against the phase that its place has in `Turn`."""
    return planes_B2N * cos_B1N - planes_B2N.flip(1) * sin_B2N


def mirrored(csi_BLE: Tensor, grid: Sequence[int]) -> Tensor:
    """Patches [B, L, E] of a grid (time, antenna, frequency), each sample mirrored by chance along each of the three axes.

    Along time it runs backwards, along antennas it is seen from the panel's other side; along frequency it is conjugated
    too, because reversal alone would turn delays into advances.
    """
    x = csi_BLE.unflatten(1, tuple(grid)).unflatten(-1, (PATCH, PATCH, PATCH, 2))
    sign = torch.tensor([1.0, -1.0], device=x.device)
    for axis in range(3):
        turned = x.flip(1 + axis, 4 + axis)
        chosen = torch.rand(len(x), device=x.device) < 0.5
        x = torch.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), turned * sign if axis == 2 else turned, x)
    return x.reshape(csi_BLE.shape)
