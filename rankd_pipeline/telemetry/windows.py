"""Windows of telemetry: an hour of the field, or as many hours as it takes to have enough rows to judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np

HOUR_S = 3600.0


@dataclass(frozen=True)
class Window:
    """Rows of [start_s, end_s). state "too small": it has too few rows, and waits for more unless it is `closed`."""

    key: str
    start_s: float
    end_s: float
    rows: int
    labelled: int
    state: Literal["ready", "too small"]
    closed: bool = False


def cut(
    time_s: np.ndarray, has_label: np.ndarray, min_rows: int, hours: float = 1.0, max_hours: float = 24.0, keep: int | None = None
) -> list[Window]:
    """Windows of rows at `time_s`, oldest first; the last `keep` of them.

    An hour with fewer than min_rows rows is joined by the following ones, up to max_hours; what is then still too small
    is closed and not judged. The window that now runs is judged as soon as it has min_rows rows.
    """
    step = hours * HOUR_S
    order = np.argsort(time_s, kind="stable")
    bins, counts = np.unique(np.floor(time_s[order] / step).astype(np.int64), return_counts=True)
    labelled = np.bincount(np.searchsorted(bins, np.floor(time_s / step).astype(np.int64)), has_label, len(bins)).astype(int)
    windows: list[Window] = []
    start, rows, marked = int(bins[0]) if len(bins) else 0, 0, 0
    for number, count, labels in zip(bins.tolist(), counts.tolist(), labelled.tolist(), strict=True):
        if rows and (number - start) * hours >= max_hours:
            windows.append(_window(start, start + round(max_hours / hours), step, rows, marked, False, True))
            rows, marked = 0, 0
        start = start if rows else number
        rows, marked = rows + count, marked + labels
        if rows >= min_rows:
            windows.append(_window(start, number + 1, step, rows, marked, True, False))
            rows, marked = 0, 0
    if rows:
        windows.append(_window(start, int(bins[-1]) + 1, step, rows, marked, False, False))
    return windows[-keep:] if keep else windows


def rows_in(window: Window, time_s: np.ndarray) -> np.ndarray:
    """Positions of the window's rows."""
    return np.flatnonzero((time_s >= window.start_s) & (time_s < window.end_s))


def newest_ready(windows: Sequence[Window]) -> Window | None:
    """The last window that can be judged."""
    return next((window for window in reversed(windows) if window.state == "ready"), None)


def _window(start: int, end: int, step: float, rows: int, labelled: int, ready: bool, closed: bool) -> Window:
    key = datetime.fromtimestamp(start * step, UTC).strftime("%Y-%m-%dT%H:%M")
    return Window(key, start * step, end * step, rows, labelled, "ready" if ready else "too small", closed)
