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
    TO_LAG_AND_POWER,
    cleaned,
    continued,
    lines_of,
    patches_of,
    planes_of,
    products_of,
)

TO_FACTOR = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, -1.0, 1.0, 0.0]])
"""A complex number as the matrix that planes (re, im) are multiplied by."""


@dataclass(frozen=True)
class Turn:
    """How a sample is brought to zero mean Doppler, delay and angle, zero phase and unit power: exactly, and exactly back.

    A user who moves at another speed, or stands at another distance, multiplies the channel by a phase that is linear in
    time, or frequency; where all paths share it, only this ramp differs between carriers, speeds and cells.
    step_B3: phase from one instant, antenna, subcarrier to the next, rad; of the sum of all lag-one products that lie
    within a visible patch, so any mask will do. cos_B1Ln: the cosine of that phase at every entry; sin_B2Ln: its sine, less
    and plus. into_B22, back_B22: phase and level of the whole, as matrices for planes (re, im).
    """

    step_B3: Tensor
    cos_B1Ln: Tensor
    sin_B2Ln: Tensor
    into_B22: Tensor
    back_B22: Tensor

    def into(self, patches_BLE: Tensor) -> Tensor:
        """Patches [B, L, E] in the frame in which samples are alike."""
        return patches_of(_times(_rotated(planes_of(patches_BLE), self.cos_B1Ln, self.sin_B2Ln), self.into_B22))

    def back(self, patches_BLE: Tensor) -> Tensor:
        """The inverse of `into`."""
        return patches_of(self.planes_back(planes_of(patches_BLE)))

    def planes_back(self, planes_B2Ln: Tensor) -> Tensor:
        """`back` of planes."""
        scaled = _times(planes_B2Ln, self.back_B22)
        return scaled * self.cos_B1Ln + scaled.flip(1) * self.sin_B2Ln

    def behind(self, seen: int) -> "Turn":
        """That of the patches behind the first `seen`."""
        return Turn(self.step_B3, self.cos_B1Ln[:, :, seen:], self.sin_B2Ln[:, :, seen:], self.into_B22, self.back_B22)


@dataclass(frozen=True)
class Aligned:
    """A sample in the frame of its turn.

    patches_BLE: the visible patches, then for each wanted one what the run says of it. run_B2Mn: the run as planes. turn: that
    of the wanted patches.
    """

    patches_BLE: Tensor
    run_B2Mn: Tensor
    turn: Turn

    def answer(self, trust_BMn: Tensor, change_BME: Tensor) -> Tensor:
        """The wanted patches [B, M, E], out of the frame: the run, each entry times 1 + trust, and the change against it."""
        return patches_of(self.turn.planes_back(self.run_B2Mn * (1.0 + trust_BMn)[:, None] + planes_of(change_BME)))


def aligned(patches_BVE: Tensor, visible_at: Tensor, wanted_at: Tensor, noise: Tensor | float) -> Aligned:
    """Turn a sample, and run its visible patches on to the wanted ones.

    Where no run leads to a wanted patch, the nearest visible one is repeated (in the turned frame, so that its ramps go on).
    noise: its power over the channel's, which is taken out of the run.
    """
    patches, seen = patches_BVE.float(), patches_BVE.shape[1]
    planes, lines = planes_of(patches), lines_of(patches)
    products = products_of(lines)
    run, moves, near_BMV = continued(planes, visible_at, wanted_at, cleaned(lines, products, noise))
    at = torch.cat([visible_at, wanted_at], dim=1)
    planes, turn = _turned(torch.cat([planes, run], dim=2), at, products, seen)
    visible, run = planes[:, :, :seen], planes[:, :, seen:]
    run = torch.where(moves[:, None], run, near_BMV[:, None] @ visible)
    return Aligned(patches_of(torch.cat([visible, run], dim=2)), run, turn.behind(seen))


def _turned(planes_B2Ln: Tensor, at: Tensor, products: Tensor, seen: int) -> tuple[Tensor, Turn]:
    """All patches in the frame of the first `seen`, of whose lines `products` are."""
    steps, power = _steps_and_power(products, seen)
    to_patch = at.to(steps.dtype) @ (PATCH * steps)[:, :, None]
    inside = torch.cartesian_prod(*[torch.arange(PATCH, dtype=steps.dtype, device=at.device)] * 3)
    within = steps[:, None] @ inside.T
    # Sines are slow: few of them, and their products. cos(x) is sin(x + pi / 2).
    quarters = (math.pi / 2) * torch.tensor([1, 0, 1, 2, 2, 3, 0, 1], dtype=steps.dtype, device=at.device)
    of_patch = torch.sin(to_patch + quarters[:2])  # cos, sin
    of_entry = torch.sin(within + quarters[2:, None])  # for the cosine of the sum, its sine with minus, its sine
    cos, sin = (of_patch[:, None] @ of_entry.unflatten(1, (3, 2))).float().split([1, 2], dim=1)
    turned = _rotated(planes_B2Ln, cos, sin)
    total = turned[:, :, :seen].double().sum(dim=(2, 3))
    unit = total / torch.sqrt((total * total).sum(dim=-1, keepdim=True)).clamp_min(1e-9)
    level = torch.sqrt(power).clamp_min(1e-6)[..., None]
    factor = (unit @ TO_FACTOR.to(unit)).unflatten(-1, (2, 2))
    into, back = (factor.transpose(1, 2) / level).float(), (factor * level).float()
    return _times(turned, into), Turn(steps.float(), cos, sin, into, back)


def _steps_and_power(products: Tensor, seen: int) -> tuple[Tensor, Tensor]:
    """Phase [B, 3] of the mean lag-one product along instants, antennas and subcarriers, and the mean power [B, 1]."""
    found = products @ TO_LAG_AND_POWER.to(products)
    # Onnxruntime has no arctangent in double precision; any step near the mean will do, as long as it is undone exactly.
    steps = torch.atan2(*(found[..., i].float() for i in (1, 0)))
    return steps.to(products.dtype), found[:, 0, 2:] / (seen * PATCH**3)


def _rotated(planes_B2Ln: Tensor, cos_B1Ln: Tensor, sin_B2Ln: Tensor) -> Tensor:
    """Every entry against the phase that its place has in `Turn`."""
    return planes_B2Ln * cos_B1Ln - planes_B2Ln.flip(1) * sin_B2Ln


def _times(planes_B2Ln: Tensor, factor_B22: Tensor) -> Tensor:
    """Planes times a complex factor of each sample."""
    return (factor_B22 @ planes_B2Ln.flatten(2)).unflatten(2, planes_B2Ln.shape[2:])


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
