"""What a channel's paths have in common, taken out of it exactly: ramps of phase, and the linear run of a few paths.

A user at another speed or distance multiplies the channel by a phase that is linear in time, or frequency; a few paths make a
sum of such ramps, which an autoregressive model continues. A network between `Turn.into` and `Turn.back`, which learns the
change against `continued`, need not learn either for every carrier, speed and delay anew.

Shapes: B samples, V visible and M wanted patches, E = 2 * PATCH**3 real numbers a patch. Complex numbers stand as real ones,
because ONNX has no others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, PATCH

ORDER = PATCH - 1
"""Of the autoregressive model: its windows lie within one patch, so that any mask leaves some."""
REACH = 4
"""Patches that a run is continued over; behind them its last value stays."""


@dataclass(frozen=True)
class Turn:
    """How a sample is brought to zero mean Doppler, delay and angle, zero phase and unit power: exactly, and exactly back.

    A user who moves at another speed, or stands at another distance, multiplies the channel by a phase that is linear in
    time, or frequency; where all paths share it, only this ramp differs between carriers, speeds and cells.
    step_B3: phase from one instant, antenna, subcarrier to the next, rad; of the sum of all lag-one products that lie
    within a visible patch, so any mask will do. re_BMn, im_BMn: what each wanted entry is multiplied by on the way back.
    level_B: root of the mean power.
    """

    step_B3: Tensor
    re_BMn: Tensor
    im_BMn: Tensor
    level_B: Tensor

    @staticmethod
    def of(patches_BVE: Tensor, visible_at: Tensor, wanted_at: Tensor) -> "tuple[Tensor, Turn]":
        """The visible patches as the network sees them, and the turn for the wanted ones."""
        re, im = _parts(patches_BVE.float())
        step = _mean_steps(re, im)
        seen = visible_at.shape[1]
        inside = torch.cartesian_prod(*[torch.arange(PATCH, dtype=torch.float32, device=re.device)] * 3)
        to_patch = (PATCH * torch.cat([visible_at, wanted_at], dim=1).float() * step[:, None]).sum(dim=-1)
        angle = to_patch[..., None] + (inside * step[:, None]).sum(dim=-1)[:, None]
        cos, sin = torch.cos(angle), torch.sin(angle)
        level = torch.sqrt((re * re + im * im).mean(dim=(1, 2, 3, 4))).clamp_min(1e-6)
        re, im = _rotated(re.flatten(2), im.flatten(2), cos[:, :seen], -sin[:, :seen])
        total_re, total_im = re.sum(dim=(1, 2)), im.sum(dim=(1, 2))
        size = torch.sqrt(total_re**2 + total_im**2).clamp_min(1e-9)
        u_re, u_im = ((part / size * level)[:, None, None] for part in (total_re, total_im))
        turn = Turn(step, *_rotated(cos[:, seen:], sin[:, seen:], u_re, u_im), level)
        return _joined(*_rotated(re, im, u_re, -u_im)) / (level * level)[:, None, None], turn

    def back(self, patches_BME: Tensor) -> Tensor:
        """Wanted patches [B, M, E] out of the network's frame."""
        re, im = _parts(patches_BME.float())
        return _joined(*_rotated(re.flatten(2), im.flatten(2), self.re_BMn, self.im_BMn))

    def into(self, patches_BME: Tensor) -> Tensor:
        """The inverse of `back`."""
        re, im = _parts(patches_BME.float())
        return _joined(*_rotated(re.flatten(2), im.flatten(2), self.re_BMn, -self.im_BMn)) / (self.level_B**2)[:, None, None]


def _mean_steps(re: Tensor, im: Tensor) -> Tensor:
    """Phase [B, 3] of the mean lag-one product along instants, antennas and subcarriers."""
    sums = []
    for axis in (2, 3, 4):
        (a, b), (c, d) = ((part.narrow(axis, 1, PATCH - 1), part.narrow(axis, 0, PATCH - 1)) for part in (re, im))
        sums.append([(x * y + z * w).sum(dim=(1, 2, 3, 4)) for x, y, z, w in ((a, b, c, d), (c, b, -a, d))])
    return torch.atan2(*(torch.stack([pair[i] for pair in sums], dim=1) for i in (1, 0)))


