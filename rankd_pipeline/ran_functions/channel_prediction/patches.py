"""A channel as patches: cutting, putting together, where each patch lies, and which ones a task hides.

Shapes: n samples, T instants, N antennas, K subcarriers; L patches in the order time, antenna, frequency (frequency
fastest), E = 128 real numbers a patch in the order (instant, antenna, subcarrier, re/im), V visible and M wanted patches.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, PATCH

TASKS = ("time", "frequency")
RANDOM_KEPT, TIME_KEPT, FREQUENCY_KEPT = 0.15, 0.5, 0.5
"""Shares of the patches that stay visible (WiFo: mask ratios 0.85, 0.5, 0.5), counts rounded down."""


def patchify(h_nTNK: np.ndarray) -> np.ndarray:
    """Complex channels [n, T, N, K] as float32 patches [n, L, E]; RankdError where a patch does not divide an axis."""
    n, *sizes = h_nTNK.shape
    for axis, size in zip(("instants", "antennas", "subcarriers"), sizes, strict=True):
        if size % PATCH:
            raise RankdError(f"channel with {size} {axis}: expected a multiple of {PATCH}, the size of a patch.")
    t, a, k = (size // PATCH for size in sizes)
    parts = np.stack([np.real(h_nTNK), np.imag(h_nTNK)], axis=-1).astype(np.float32)
    cut = parts.reshape(n, t, PATCH, a, PATCH, k, PATCH, 2).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return np.ascontiguousarray(cut.reshape(n, t * a * k, ELEMENTS))


def unpatchify(patches_nLE: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """The inverse of `patchify`: complex64 [n, T, N, K] of a grid of (time, antenna, frequency) patches."""
    t, a, k = grid
    n = len(patches_nLE)
    whole = patches_nLE.reshape(n, t, a, k, PATCH, PATCH, PATCH, 2).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    whole = whole.reshape(n, t * PATCH, a * PATCH, k * PATCH, 2)
    return (whole[..., 0] + 1j * whole[..., 1]).astype(np.complex64)


def coordinates(grid: Sequence[int]) -> np.ndarray:
    """Where each patch lies, in patches: int16 [L, 3] along time, antenna, frequency."""
    return np.indices(tuple(grid)).reshape(3, -1).T.astype(np.int16)


def visible_patches(grid: Sequence[int], task: str) -> np.ndarray:
    """Indices of the patches that a task leaves visible: the first half of the time (or frequency) patches."""
    axis, share = {"time": (0, TIME_KEPT), "frequency": (2, FREQUENCY_KEPT)}[task]
    kept = int(grid[axis] * share)
    if not 0 < kept < grid[axis]:
        raise RankdError(
            f"task {task}: {grid[axis]} patches along its axis cannot be split into seen and wanted; expected at least 2."
        )
    return np.flatnonzero(coordinates(grid)[:, axis] < kept)


def wanted_patches(grid: Sequence[int], task: str) -> np.ndarray:
    """Indices of the patches that a task hides, in order."""
    return np.setdiff1d(np.arange(int(np.prod(grid))), visible_patches(grid, task))


def random_kept(tokens: int) -> int:
    """Patches that the random mask leaves visible."""
    return max(1, int(RANDOM_KEPT * tokens))


def questions(grid_n3: np.ndarray, task_n: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, int, int], str]]:
    """(row numbers, grid, task) of rows of like shape and question."""
    grids = np.asarray(grid_n3, np.int64)
    tasks = np.asarray(task_n).astype(str)
    for grid in np.unique(grids, axis=0):
        for task in np.unique(tasks):
            rows = np.flatnonzero((grids == grid).all(axis=1) & (tasks == task))
            if len(rows):
                yield rows, (int(grid[0]), int(grid[1]), int(grid[2])), str(task)


def network_inputs(csi_nLE: np.ndarray, grid_n3: np.ndarray, task_n: np.ndarray) -> dict[str, np.ndarray]:
    """What a network sees: `visible_patches` [n, V, E], `visible_at` [n, V, 3], `wanted_at` [n, M, 3], float32.

    Rows with fewer patches are padded with zeros, and with -1 for a place.
    """
    parts = [(rows, visible_patches(grid, task), wanted_patches(grid, task), coordinates(grid))
             for rows, grid, task in questions(grid_n3, task_n)]  # fmt: skip
    most_seen, most_wanted = (max((len(part[i]) for part in parts), default=0) for i in (1, 2))
    n = len(csi_nLE)
    found = {
        "visible_patches": np.zeros((n, most_seen, ELEMENTS), np.float32),
        "visible_at": np.full((n, most_seen, 3), -1, np.float32),
        "wanted_at": np.full((n, most_wanted, 3), -1, np.float32),
    }
    for rows, seen, wanted, at in parts:
        found["visible_patches"][rows, : len(seen)] = csi_nLE[rows][:, seen]
        found["visible_at"][rows, : len(seen)] = at[seen]
        found["wanted_at"][rows, : len(wanted)] = at[wanted]
    return found


def with_hidden(values_nLE: np.ndarray, grid_n3: np.ndarray, task_n: np.ndarray, hidden_nME: np.ndarray) -> np.ndarray:
    """A copy of `values_nLE` whose hidden patches are those of `hidden_nME`: what `hidden_patches` took out, back in place."""
    found = values_nLE.copy()
    for rows, grid, task in questions(grid_n3, task_n):
        wanted = wanted_patches(grid, task)
        found[np.ix_(rows, wanted)] = hidden_nME[rows, : len(wanted)]
    return found


def hidden_patches(csi_nLE: np.ndarray, grid_n3: np.ndarray, task_n: np.ndarray) -> np.ndarray:
    """The patches that each row's task hides [n, M, E] float32, padded with zeros: what a network is to say."""
    parts = [(rows, wanted_patches(grid, task)) for rows, grid, task in questions(grid_n3, task_n)]
    found = np.zeros((len(csi_nLE), max((len(wanted) for _, wanted in parts), default=0), ELEMENTS), np.float32)
    for rows, wanted in parts:
        found[rows, : len(wanted)] = csi_nLE[rows][:, wanted]
    return found
