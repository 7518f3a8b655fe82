"""What a channel's paths have in common: ramps of phase, taken out of it exactly, and a few paths' run, cleaned of noise.

A user at another speed or distance multiplies the channel by a phase that is linear in time, or frequency; a few paths make a
sum of such ramps, which an autoregressive model continues, and in which neighbouring antennas and subcarriers tell channel from
noise. A network between `Turn.into` and `Turn.back`, which learns the change against `continued`, need not learn any of it for
every carrier, speed and delay anew.

The turn, and inverses and powers of matrices, are in double precision: in single, torch and a runtime would differ by a per cent.

Shapes: B samples, V visible and M wanted patches, E = 2 * PATCH**3 real numbers a patch. Complex numbers stand as real ones,
because ONNX has no others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, PATCH

ORDER = 6
"""Of the autoregressive model. Two neighbouring patches would allow 7, which fits fast fading too closely."""
LOADING = 0.1
"""Of covariances before they are inverted, in noise powers: a few lines alone would overstate what noise there is."""
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
        re, im = _parts(patches_BVE.double())
        step = _mean_steps(re, im)
        seen = visible_at.shape[1]
        inside = torch.cartesian_prod(*[torch.arange(PATCH, dtype=re.dtype, device=re.device)] * 3)
        to_patch = (PATCH * torch.cat([visible_at, wanted_at], dim=1).to(re.dtype) * step[:, None]).sum(dim=-1)
        within = (inside * step[:, None]).sum(dim=-1)[:, None]
        # Sines are slow: few of them, and their products.
        cos, sin = _rotated(torch.cos(to_patch)[..., None], torch.sin(to_patch)[..., None], torch.cos(within), torch.sin(within))
        level = torch.sqrt((re * re + im * im).mean(dim=(1, 2, 3, 4))).clamp_min(1e-6)
        re, im = _rotated(re.flatten(2), im.flatten(2), cos[:, :seen], -sin[:, :seen])
        total_re, total_im = re.sum(dim=(1, 2)), im.sum(dim=(1, 2))
        size = torch.sqrt(total_re**2 + total_im**2).clamp_min(1e-9)
        u_re, u_im = ((part / size * level)[:, None, None] for part in (total_re, total_im))
        back_re, back_im = _rotated(cos[:, seen:], sin[:, seen:], u_re, u_im)
        turned = _joined(*_rotated(re, im, u_re, -u_im)) / (level * level)[:, None, None]
        return turned.float(), Turn(step.float(), back_re.float(), back_im.float(), level.float())

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
    # Onnxruntime has no arctangent in double precision; any step near the mean will do, as long as it is undone exactly.
    return torch.atan2(*(torch.stack([pair[i] for pair in sums], dim=1).float() for i in (1, 0))).to(re.dtype)


def _rotated(re: Tensor, im: Tensor, by_re: Tensor, by_im: Tensor) -> tuple[Tensor, Tensor]:
    """A complex product."""
    return re * by_re - im * by_im, re * by_im + im * by_re


def _joined(re: Tensor, im: Tensor) -> Tensor:
    """Patches [B, L, E] from real and imaginary parts [B, L, PATCH**3]."""
    return torch.stack([re, im], dim=-1).flatten(2)


def cleaned(patches_BVE: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    """The patches [B, V, E] for a run over time, and those for one over frequency, with less noise.

    Along an axis the entries of a sample are correlated as its own covariance R says, which the four entries of all lines in
    all visible patches give; the Wiener filter of white noise (noise: its power) is I - noise R^-1. Only the two axes across
    the run are filtered: along it, the filter would bend the recursion.
    """
    lines = torch.stack([_lines(patches_BVE, axis).flatten(1, 2) for axis in range(3)], dim=1)
    by_time, by_antenna, by_frequency = _wiener(lines.double(), noise).float().unbind(dim=1)
    across = _across(patches_BVE, by_antenna, 1)
    return _across(across, by_frequency, 2), _across(across, by_time, 0)


def _wiener(lines: Tensor, noise: Tensor | float) -> Tensor:
    """Filters [B, ..., 8, 8] for lines [B, ..., n, 8] (real parts, then imaginary ones), to be multiplied from the right."""
    re, im = (part / lines.shape[-2] for part in _correlations(lines))
    unit = torch.eye(2 * PATCH, dtype=lines.dtype, device=lines.device)
    covariance = torch.cat([torch.cat([re, im], dim=-1), torch.cat([-im, re], dim=-1)], dim=-2)
    loaded = covariance + (LOADING * noise + 1e-6) * unit
    inverse = _eliminated(torch.cat([loaded, unit + torch.zeros_like(loaded)], dim=-1))[..., 2 * PATCH :]
    return unit - noise * inverse


def _correlations(lines: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the sums of conj(x_i) x_j over lines [..., n, 2 m] (real parts, then imaginary ones)."""
    square, m = lines.transpose(-1, -2) @ lines, lines.shape[-1] // 2
    rr, ri, ir, ii = (square[..., i : i + m, j : j + m] for i in (0, m) for j in (0, m))
    return rr + ii, ri - ir


