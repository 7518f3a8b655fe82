"""A few paths' run: a sample's visible patches, cleaned of noise, and continued over time or frequency.

A few paths make a sum of ramps of phase, which an autoregressive model continues, and in which neighbouring antennas and
subcarriers tell channel from noise. Both models are the sample's own, fitted to its visible part; nothing here is learned.

Sums over a sample, inverses and powers of matrices are in double precision: in single, torch and a runtime would differ by a
per cent. A runtime spends its time here on starting operators, on broadcasts of short axes and on transpositions of single
numbers. So both runs, or all three axes, go through one operator; of a patch's axes one moves at a time, real and imaginary
part side by side; and where these are multiplied, they stand as two planes.

Shapes: B samples, V visible and M wanted patches, L of any, E = 2 * PATCH**3 real numbers a patch, N = L * PATCH**3 entries. A
line is PATCH entries along an axis, 2 * PATCH numbers. Complex numbers stand as pairs (re, im), because ONNX has no others.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, PATCH

ORDER = 6
"""Of the autoregressive model. Two neighbouring patches would allow 7, which fits fast fading too closely."""
LOADING = 0.1
"""Of covariances before they are inverted, in noise powers: a few lines alone would overstate what noise there is."""
REACH = 4
"""Patches that a run is continued over; behind them its last value stays."""
RIDGE = 1e-3
RUNS = (0, 2)
"""The axes over which a channel is continued: time and frequency."""
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
    """A Hermitian matrix as a real one, beside a place for a unit matrix."""
    real = _as_real(*_hermitian(square))
    return torch.cat([real, torch.zeros_like(real)], dim=-1)


def _lag_and_power(square: Tensor) -> Tensor:
    """[..., 3]: the sum of all lag-one products, re and im, and of all powers."""
    re, im = _hermitian(square)
    lag = (part.diagonal(1, -2, -1).sum(dim=-1) for part in (re, im))
    return torch.stack([*lag, re.diagonal(0, -2, -1).sum(dim=-1)], dim=-1)


def _normal_equations(square: Tensor) -> Tensor:
    """[..., 2 ORDER, 2 ORDER + 1] of the autoregressive model, from the products of lines over two patches.

    Sums over all windows of ORDER + 1 entries; one read backwards and conjugated has them mirrored at the antidiagonal.
    """
    windows = [slice(i, i + ORDER + 1) for i in range(2 * PATCH - ORDER)]
    re, im = (torch.stack([part[..., w, w] for w in windows]).sum(dim=0) for part in _hermitian(square))
    re, im = (part + part.flip(-1, -2).transpose(-1, -2) for part in (re, im))
    matrix = _as_real(re[..., :ORDER, :ORDER], -im[..., :ORDER, :ORDER])
    right = torch.stack([re[..., :ORDER, ORDER], im[..., :ORDER, ORDER]], dim=-1).flatten(-2)
    return torch.cat([matrix, right[..., None]], dim=-1)


def _recursion(weights: Tensor) -> Tensor:
    """[..., 2 ORDER, 2 ORDER]: one step of the state (the oldest entry first), but for the shift."""
    new = _as_real(weights[..., None, ::2], -weights[..., None, 1::2])
    return torch.cat([new.new_zeros(*new.shape[:-2], 2 * ORDER - 2, 2 * ORDER), new], dim=-2)


TO_COVARIANCE = Sums(_covariance, 2 * PATCH, 2 * PATCH)
TO_LAG_AND_POWER = _lag_and_power(torch.eye(4 * PATCH**2, dtype=torch.float64).unflatten(-1, (2 * PATCH, 2 * PATCH)))
TO_EQUATIONS = Sums(_normal_equations, 4 * PATCH, 4 * PATCH)
TO_RECURSION = _recursion(torch.eye(2 * ORDER)).flatten(1)
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
    along_frequency = patches_BVE.reshape(-1, 1, patches_BVE.shape[1] * LINES, 2 * PATCH)
    return _first_axis_last(along_frequency), _last_axis_first(along_frequency), along_frequency


def _first_axis_last(numbers: Tensor) -> Tensor:
    """Patches (of whatever shape) with the first of their three axes behind the other two."""
    return numbers.reshape(-1, PATCH, LINES, 2).transpose(1, 2).reshape(-1, *numbers.shape[1:])


def _last_axis_first(numbers: Tensor) -> Tensor:
    """The inverse of `_first_axis_last`."""
    return numbers.reshape(-1, LINES, PATCH, 2).transpose(1, 2).reshape(-1, *numbers.shape[1:])


def products_of(lines: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Products of a line's numbers [B, 3, 64], summed over all lines."""
    numbers = torch.cat(lines, dim=1).double()
    return (numbers.transpose(-1, -2) @ numbers).flatten(-2)