def _rotated(re: Tensor, im: Tensor, by_re: Tensor, by_im: Tensor) -> tuple[Tensor, Tensor]:
    """A complex product."""
    return re * by_re - im * by_im, re * by_im + im * by_re


def _joined(re: Tensor, im: Tensor) -> Tensor:
    """Patches [B, L, E] from real and imaginary parts [B, L, PATCH**3]."""
    return torch.stack([re, im], dim=-1).flatten(2)


def continued(patches_BVE: Tensor, visible_at: Tensor, wanted_at: Tensor, ridge: float = 1e-2) -> Tensor:
    """Each wanted patch [B, M, E] as the run of the nearest visible one, over time or, at the same time, over frequency.

    Autoregressive models of order 3 along both axes, fitted to each sample by ridge least squares over the windows of all its
    visible patches, forwards and (conjugated) backwards. Nothing gets larger than the largest entry that was seen.
    """
    re, im = _parts(patches_BVE.float())
    away = (wanted_at[:, :, None] - visible_at[:, None]).float().abs() * torch.tensor([1.0, 4.0, 1.0], device=re.device)
    nearest_BM1 = away.sum(dim=-1).argmin(dim=-1, keepdim=True)
    offset_BM3 = wanted_at.float() - visible_at.float().gather(1, nearest_BM1.expand(-1, -1, 3))
    source = patches_BVE.float().gather(1, nearest_BM1.expand(-1, -1, ELEMENTS))
    lines = torch.stack([_lines(patches_BVE.float(), axis).flatten(1, 2) for axis in (0, 2)], dim=1)
    weights = several_steps(fitted(lines.transpose(-1, -2).contiguous(), ridge)).flatten(3)
    over_time = offset_BM3[..., :1] != 0
    ahead = torch.where(over_time, offset_BM3[..., :1], offset_BM3[..., 2:])
    of_axis = torch.where(over_time[..., None], _lines(source, 0), _lines(source, 2))
    step_BMP = _steps_ahead(ahead)
    at_step = step_BMP + torch.where(over_time, 0, REACH * PATCH)
    chosen = weights.flatten(1, 2).gather(1, at_step.flatten(1)[..., None].expand(-1, -1, 4 * ORDER))
    run = _run(of_axis, ahead[..., None] >= 0, chosen.unflatten(1, step_BMP.shape[1:]).unflatten(-1, (2, 2 * ORDER)))
    values = torch.where(over_time, _unlined(run, 0), _unlined(run, 2))
    values = torch.where(ahead != 0, values, source).unflatten(-1, (-1, 2))
    bound = torch.sqrt((re * re + im * im).flatten(1).amax(dim=1))[:, None, None, None]
    size = torch.sqrt((values * values).sum(dim=-1, keepdim=True)).clamp_min(1e-9)
    return (values * torch.clamp(bound / size, max=1.0)).flatten(2)


def fitted(windows: Tensor, ridge: float) -> Tensor:
    """Weights [..., 2, 6] (re and im of what follows, from the state) from windows [..., 8, n] of four entries each.

    Entries are given as four real, then four imaginary parts; the state likewise as the three before, the oldest first.
    """
    square = (windows[..., :, None, :] * windows[..., None, :, :]).sum(dim=-1)
    rr, ri, ir, ii = (square[..., i : i + PATCH, j : j + PATCH] for i in (0, PATCH) for j in (0, PATCH))
    # Correlations conj(x_i) x_j; a window read backwards and conjugated has them mirrored at the antidiagonal.
    reverse = torch.arange(PATCH - 1, -1, -1, device=windows.device)
    re, im = (part + part[..., reverse, :][..., reverse].transpose(-1, -2) for part in (rr + ii, ri - ir))
    gram = torch.cat(
        [
            torch.cat([re[..., :ORDER, :ORDER], -im[..., :ORDER, :ORDER], re[..., :ORDER, ORDER:]], dim=-1),
            torch.cat([im[..., :ORDER, :ORDER], re[..., :ORDER, :ORDER], im[..., :ORDER, ORDER:]], dim=-1),
        ],
        dim=-2,
    )
    unit = torch.eye(2 * ORDER, device=windows.device)
    level = (gram[..., : 2 * ORDER] * unit).sum(dim=(-1, -2), keepdim=True) / (2 * ORDER)
    gram = gram + (ridge * level + 1e-9) * torch.nn.functional.pad(unit, (0, 1))
    for i in range(2 * ORDER):  # Gauss and Jordan; positive definite, so that no pivot vanishes
        row = gram[..., i : i + 1, :] / gram[..., i : i + 1, i : i + 1]
        gram = gram - (gram[..., i : i + 1] - unit[:, i : i + 1]) * row
    wr, wi = gram[..., :ORDER, -1], gram[..., ORDER:, -1]
    return torch.stack([torch.cat([wr, -wi], dim=-1), torch.cat([wi, wr], dim=-1)], dim=-2)


