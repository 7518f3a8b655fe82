"""A few paths' run: a sample's visible patches, cleaned of noise, and continued over time or frequency.

A few paths make a sum of ramps of phase, which an autoregressive model continues, and in which neighbouring antennas and
subcarriers tell channel from noise. Both models are the sample's own, fitted to its visible part; nothing here is learned.

Sums over a sample, inverses and powers of matrices are in double precision: in single, torch and a runtime would differ by a
per cent. A runtime spends its time here on starting operators and on broadcasts of short axes, not on numbers. So both runs,
or all three axes, go through one operator, and real and imaginary parts stand as planes in front of all else.

Shapes: B samples, V visible and M wanted patches, L of any, E = 2 * PATCH**3 real numbers a patch, n = PATCH**3 entries. A line
is PATCH entries along an axis, real parts, then imaginary ones. Complex numbers stand as real ones, because ONNX has no others.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rankd_pipeline.ran_functions.channel_prediction.config import PATCH

ORDER = 6
"""Of the autoregressive model. Two neighbouring patches would allow 7, which fits fast fading too closely."""
LOADING = 0.1
"""Of covariances before they are inverted, in noise powers: a few lines alone would overstate what noise there is."""
REACH = 4
"""Patches that a run is continued over; behind them its last value stays."""
RIDGE = 1e-3
AXES = (0, 1, 2)
RUNS = (0, 2)
"""The axes over which a channel is continued: time and frequency."""
LINES = PATCH * PATCH
FAR = 4096.0
"""More places than any axis has: (1, FAR, FAR**2) makes one number of three places."""
WHOLE = torch.arange(4 * PATCH).reshape(2, 2, PATCH).transpose(0, 1).flatten()
"""Lines of two patches, one behind the other, as one line: all real parts, then all imaginary ones."""
STATE = torch.eye(4 * PATCH)[WHOLE].unflatten(0, (2, 2 * PATCH))[:, 2 * PATCH - ORDER :].flatten(0, 1)
"""The state (the last ORDER entries, re, then im) out of the lines of two patches [2 ORDER, 4 PATCH]."""


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
    """Real and imaginary part of the sums of conj(x_i) x_j, from the products [..., 2 m, 2 m] of parts (real, then imaginary)."""
    m = square.shape[-1] // 2
    rr, ri, ir, ii = (square[..., i : i + m, j : j + m] for i in (0, m) for j in (0, m))
    return rr + ii, ri - ir


def _covariance(square: Tensor) -> Tensor:
    """A Hermitian matrix as a real one, beside a place for a unit matrix."""
    re, im = _hermitian(square)
    real = torch.cat([torch.cat([re, im], dim=-1), torch.cat([-im, re], dim=-1)], dim=-2)
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
    square = square[..., WHOLE, :][..., WHOLE]
    windows = [slice(i, i + ORDER + 1) for i in range(2 * PATCH - ORDER)]
    re, im = (torch.stack([part[..., w, w] for w in windows]).sum(dim=0) for part in _hermitian(square))
    re, im = (part + part.flip(-1, -2).transpose(-1, -2) for part in (re, im))
    a, b, y, z = re[..., :ORDER, :ORDER], im[..., :ORDER, :ORDER], re[..., :ORDER, ORDER:], im[..., :ORDER, ORDER:]
    return torch.cat([torch.cat([a, -b, y], dim=-1), torch.cat([b, a, z], dim=-1)], dim=-2)


def _recursion(weights: Tensor) -> Tensor:
    """[..., 2 ORDER, 2 ORDER]: one step of the state (entries, the oldest first, re, then im), but for the shift."""
    re, im = weights[..., :ORDER], weights[..., ORDER:]
    nothing = torch.zeros(*weights.shape[:-1], ORDER - 1, 2 * ORDER, dtype=weights.dtype)
    new = [torch.cat(pair, dim=-1)[..., None, :] for pair in ((re, -im), (im, re))]
    return torch.cat([nothing, new[0], nothing, new[1]], dim=-2)


TO_COVARIANCE = Sums(_covariance, 2 * PATCH, 2 * PATCH)
TO_LAG_AND_POWER = _lag_and_power(torch.eye(4 * PATCH**2, dtype=torch.float64).unflatten(-1, (2 * PATCH, 2 * PATCH)))
TO_EQUATIONS = Sums(_normal_equations, 4 * PATCH, 4 * PATCH)
TO_RECURSION = _recursion(torch.eye(2 * ORDER)).flatten(1)
SHIFT = torch.block_diag(*[torch.eye(ORDER).roll(1, dims=1).tril(1).triu(1)] * 2)
"""What becomes of a state in one step, but for the new entry."""


def planes_of(patches_BLE: Tensor) -> Tensor:
    """Real and imaginary parts of patches, as planes [B, 2, L, n]."""
    rows = patches_BLE.reshape(-1, patches_BLE.shape[1] * PATCH**3, 2)
    return rows.transpose(1, 2).unflatten(2, (patches_BLE.shape[1], PATCH**3))


def patches_of(planes_B2Ln: Tensor) -> Tensor:
    """The inverse of `planes_of`."""
    return planes_B2Ln.flatten(2).transpose(1, 2).reshape(-1, planes_B2Ln.shape[2], 2 * PATCH**3)


def cleaned(lines: Tensor, products: Tensor, noise: Tensor | float) -> Tensor:
    """Lines [B, 2, V, 16, 8] for a run over time, and for one over frequency, with less noise, from `lines_of` and `products_of`.

    Along an axis the entries of a sample are correlated as its own covariance R says, which the four entries of all lines in
    all visible patches give; the Wiener filter of white noise (noise: its power over the channel's) is I - noise R^-1. Only
    the two axes across the run are filtered: along it, the filter would bend the recursion.
    """
    by_time, by_antenna, by_frequency = _wiener(products, noise).float().unbind(dim=1)
    count = lines.shape[2] // LINES
    across = lines[:, 1] @ by_antenna
    over_time, over_frequency = (
        _other_lines(across, 1, axis, count).reshape(-1, count * LINES, 2 * PATCH) @ weights
        for axis, weights in ((2, by_frequency), (0, by_time))
    )
    shape = (-1, 1, count, LINES, 2 * PATCH)
    ends = (_other_lines(over_time, 2, 0, count), _other_lines(over_frequency, 0, 2, count))
    return torch.cat([lines.reshape(shape) for lines in ends], dim=1)


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
    n = size // 2
    unit = torch.eye(columns, size, dtype=work.dtype, device=work.device)
    for i in range(n):  # Gauss and Jordan on real and imaginary part at once: their pivot is one real, positive number
        rows, own = work[..., i::n, :], unit[:, i::n]
        rows = rows / (rows @ own.sum(dim=-1, keepdim=True))
        work = work - (work[..., i:size:n] - own[:size]) @ rows
    return work


def continued(
    planes_B2Vn: Tensor, visible_at: Tensor, wanted_at: Tensor, lines: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor, Tensor]:
    """Each wanted patch as the run of the nearest visible one, over time or, at the same time, over frequency: planes [B, 2, M, n].

    Autoregressive models along both axes, fitted to each sample by ridge least squares over the windows of all pairs of
    neighbouring visible patches, forwards and (conjugated) backwards. Nothing gets larger than the largest entry that was seen.
    lines: what the runs over time and over frequency are fitted to and start from [B, 2, V, 16, 8] (as `cleaned` gives them).
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
    moves = known & (over_time | ((in_time == 0) & (ahead > 0)))
    state = (chosen @ pairs.flatten(3).flatten(1, 2)).unflatten(-1, (LINES, 4 * PATCH))
    weights = several_steps(fitted(pairs, ridge)) @ STATE.to(torch.float64)
    weights = weights.float().reshape(-1, 2 * REACH * PATCH, 8 * PATCH)
    run = state @ _at_steps(weights, over_time, ahead).transpose(-1, -2)
    values = torch.where(over_time[:, None], _steps_as_planes(run, 0), _steps_as_planes(run, 2))
    bound = (planes_B2Vn * planes_B2Vn).sum(dim=1, keepdim=True).amax(dim=(2, 3), keepdim=True)
    power = (values * values).sum(dim=1, keepdim=True).clamp_min(1e-18)
    return values * torch.sqrt((bound / power).clamp_max(1.0)), moves, near_BMV


def _nearest(visible: Tensor, wanted: Tensor) -> Tensor:
    """One in the column of the nearest visible patch [B, M, V], antennas counting more."""
    weight = torch.tensor([1.0, 4.0, 1.0], device=visible.device)[:, None, None]
    away = ((wanted.transpose(1, 2)[..., None] - visible.transpose(1, 2)[:, :, None]).abs() * weight).sum(dim=1)
    return (away.argmin(dim=-1, keepdim=True) == torch.arange(visible.shape[1], device=visible.device)).float()


def _at_steps(weights: Tensor, over_time: Tensor, ahead: Tensor) -> Tensor:
    """Of all weights [B, 2 * 16, 32] (axis, step) those by which each wanted patch is reached: [B, M, (step, re or im), 16]."""
    inside = torch.arange(-PATCH, 0, device=ahead.device)
    step_BMP = (PATCH * ahead + inside).clamp(0, REACH * PATCH - 1) + torch.where(over_time, 0.0, REACH * PATCH)
    chosen = step_BMP.reshape(-1, ahead.shape[1] * PATCH, 1) == torch.arange(weights.shape[1], device=ahead.device)
    return (chosen.float() @ weights).reshape(-1, ahead.shape[1], 2 * PATCH, 4 * PATCH)


def _pairs(lines: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Lines [B, 2, V, 16, 16]: the neighbour's before each patch, then its own, along both axes; zeros without a neighbour.

    And whether there is one [B, 2, V, 1].
    """
    base = torch.tensor([[1.0], [FAR], [FAR**2]], dtype=torch.float64, device=at.device)
    number, step = at.double() @ base, base[list(RUNS), :, None]
    before = ((number - number.transpose(1, 2))[:, None] == step).float()
    has = before.sum(dim=-1, keepdim=True)
    flat = lines.flatten(3)
    both = [part.unflatten(-1, (LINES, 2 * PATCH)) for part in (before @ flat, flat * has)]
    return torch.cat(both, dim=-1), has


def fitted(pairs: Tensor, ridge: float = RIDGE) -> Tensor:
    """Weights [..., 2 ORDER] (re, then im) of the entry that follows a state, from lines [..., V, 16, 4 PATCH] over two patches."""
    rows = pairs.flatten(-3, -2).double()
    equations = TO_EQUATIONS((rows.transpose(-1, -2) @ rows).flatten(-2))
    unit = torch.eye(2 * ORDER, 2 * ORDER + 1, dtype=rows.dtype, device=rows.device)
    level = (equations * unit).sum(dim=(-1, -2), keepdim=True) / (2 * ORDER)
    return _eliminated(equations + (ridge * level + 1e-6) * unit)[..., -1]


def several_steps(weights: Tensor) -> Tensor:
    """Weights of a state one, two, ... steps later [..., (step, re or im), 2 ORDER], from those of one step [..., 2 ORDER]."""
    size = 2 * ORDER
    power = (weights @ TO_RECURSION.to(weights)).unflatten(-1, (size, size)) + SHIFT.to(weights)
    found = power[..., ORDER - 1 :: ORDER, :]
    while found.shape[-2] < 2 * REACH * PATCH:
        found = torch.cat([found, found @ power], dim=-2)
        power = power @ power
    return found


def lines_of(patches_BVE: Tensor) -> Tensor:
    """All lines of a sample along each of the three axes [B, 3, V * 16, 8]."""
    shape = (-1, 1, patches_BVE.shape[1] * LINES, 2 * PATCH)
    return torch.cat([_along(patches_BVE, axis).reshape(shape) for axis in AXES], dim=1)


def _along(patches_BLE: Tensor, axis: int) -> Tensor:
    """Patches [B, L, the other two axes, 2, PATCH] with time (axis 0), antennas (1) or frequency (2) last."""
    cut = patches_BLE.unflatten(-1, (PATCH, PATCH, PATCH, 2))
    return cut.permute(0, 1, *[2 + other for other in AXES if other != axis], 5, 2 + axis)


def products_of(lines: Tensor) -> Tensor:
    """Products of a line's numbers [B, 3, 64], summed over all lines."""
    numbers = lines.double()
    return (numbers.transpose(-1, -2) @ numbers).flatten(-2)


def _other_lines(lines: Tensor, axis: int, other: int, count: int) -> Tensor:
    """Lines along one axis [B, L * 16, 8] as those along another [B, L, two axes, 2, PATCH]."""
    order = [place for place in AXES if place != axis] + [3, axis]  # as the numbers are stored; 3: re or im
    wanted = [place for place in AXES if place != other] + [3, other]
    cut = lines.reshape(-1, count, *(2 if place == 3 else PATCH for place in order))
    return cut.permute(0, 1, *(2 + order.index(place) for place in wanted))


def _steps_as_planes(run: Tensor, axis: int) -> Tensor:
    """Planes [B, 2, M, n] from what stands on each line along time (axis 0) or frequency (2) [B, M, 16, (step, re or im)]."""
    if axis == 2:  # it is the last one in a patch, too
        return planes_of(run.flatten(2))
    return run.unflatten(-1, (PATCH, 2)).permute(0, 4, 1, 3, 2).flatten(3)
