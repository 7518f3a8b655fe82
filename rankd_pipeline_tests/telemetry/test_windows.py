"""Windows: an hour, or as many as it takes; what is too small waits, and in the end is not judged."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.telemetry.windows import HOUR_S, Window, cut, newest_ready, rows_in

T0 = 1_790_000_000.0 // HOUR_S * HOUR_S


def windows(counts: list[int], min_rows: int = 1000, **options: float) -> list[Window]:
    time_s = np.concatenate([np.full(0, 0.0), *(T0 + hour * HOUR_S + np.arange(n) * 0.01 for hour, n in enumerate(counts))])
    return cut(time_s, np.arange(len(time_s)) % 10 == 0, min_rows, **options)  # type: ignore[arg-type]


def test_an_hour_with_enough_rows_is_a_window() -> None:
    found = windows([1000, 2500, 1001])
    assert [(w.rows, w.state) for w in found] == [(1000, "ready"), (2500, "ready"), (1001, "ready")]
    assert found[1].start_s == T0 + HOUR_S and found[1].end_s == T0 + 2 * HOUR_S and found[0].labelled == 100
    assert len({w.key for w in found}) == 3


def test_small_hours_join_and_the_last_one_waits() -> None:
    found = windows([400, 400, 400, 10])
    assert [(w.rows, w.state, w.closed) for w in found] == [(1200, "ready", False), (10, "too small", False)]
    assert newest_ready(found) == found[0]


def test_what_stays_too_small_is_closed_and_not_judged() -> None:
    found = windows([1] * 30)
    assert (found[0].rows, found[0].state, found[0].closed) == (24, "too small", True)
    assert newest_ready(found) is None
    assert windows([1])[0].state == "too small" and windows([]) == []


def test_a_gap_ends_a_window_of_few_rows() -> None:
    found = windows([5, *[0] * 40, 1000])
    assert [(w.rows, w.state) for w in found] == [(5, "too small"), (1000, "ready")]


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 400))
def test_every_row_is_in_one_window(counts: list[int], min_rows: int) -> None:
    found = windows(counts, min_rows)
    assert sum(w.rows for w in found) == sum(counts)
    assert all(one.end_s <= two.start_s for one, two in zip(found, found[1:], strict=False))
    assert all((w.rows >= min_rows) == (w.state == "ready") for w in found)
    time_s = np.concatenate([np.full(0, 0.0), *(T0 + hour * HOUR_S + np.arange(n) * 0.01 for hour, n in enumerate(counts))])
    assert [len(rows_in(w, time_s)) for w in found] == [w.rows for w in found]
