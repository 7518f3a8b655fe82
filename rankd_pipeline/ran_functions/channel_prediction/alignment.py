"""What a channel's paths have in common, taken out of it exactly: ramps of phase, and the linear run of a few paths.

A user at another speed or distance multiplies the channel by a phase that is linear in time, or frequency; a few paths make a
sum of such ramps, which an autoregressive model continues. A network between `Turn.into` and `Turn.back`, which learns the
change against `continued`, need not learn either for every carrier, speed and delay anew.

Shapes: B samples, V visible and M wanted patches, E = 2 * PATCH**3 real numbers a patch. Complex numbers are pairs of real
tensors, because ONNX has no others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, PATCH

Complex = tuple[Tensor, Tensor]
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
    within a visible patch, so any mask will do. phase_B: what is left, rad. level_B: root of the mean power.
    """

    step_B3: Tensor
    phase_B: Tensor
    level_B: Tensor

    @staticmethod
    def of(patches_BVE: Tensor, at_BV3: Tensor) -> "Turn":
        """From what is visible."""
        re, im = _parts(patches_BVE.float())
        steps = []
        for axis in (2, 3, 4):
            (a, b), (c, d) = ((part.narrow(axis, 1, PATCH - 1), part.narrow(axis, 0, PATCH - 1)) for part in (re, im))
            steps.append(torch.atan2(_total(c * b - a * d), _total(a * b + c * d)))
        level = torch.sqrt(_total(re * re + im * im) / (re[0].numel())).clamp_min(1e-6)
        only_steps = Turn(torch.stack(steps, dim=1), torch.zeros_like(level), level)
        re, im = _parts(only_steps.into(patches_BVE, at_BV3))
        return Turn(only_steps.step_B3, torch.atan2(_total(im), _total(re)), level)

    def into(self, patches_BLE: Tensor, at_BL3: Tensor) -> Tensor:
        """The patches [B, L, E] as the network sees them."""
        return self._applied(patches_BLE, at_BL3, -1.0) / self.level_B[:, None, None]

    def back(self, patches_BLE: Tensor, at_BL3: Tensor) -> Tensor:
        """The inverse of `into`."""
        return self._applied(patches_BLE, at_BL3, 1.0) * self.level_B[:, None, None]

    def _applied(self, patches: Tensor, at: Tensor, sign: float) -> Tensor:
        inside = torch.arange(PATCH, dtype=torch.float32, device=at.device)
        ramps = [self.step_B3[:, i, None, None] * (PATCH * at[..., i, None].float() + inside) for i in range(3)]
        angle = ramps[0][..., :, None, None] + ramps[1][..., None, :, None] + ramps[2][..., None, None, :]
        angle = angle + self.phase_B[:, None, None, None, None]
        cos, sin = torch.cos(angle), sign * torch.sin(angle)
        re, im = _parts(patches.float())
        return torch.stack([re * cos - im * sin, re * sin + im * cos], dim=-1).flatten(2)


def continued(patches_BVE: Tensor, visible_at: Tensor, wanted_at: Tensor, ridge: float = 1e-2) -> Tensor:
    """Each wanted patch [B, M, E] as the run of the nearest visible one, over time or, at the same time, over frequency.

    Autoregressive models of order 3 along both axes, fitted to each sample by ridge least squares over the windows of all its
    visible patches, forwards and (conjugated) backwards. Nothing gets larger than the largest entry that was seen.
    """
    re, im = _parts(patches_BVE.float())
    away = (wanted_at[:, :, None] - visible_at[:, None]).float().abs() * torch.tensor([1.0, 4.0, 1.0], device=re.device)
    nearest_BM = away.sum(dim=-1).argmin(dim=-1)
    offset_BM3 = wanted_at.float() - visible_at.float().gather(1, nearest_BM[..., None].expand(-1, -1, 3))
    source = _parts(patches_BVE.float().gather(1, nearest_BM[..., None].expand(-1, -1, ELEMENTS)))
    values = source
    for axis, number in ((4, 2), (2, 0)):  # time last: where both differ, it counts
        weights = several_steps(fitted((re, im), axis, ridge), REACH * PATCH)
        ahead = offset_BM3[..., number]
        run = _run(source, axis, ahead, weights)
        values = tuple(torch.where((ahead != 0)[..., None, None, None], new, old) for new, old in zip(run, values, strict=True))
    bound = torch.sqrt((re * re + im * im).flatten(1).amax(dim=1))[:, None, None, None, None]
    shrink = torch.clamp(bound / torch.sqrt(values[0] ** 2 + values[1] ** 2).clamp_min(1e-9), max=1.0)
    return torch.stack([values[0] * shrink, values[1] * shrink], dim=-1).flatten(2)


