"""A few paths' run: a sample's visible patches, cleaned of noise, and continued over time or frequency.

A few paths make a sum of ramps of phase, which an autoregressive model continues, and in which neighbouring antennas and
subcarriers tell channel from noise. Both models are the sample's own, fitted to its visible part; nothing here is learned.

Sums over a sample, inverses and powers of matrices are in double precision: in single, torch and a runtime would differ by a
per cent. A runtime spends its time here on starting operators, on broadcasts of short axes and on transpositions of single
numbers. So a sample is run on over one axis, and what that is decides where its lines come from, not how they go on; all axes
go through one operator; of a patch's axes one moves at a time, real and imaginary part side by side; and where these are
multiplied, they stand as two planes.

Shapes: B samples, V visible and M wanted patches, L of any, E = 2 * PATCH**3 real numbers a patch, N = L * PATCH**3 entries. A
line is PATCH entries along an axis, 2 * PATCH numbers. Complex numbers stand as pairs (re, im), because ONNX has no others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, PATCH

ORDER = 6
"""Of the autoregressive model. Two neighbouring patches would allow 7, which fits fast fading too closely."""
LOADING = 0.1
"""Of covariances before they are inverted, in noise powers: a few lines alone would overstate what noise there is."""
REACH = 4
"""Patches that a run is continued over; behind them its last value stays."""
RIDGE = 1e-3
LINES = PATCH * PATCH
FAR = 4096.0
"""More places than any axis has: (1, FAR, FAR**2) makes one number of three places."""
STATE = torch.eye(4 * PATCH)[4 * PATCH - 2 * ORDER :]
"""The state (the last ORDER entries) out of a line of two patches [2 ORDER, 4 PATCH]."""


class Sums:
    """A linear map whose every output is a sum of a few inputs with signs: for a runtime a look-up, not a product of matrices."""

    def __init__(self, linear: Callable[[Tensor], Tensor], *shape: int) -> None:
        count = math.prod(shape)
        made = linear(torch.eye(count, dtype=torch.float64).reshape(count, *shape))
        self.shape = tuple(made.shape[1:])
        columns = made.reshape(count, -1).round().long().T
        terms = [torch.repeat_interleave(torch.arange(count), column.abs()) for column in columns]
        most = max(len(term) for term in terms)
        index, sign = torch.zeros(most, len(terms), dtype=torch.long), torch.zeros(most, len(terms), dtype=torch.float64)
        for output, (term, column) in enumerate(zip(terms, columns, strict=True)):
            index[: len(term), output], sign[: len(term), output] = term, column[term].sign().double()
        self.index, self.sign = index.flatten(), sign.flatten()

    def __call__(self, inputs: Tensor) -> Tensor:
        """[..., outputs' shape] from [..., inputs, flat]."""
        picked = inputs.index_select(-1, self.index.to(inputs.device)) * self.sign.to(inputs)
        return picked.unflatten(-1, (-1, math.prod(self.shape))).sum(dim=-2).unflatten(-1, self.shape)


def _hermitian(square: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the sums of conj(x_i) x_j, from the products [..., 2 m, 2 m] of the numbers of x."""
    rr, ri, ir, ii = (square[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    return rr + ii, ri - ir


def _as_real(re: Tensor, im: Tensor) -> Tensor:
    """A complex matrix [..., r, c] as the real one [..., 2 r, 2 c] that multiplies rows of pairs (with im negated: columns)."""
    pairs = torch.stack([torch.stack([re, im], dim=-1), torch.stack([-im, re], dim=-1)], dim=-3)
    return pairs.flatten(-2).flatten(-3, -2)


def _covariance(square: Tensor) -> Tensor:
    """A Hermitian matrix as a real one."""
    return _as_real(*_hermitian(square))


def _lag_and_power(square: Tensor) -> Tensor:
    """[..., 3]: the sum of all lag-one products, re and im, and of all powers."""
    re, im = _hermitian(square)
    lag = (part.diagonal(1, -2, -1).sum(dim=-1) for part in (re, im))
    return torch.stack([*lag, re.diagonal(0, -2, -1).sum(dim=-1)], dim=-1)


def _normal_equations(square: Tensor) -> Tensor:
    """[..., 2 ORDER, 2 ORDER + 1] of the autoregressive model, the right side negated, from the products of lines of two patches.

    Sums over all windows of ORDER + 1 entries; one read backwards and conjugated has them mirrored at the antidiagonal.
    """
    windows = [slice(i, i + ORDER + 1) for i in range(2 * PATCH - ORDER)]
    re, im = (torch.stack([part[..., w, w] for w in windows]).sum(dim=0) for part in _hermitian(square))
    re, im = (part + part.flip(-1, -2).transpose(-1, -2) for part in (re, im))
    matrix = _as_real(re[..., :ORDER, :ORDER], -im[..., :ORDER, :ORDER])
    right = torch.stack([re[..., :ORDER, ORDER], im[..., :ORDER, ORDER]], dim=-1).flatten(-2)
    return torch.cat([matrix, -right[..., None]], dim=-1)


def _recursion(weights: Tensor) -> Tensor:
    """[..., 2 ORDER, 2 ORDER]: one step of the state (the oldest entry first), but for the shift."""
    new = _as_real(weights[..., None, ::2], -weights[..., None, 1::2])
    return torch.cat([new.new_zeros(*new.shape[:-2], 2 * ORDER - 2, 2 * ORDER), new], dim=-2)


TO_COVARIANCE = Sums(_covariance, 2 * PATCH, 2 * PATCH)
TO_LAG, TO_POWER = _lag_and_power(torch.eye(4 * PATCH**2, dtype=torch.float64).unflatten(-1, (2 * PATCH, 2 * PATCH))).split(
    [2, 1], -1
)
TO_EQUATIONS = Sums(_normal_equations, 4 * PATCH, 4 * PATCH)
TO_RECURSION = _recursion(torch.eye(2 * ORDER)).flatten(1).T
SHIFT = torch.diag(torch.ones(2 * ORDER - 2), 2)
"""What becomes of a state in one step, but for the new entry."""


def planes_of(patches_BLE: Tensor) -> Tensor:
    """Real and imaginary parts of patches, as planes [B, 2, N]."""
    return patches_BLE.reshape(-1, patches_BLE.shape[1] * PATCH**3, 2).transpose(1, 2)


def patches_of(planes_B2N: Tensor) -> Tensor:
    """The inverse of `planes_of`."""
    return planes_B2N.transpose(1, 2).reshape(-1, planes_B2N.shape[2] // PATCH**3, ELEMENTS)


def lines_of(patches_BVE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All lines of a sample along time, antennas and frequency, [B, 1, V * 16, 8] each."""
    shape = (1, patches_BVE.shape[1] * LINES, 2 * PATCH)
    return _first_axis_last(patches_BVE, shape), _last_axis_first(patches_BVE, shape), patches_BVE.reshape(-1, *shape)


def _first_axis_last(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Patches, however cut, with the first of their three axes behind the other two, [B, *shape]."""
    return numbers.reshape(-1, PATCH, LINES, 2).transpose(1, 2).reshape(-1, *shape)


def _last_axis_first(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_first_axis_last`."""
    return numbers.reshape(-1, LINES, PATCH, 2).transpose(1, 2).reshape(-1, *shape)


def products_of(lines: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Products of a line's numbers [B, 3, 64], summed over all lines."""
    numbers = torch.cat(lines, dim=1).double()
    return (numbers.transpose(-1, -2) @ numbers).flatten(-2)


@dataclass(frozen=True)
class Way:
    """How a sample is run on: over time if a wanted patch is later than the visible one nearest to it, else over frequency.

    over_time_B11: which of the two. near_BMV: the nearest visible patch of each wanted one, as a one in its column. ahead_BM1:
    how many patches it lies behind that along the axis. before_BVV: the neighbour before each visible patch, likewise; or zeros.
    """

    over_time_B11: Tensor
    near_BMV: Tensor
    ahead_BM1: Tensor
    before_BVV: Tensor


def way_on(visible_at: Tensor, wanted_at: Tensor) -> Way:
    """The way from visible to wanted patches, from where both lie [B, V, 3] and [B, M, 3]."""
    visible, wanted = visible_at.float(), wanted_at.float()
    near_BMV = _nearest(visible, wanted)
    offset = wanted - near_BMV @ visible
    in_time, in_frequency = offset[..., :1], offset[..., 2:]
    over_time = in_time.amax(dim=1, keepdim=True) > 0
    number = visible_at.double() @ torch.tensor([[1.0], [FAR], [FAR**2]], dtype=torch.float64, device=visible.device)
    step = torch.where(over_time, 1.0, FAR**2)
    before = (number - number.transpose(1, 2) == step).float()
    return Way(over_time, near_BMV, torch.where(over_time, in_time, in_frequency), before)


def cleaned(way: Way, lines: tuple[Tensor, Tensor, Tensor], products: Tensor, noise: Tensor | float) -> Tensor:
    """Patches as lines along the run [B, V, E] with less noise, from `lines_of` and `products_of`.

    Along an axis the entries of a sample are correlated as its own covariance R says, which the four entries of all lines in
    all visible patches give; the Wiener filter of white noise (noise: its power over the channel's) is I - noise R^-1. Only
    the two axes across the run are filtered: along it, the filter would bend the recursion.
    """
    over_time = way.over_time_B11
    across = torch.where(over_time, products[:, 1:], products[:, :2])
    first, second = _wiener(across, noise).float().split(1, dim=1)
    along_run = torch.where(over_time[..., None], lines[0], lines[2])
    shape = along_run.shape[1:]
    found = _last_axis_first(_last_axis_first(along_run, shape) @ second, shape) @ first
    return _last_axis_first(found, (shape[1] // LINES, ELEMENTS))


def _wiener(products: Tensor, noise: Tensor | float) -> Tensor:
    """Filters [B, axes, 8, 8], to be multiplied from the right, from the products of all lines along each axis [B, axes, 64]."""
    power = products @ (TO_POWER / PATCH).to(products)
    unit = torch.eye(2 * PATCH, dtype=products.dtype, device=products.device)
    covariance = TO_COVARIANCE(products / power.clamp_min(1e-12)) + (LOADING * noise + 1e-6) * unit
    return unit + noise * _minus_inverse(covariance)


def _minus_inverse(matrix: Tensor) -> Tensor:
    """-A^-1 of complex Hermitian positive definite matrices, as real ones [..., 2 n, 2 n].

    Eliminating A from [[A, 1], [1, 0]] leaves it where the zeros were. All that stays symmetric, so that a column is the row
    too; real and imaginary part go at once, because their pivot is one real, positive number.
    """
    size = matrix.shape[-1]
    unit = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    nothing = torch.zeros_like(unit)
    border = torch.cat([torch.cat([nothing, unit], dim=1), torch.cat([unit, nothing], dim=1)])
    work = functional.pad(matrix, (0, size, 0, size)) + border
    for i in range(0, size, 2):
        column = work[..., i : i + 2]
        work = work - (column / column[..., i : i + 1, :1]) @ column.transpose(-1, -2)
    return work[..., size:, size:]


def continued(way: Way, lines: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Each wanted patch [B, M, E] as the run of the nearest visible one, and whether one leads there [B, M, 1].

    An autoregressive model along the axis of the run, fitted to each sample by ridge least squares over the windows of all
    pairs of neighbouring visible patches, forwards and (conjugated) backwards. Where no pair leads to a patch, what the run says
    of it is worth nothing.
    lines: what the model is fitted to and starts from [B, V, E] (as `cleaned` gives them).
    """
    has = way.before_BVV.sum(dim=-1, keepdim=True)
    both = [part.unflatten(-1, (LINES, 2 * PATCH)) for part in (way.before_BVV @ lines, lines * has)]
    pairs = torch.cat(both, dim=-1)  # [B, V, 16, 16]: the neighbour's line before each line
    moves = (way.near_BMV @ has > 0) & (way.ahead_BM1 > 0)
    state = (way.near_BMV @ pairs.flatten(2)).unflatten(-1, (LINES, 4 * PATCH))
    weights = (several_steps(fitted(pairs, ridge)) @ STATE.to(torch.float64)).float()
    run = state @ _at_steps(weights, way.ahead_BM1).transpose(-1, -2)
    return torch.where(way.over_time_B11, _last_axis_first(run, (run.shape[1], ELEMENTS)), run.flatten(2)), moves


def bounded(planes_B2N: Tensor, seen: int) -> Tensor:
    """Planes in which no entry is larger than the largest of the first `seen` patches: an unstable run must not run away."""
    power = torch.ones(1, 2, device=planes_B2N.device) @ (planes_B2N * planes_B2N)
    largest = power[:, :, : seen * PATCH**3].amax(dim=-1, keepdim=True)
    return planes_B2N * torch.sqrt((largest / power.clamp_min(1e-18)).clamp_max(1.0))


def _nearest(visible: Tensor, wanted: Tensor) -> Tensor:
    """One in the column of the nearest visible patch [B, M, V], antennas counting more."""
    weight = torch.tensor([1.0, 4.0, 1.0], device=visible.device)
    seen, asked = visible * weight, wanted * weight
    away = (seen * seen).sum(dim=-1)[:, None] - (2.0 * asked) @ seen.transpose(1, 2)  # but for what is the same to all of them
    return (away.argmin(dim=-1, keepdim=True) == torch.arange(visible.shape[1], device=visible.device)).float()


def _at_steps(weights: Tensor, ahead: Tensor) -> Tensor:
    """Of the weights of all steps [B, (step, re or im), 16] those that lead to each wanted patch, [B, M, (step, re or im), 16]."""
    inside = torch.arange(-PATCH, 0, device=ahead.device)
    step_BMP = (PATCH * ahead + inside).clamp(0, REACH * PATCH - 1)
    chosen = step_BMP.reshape(-1, ahead.shape[1] * PATCH, 1) == torch.arange(REACH * PATCH, device=ahead.device)
    found = chosen.float() @ weights.reshape(-1, REACH * PATCH, 8 * PATCH)
    return found.reshape(-1, ahead.shape[1], 2 * PATCH, 4 * PATCH)


def fitted(pairs: Tensor, ridge: float = RIDGE) -> Tensor:
    """Weights [B, 2 ORDER, 1] of the entry that follows a state, from lines of two patches [B, V, 16, 4 PATCH]."""
    rows = pairs.flatten(1, 2).double()
    matrix, minus_right = TO_EQUATIONS((rows.transpose(-1, -2) @ rows).flatten(-2)).split([2 * ORDER, 1], dim=-1)
    unit = torch.eye(2 * ORDER, dtype=rows.dtype, device=rows.device)
    level = (matrix * unit).sum(dim=(-1, -2), keepdim=True)
    return _minus_inverse(matrix + (ridge / (2 * ORDER) * level + 1e-6) * unit) @ minus_right


def several_steps(weights: Tensor) -> Tensor:
    """Weights of a state one, two, ... steps later [B, (step, re or im), 2 ORDER], from those of one step [B, 2 ORDER, 1]."""
    power = (TO_RECURSION.to(weights) @ weights).reshape(-1, 2 * ORDER, 2 * ORDER) + SHIFT.to(weights)
    found = power[..., -2:, :]
    while found.shape[-2] < 2 * REACH * PATCH:
        found = torch.cat([found, found @ power], dim=-2)
        power = power @ power
    return found