def _eliminated(work: Tensor) -> Tensor:
    """[A | Y] -> [1 | A^-1 Y], of complex Hermitian positive definite A as real ones: [..., 2 n, 2 n + columns of Y]."""
    n = work.shape[-2] // 2
    unit = torch.eye(2 * n, dtype=work.dtype, device=work.device)
    for i in range(n):  # Gauss and Jordan on real and imaginary part at once: their pivot is one real, positive number
        rows = work[..., i::n, :] / work[..., i : i + 1, i : i + 1]
        work = work - (work[..., i : 2 * n : n] - unit[:, i::n]) @ rows
    return work


def _across(patches_BVE: Tensor, filter_BFF: Tensor, axis: int) -> Tensor:
    """Every line along an axis times a filter of its sample."""
    return _unlined(_lines(patches_BVE, axis) @ filter_BFF[:, None], axis)


def continued(
    patches_BVE: Tensor, visible_at: Tensor, wanted_at: Tensor, ridge: float = 1e-3, clean: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Each wanted patch [B, M, E] as the run of the nearest visible one, over time or, at the same time, over frequency.

    Autoregressive models along both axes, fitted to each sample by ridge least squares over the windows of all pairs of
    neighbouring visible patches, forwards and (conjugated) backwards. Where no pair leads to a wanted patch, the nearest patch
    is repeated. Nothing gets larger than the largest entry that was seen. clean: what the runs over time and over frequency
    are fitted to and start from, where that is not the patches themselves.
    """
    patches, visible, wanted = patches_BVE.float(), visible_at.float(), wanted_at.float()
    away = (wanted[:, :, None] - visible[:, None]).abs() * torch.tensor([1.0, 4.0, 1.0], device=patches.device)
    nearest_BM1 = away.sum(dim=-1).argmin(dim=-1, keepdim=True)
    offset_BM3 = wanted - visible.gather(1, nearest_BM1.expand(-1, -1, 3))
    sources = (patches, patches) if clean is None else clean
    pairs, paired = zip(*(_pairs(source, visible, axis) for source, axis in zip(sources, (0, 2), strict=True)), strict=True)
    weights = several_steps(fitted(torch.stack([pair.flatten(1, 2) for pair in pairs], dim=1).double(), ridge)).float().flatten(3)
    over_time = offset_BM3[..., :1] > 0
    ahead = torch.where(over_time, offset_BM3[..., :1], offset_BM3[..., 2:])
    step_BMP = (PATCH * (ahead - 1.0) + torch.arange(PATCH, device=ahead.device)).clamp(0, REACH * PATCH - 1).long()
    at_step = step_BMP + torch.where(over_time, 0, REACH * PATCH)
    chosen = weights.flatten(1, 2).gather(1, at_step.flatten(1)[..., None].expand(-1, -1, 4 * ORDER))
    lines = [pair.flatten(2).gather(1, nearest_BM1.expand(-1, -1, pair[0, 0].numel())) for pair in pairs]
    line = torch.where(over_time, *lines).unflatten(-1, pairs[0].shape[2:])
    state = torch.cat([part[..., -ORDER:] for part in line.split(2 * PATCH, dim=-1)], dim=-1)
    run = state @ chosen.unflatten(1, step_BMP.shape[1:]).unflatten(-1, (2, 2 * ORDER)).transpose(2, 3).flatten(2, 3).transpose(
        -1, -2
    )
    known = torch.where(over_time, *(has.gather(1, nearest_BM1) for has in paired)) > 0
    moves = known & (over_time | ((offset_BM3[..., :1] == 0) & (ahead > 0)))
    source = patches.gather(1, nearest_BM1.expand(-1, -1, ELEMENTS))
    values = torch.where(moves, torch.where(over_time, _unlined(run, 0), _unlined(run, 2)), source).unflatten(-1, (-1, 2))
    bound = torch.sqrt(patches.unflatten(-1, (-1, 2)).square().sum(dim=-1).flatten(1).amax(dim=1))[:, None, None, None]
    size = torch.sqrt(values.square().sum(dim=-1, keepdim=True)).clamp_min(1e-9)
    return (values * torch.clamp(bound / size, max=1.0)).flatten(2)


def _pairs(patches: Tensor, at: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Lines [B, V, 16, 16] over the neighbour before each patch and itself, real parts, then imaginary ones; zeros without one.

    And whether there is one [B, V, 1].
    """
    step = torch.zeros(3, device=at.device)
    step[axis] = 1.0
    match = ((at[:, :, None] - step - at[:, None]).abs().sum(dim=-1) < 0.5).float()
    has = match.sum(dim=-1, keepdim=True)
    before = patches.gather(1, match.argmax(dim=-1, keepdim=True).expand(-1, -1, ELEMENTS))
    (re_0, im_0), (re_1, im_1) = (_lines(part, axis).split(PATCH, dim=-1) for part in (before, patches))
    return torch.cat([re_0, re_1, im_0, im_1], dim=-1) * has[..., None], has


def fitted(pairs: Tensor, ridge: float) -> Tensor:
    """Weights [..., 2, 2 ORDER] (re and im of what follows, from the state) from lines [..., n, 4 PATCH] over two patches.

    Lines are real parts, then imaginary ones; the state likewise, the ORDER entries before, the oldest first.
    """
    long = 2 * PATCH
    # Correlations conj(x_i) x_j, of all windows; one read backwards and conjugated has them mirrored at the antidiagonal.
    starts = range(long - ORDER)
    re, im = (
        torch.stack([part[..., i : i + ORDER + 1, i : i + ORDER + 1] for i in starts]).sum(dim=0) for part in _correlations(pairs)
    )
    re, im = (part + part.flip(-1, -2).transpose(-1, -2) for part in (re, im))
    gram = torch.cat(
        [
            torch.cat([re[..., :ORDER, :ORDER], -im[..., :ORDER, :ORDER], re[..., :ORDER, ORDER:]], dim=-1),
            torch.cat([im[..., :ORDER, :ORDER], re[..., :ORDER, :ORDER], im[..., :ORDER, ORDER:]], dim=-1),
        ],
        dim=-2,
    )
    unit = torch.eye(2 * ORDER, dtype=pairs.dtype, device=pairs.device)
    level = (gram[..., : 2 * ORDER] * unit).sum(dim=(-1, -2), keepdim=True) / (2 * ORDER)
    solved = _eliminated(gram + (ridge * level + 1e-6) * torch.nn.functional.pad(unit, (0, 1)))[..., -1]
    wr, wi = solved[..., :ORDER], solved[..., ORDER:]
    return torch.stack([torch.cat([wr, -wi], dim=-1), torch.cat([wi, wr], dim=-1)], dim=-2)


def several_steps(weights: Tensor) -> Tensor:
    """Weights [..., REACH * PATCH, 2, 2 ORDER] of the same state in the entries one, two, ... steps later, from one step's."""
    nothing = torch.zeros(*weights.shape[:-2], ORDER - 1, 2 * ORDER, dtype=weights.dtype, device=weights.device)
    unit = torch.eye(2 * ORDER, dtype=weights.dtype, device=weights.device)
    rows = [nothing + unit[1:ORDER], weights[..., :1, :], nothing + unit[ORDER + 1 :], weights[..., 1:, :]]
    power, found = torch.cat(rows, dim=-2), weights
    while found.shape[-2] < 2 * REACH * PATCH:
        found = torch.cat([found, found @ power], dim=-2)
        power = power @ power
    return found.unflatten(-2, (REACH * PATCH, 2))


def _lines(patches_BLE: Tensor, axis: int) -> Tensor:
    """Patches as lines along time (axis 0), antennas (1) or frequency (2): [B, L, 16, 8], real parts, then imaginary ones."""
    order = ((0, 1, 3, 4, 5, 2), (0, 1, 2, 4, 5, 3), (0, 1, 2, 3, 5, 4))[axis]
    return patches_BLE.unflatten(-1, (PATCH, PATCH, PATCH, 2)).permute(order).flatten(4).flatten(2, 3)


def _unlined(lines: Tensor, axis: int) -> Tensor:
    """The inverse of `_lines`."""
    cut = lines.unflatten(-1, (2, PATCH)).unflatten(2, (PATCH, PATCH))  # [B, L, the other two axes, 2, this axis]
    return cut.permute(((0, 1, 5, 2, 3, 4), (0, 1, 2, 5, 3, 4), (0, 1, 2, 3, 5, 4))[axis]).flatten(2)


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