def fitted(x: Complex, axis: int, ridge: float) -> list[Complex]:
    """Weights [B] of the three entries before (oldest first) in the one that follows, along an axis of x [B, V, t, a, k]."""
    entries = [tuple(part.select(axis, i) for part in x) for i in range(PATCH)]
    backwards = [(re, -im) for re, im in reversed(entries)]
    windows = [tuple(torch.cat([part.flatten(1) for part in parts], dim=1) for parts in zip(*pair, strict=True))
               for pair in zip(entries, backwards, strict=True)]  # fmt: skip

    def inner(a: Complex, b: Complex) -> Complex:
        re, im = _times((a[0], -a[1]), b)
        return re.sum(dim=1), im.sum(dim=1)

    rows = [[inner(windows[i], windows[j]) for j in range(PATCH)] for i in range(ORDER)]
    loading = ridge * torch.stack([rows[i][i][0] for i in range(ORDER)]).mean(dim=0) + 1e-9
    for i in range(ORDER):
        rows[i][i] = (rows[i][i][0] + loading, rows[i][i][1])
    return _solved(rows)


def several_steps(weights: list[Complex], steps: int) -> Complex:
    """Weights [B, steps, 3] of the same three entries in the one `steps` later, for 1, 2, ... steps."""
    found = [weights]
    for _ in range(steps - 1):
        oldest, middle, newest = found[-1]
        by = [_times(newest, weight) for weight in weights]
        found.append([by[0], _plus(oldest, by[1]), _plus(middle, by[2])])
    return tuple(torch.stack([torch.stack([w[part] for w in row], dim=-1) for row in found], dim=1) for part in (0, 1))


def _run(source: Complex, axis: int, ahead_BM: Tensor, weights: Complex) -> Complex:
    """The patches [B, M, t, a, k] that lie `ahead` patches from their sources along an axis; any value where that is zero."""
    forward = (ahead_BM >= 0)[..., None, None]
    last = [tuple(part.select(axis, i) for part in source) for i in range(PATCH)]
    state = [
        (torch.where(forward, now[0], back[0]), torch.where(forward, now[1], -back[1]))
        for now, back in zip(last[1:], reversed(last[:-1]), strict=True)
    ]
    inside = torch.arange(PATCH, device=ahead_BM.device)
    within = torch.where((ahead_BM >= 0)[..., None], inside, PATCH - 1 - inside)
    step_BMP = (PATCH * (ahead_BM.abs() - 1.0)[..., None] + within).clamp(0, REACH * PATCH - 1).long()
    re, im = [], []
    for i in range(PATCH):
        chosen = [part.gather(1, step_BMP[..., i, None].expand(-1, -1, ORDER))[..., None, None] for part in weights]
        terms = [_times((chosen[0][:, :, j], chosen[1][:, :, j]), state[j]) for j in range(ORDER)]
        re.append(terms[0][0] + terms[1][0] + terms[2][0])
        im.append(terms[0][1] + terms[1][1] + terms[2][1])
    sign = torch.where(forward, 1.0, -1.0)[..., None]
    return torch.stack(re, dim=axis), sign * torch.stack(im, dim=axis)


def _solved(rows: list[list[Complex]]) -> list[Complex]:
    """x of A x = b from the rows [A | b] of a Hermitian, positive definite A, by elimination."""
    size = len(rows)
    for i in range(size):
        pivot = rows[i][i][0]
        rows[i] = [(re / pivot, im / pivot) for re, im in rows[i]]
        for j in range(size):
            if j != i:
                factor = rows[j][i]
                rows[j] = [_minus(entry, _times(factor, above)) for entry, above in zip(rows[j], rows[i], strict=True)]
    return [row[-1] for row in rows]


def _times(a: Complex, b: Complex) -> Complex:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _plus(a: Complex, b: Complex) -> Complex:
    return a[0] + b[0], a[1] + b[1]


def _minus(a: Complex, b: Complex) -> Complex:
    return a[0] - b[0], a[1] - b[1]


def _parts(patches_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part [B, L, PATCH, PATCH, PATCH] along instants, antennas, subcarriers."""
    cut = patches_BLE.unflatten(-1, (PATCH, PATCH, PATCH, 2))
    return cut[..., 0], cut[..., 1]


def _total(x: Tensor) -> Tensor:
    return x.flatten(1).sum(dim=1)


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