def cleaned(lines: tuple[Tensor, Tensor, Tensor], products: Tensor, noise: Tensor | float) -> Tensor:
    """Patches as lines along time, and as lines along frequency [B, 2, V, E], each with less noise, for a run over that axis.

    Along an axis the entries of a sample are correlated as its own covariance R says, which the four entries of all lines in
    all visible patches give; the Wiener filter of white noise (noise: its power over the channel's) is I - noise R^-1. Only
    the two axes across the run are filtered: along it, the filter would bend the recursion.
    """
    by_time, by_antenna, by_frequency = _wiener(products, noise).float().split(1, dim=1)
    across = lines[1] @ by_antenna
    over_time = _first_axis_last(_first_axis_last(across) @ by_frequency)
    over_frequency = _last_axis_first(_last_axis_first(across) @ by_time)
    return torch.cat([found.reshape(-1, 1, found.shape[2] // LINES, ELEMENTS) for found in (over_time, over_frequency)], dim=1)


def _wiener(products: Tensor, noise: Tensor | float) -> Tensor:
    """Filters [B, 3, 8, 8], to be multiplied from the right, from the products of all lines along each axis [B, 3, 64]."""
    size = 2 * PATCH
    power = (products @ TO_LAG_AND_POWER.to(products))[..., 2:] / PATCH
    unit = torch.eye(size, dtype=products.dtype, device=products.device)
    beside = torch.cat([(LOADING * noise + 1e-6) * unit, unit], dim=-1)
    covariance = TO_COVARIANCE(products / power.clamp_min(1e-12))
    return unit - noise * _eliminated(covariance + beside)[..., size:]


def _eliminated(work: Tensor) -> Tensor:
    """[A | Y] -> [1 | A^-1 Y], of complex Hermitian positive definite A as real ones: [..., 2 n, 2 n + columns of Y]."""
    size, columns = work.shape[-2:]
    unit = torch.eye(columns, size, dtype=work.dtype, device=work.device)
    for i in range(0, size, 2):  # Gauss and Jordan on real and imaginary part at once: their pivot is one real, positive number
        pair = slice(i, i + 2)
        rows, own = work[..., pair, :], unit[:, pair]
        rows = rows / (rows @ own.sum(dim=-1, keepdim=True))
        work = work - (work[..., pair] - own[:size]) @ rows
    return work


def continued(visible_at: Tensor, wanted_at: Tensor, lines: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor, Tensor]:
    """Each wanted patch [B, M, E] as the run of the nearest visible one, over time or, at the same time, over frequency.

    Autoregressive models along both axes, fitted to each sample by ridge least squares over the windows of all pairs of
    neighbouring visible patches, forwards and (conjugated) backwards.
    lines: what the runs over time and over frequency are fitted to and start from [B, 2, V, E] (as `cleaned` gives them).
    Also returns whether a pair leads to the patch [B, M, 1] (what the run says is worth nothing otherwise), and the nearest
    visible patch [B, M, V] as a one in its column.
    """
    visible, wanted = visible_at.float(), wanted_at.float()
    pairs, paired = _pairs(lines, visible)
    near_BMV = _nearest(visible, wanted)
    offset = wanted - near_BMV @ visible
    in_time, in_frequency = offset[..., :1], offset[..., 2:]
    over_time = in_time > 0
    ahead = torch.where(over_time, in_time, in_frequency)
    # One column for each patch and way to go on from it.
    chosen = torch.where(over_time, near_BMV, 0.0)
    chosen = torch.cat([chosen, near_BMV - chosen], dim=-1)
    known = (chosen @ paired.flatten(1, 2)) > 0
    moves = known & (ahead > 0) & (in_time >= 0)
    state = (chosen @ pairs.flatten(3).flatten(1, 2)).unflatten(-1, (LINES, 4 * PATCH))
    weights = several_steps(fitted(pairs, ridge)) @ STATE.to(torch.float64)
    weights = weights.float().reshape(-1, 2 * REACH * PATCH, 8 * PATCH)
    run = (state @ _at_steps(weights, over_time, ahead).transpose(-1, -2)).flatten(2)
    return torch.where(over_time, _last_axis_first(run), run), moves, near_BMV


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


def _at_steps(weights: Tensor, over_time: Tensor, ahead: Tensor) -> Tensor:
    """Of all weights [B, 2 * 16, 32] (axis, step) those by which each wanted patch is reached: [B, M, (step, re or im), 16]."""
    inside = torch.arange(-PATCH, 0, device=ahead.device)
    step_BMP = (PATCH * ahead + inside).clamp(0, REACH * PATCH - 1) + torch.where(over_time, 0.0, REACH * PATCH)
    chosen = step_BMP.reshape(-1, ahead.shape[1] * PATCH, 1) == torch.arange(weights.shape[1], device=ahead.device)
    return (chosen.float() @ weights).reshape(-1, ahead.shape[1], 2 * PATCH, 4 * PATCH)


def _pairs(lines: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Lines over two patches [B, 2, V, 16, 16]: the neighbour's before each, then its own, along both axes; or zeros.

    And whether there is a neighbour [B, 2, V, 1].
    """
    base = torch.tensor([[1.0], [FAR], [FAR**2]], dtype=torch.float64, device=at.device)
    number, step = at.double() @ base, base[list(RUNS), :, None]
    before = ((number - number.transpose(1, 2))[:, None] == step).float()
    has = before.sum(dim=-1, keepdim=True)
    both = [part.unflatten(-1, (LINES, 2 * PATCH)) for part in (before @ lines, lines * has)]
    return torch.cat(both, dim=-1), has


def fitted(pairs: Tensor, ridge: float = RIDGE) -> Tensor:
    """Weights [..., 2 ORDER] of the entry that follows a state, from lines [..., V, 16, 4 PATCH] over two patches."""
    rows = pairs.flatten(-3, -2).double()
    equations = TO_EQUATIONS((rows.transpose(-1, -2) @ rows).flatten(-2))
    unit = torch.eye(2 * ORDER, 2 * ORDER + 1, dtype=rows.dtype, device=rows.device)
    level = (equations * unit).sum(dim=(-1, -2), keepdim=True) / (2 * ORDER)
    return _eliminated(equations + (ridge * level + 1e-6) * unit)[..., -1]


def several_steps(weights: Tensor) -> Tensor:
    """Weights of a state one, two, ... steps later [..., (step, re or im), 2 ORDER], from those of one step [..., 2 ORDER]."""
    size = 2 * ORDER
    power = (weights @ TO_RECURSION.to(weights)).unflatten(-1, (size, size)) + SHIFT.to(weights)
    found = power[..., -2:, :]
    while found.shape[-2] < 2 * REACH * PATCH:
        found = torch.cat([found, found @ power], dim=-2)
        power = power @ power
    return found