def several_steps(weights: Tensor) -> Tensor:
    """Weights [..., REACH * PATCH, 2, 6] of the same state in the entries one, two, ... steps later, from those of one step."""
    shift = torch.zeros(*weights.shape[:-2], ORDER - 1, 2 * ORDER, device=weights.device)
    ahead = torch.eye(2 * ORDER, device=weights.device)
    rows = [shift + ahead[1:ORDER], weights[..., :1, :], shift + ahead[ORDER + 1 :], weights[..., 1:, :]]
    power, found = torch.cat(rows, dim=-2), weights
    while found.shape[-2] < 2 * REACH * PATCH:
        found = torch.cat([found, _product(found, power)], dim=-2)
        power = _product(power, power)
    return found.unflatten(-2, (REACH * PATCH, 2))


def _steps_ahead(ahead_BM1: Tensor) -> Tensor:
    """How many steps less one lie between a source patch's edge and each entry of a patch `ahead` of it [B, M, PATCH]."""
    inside = torch.arange(PATCH, device=ahead_BM1.device)
    within = torch.where(ahead_BM1 >= 0, inside, PATCH - 1 - inside)
    return (PATCH * (ahead_BM1.abs() - 1.0) + within).clamp(0, REACH * PATCH - 1).long()


def _run(source_BMl8: Tensor, forward: Tensor, weights: Tensor) -> Tensor:
    """What follows the sources [B, M, lines, 8] along their lines, by weights [B, M, PATCH, 2, 6] of each entry."""
    re, im = source_BMl8[..., :PATCH], source_BMl8[..., PATCH:]
    reverse = torch.arange(PATCH - 2, -1, -1, device=re.device)
    sign = torch.where(forward, 1.0, -1.0)
    state = torch.cat(
        [torch.where(forward, re[..., 1:], re[..., reverse]), sign * torch.where(forward, im[..., 1:], im[..., reverse])], dim=-1
    )
    parts = [(weights[:, :, None, :, i] * state[:, :, :, None]).sum(dim=-1) for i in (0, 1)]
    return torch.cat([parts[0], sign * parts[1]], dim=-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product as sums: an integer form of the network would round a MatMul to eight bits."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(dim=-2)


def _lines(patches_BLE: Tensor, axis: int) -> Tensor:
    """Patches as lines along time (axis 0) or frequency (2): [B, L, 16, 8], real parts, then imaginary ones."""
    order = (0, 1, 3, 4, 5, 2) if axis == 0 else (0, 1, 2, 3, 5, 4)
    return patches_BLE.unflatten(-1, (PATCH, PATCH, PATCH, 2)).permute(order).flatten(4).flatten(2, 3)


def _unlined(lines: Tensor, axis: int) -> Tensor:
    """The inverse of `_lines`."""
    cut = lines.unflatten(-1, (2, PATCH)).unflatten(2, (PATCH, PATCH))  # [B, L, a, k, 2, t] or [B, L, t, a, 2, k]
    return cut.permute((0, 1, 5, 2, 3, 4) if axis == 0 else (0, 1, 2, 3, 5, 4)).flatten(2)


def _parts(patches_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part [B, L, PATCH, PATCH, PATCH] along instants, antennas, subcarriers."""
    cut = patches_BLE.unflatten(-1, (PATCH, PATCH, PATCH, 2))
    return cut[..., 0], cut[..., 1]


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
