"""The pictures of link adaptation: goodput over users, BLER over time, what happens after a jump of the SNR.

Axis legend: N traces, T slots.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from rankd_pipeline.ran_functions.link_adaptation.config import BLER_TARGET, SLOT_US
from rankd_pipeline.ran_functions.link_adaptation.metrics import expected_bit_s_hz, genie_bit_s_hz, goodput_bit_s_hz
from rankd_pipeline.ran_functions.link_adaptation.rollout import Rollout, Traces
from rankd_pipeline.report.figures import colours, new_figure, percent, png, readable

SMOOTH_SLOTS = 100
BEFORE, AFTER = 40, 200
"""Slots shown before and after a jump."""


def rollout_pictures(traces: Traces, rollouts: Mapping[str, Rollout]) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of each picture; `rollouts` by model, all over `traces`."""
    yield "goodput_cdf_over_users", _goodput_cdf(rollouts)
    yield "bler_over_time", _bler_over_time({name: r for name, r in rollouts.items() if name != "genie"})
    for way, sign in (("down", -1), ("up", 1)):
        rows = _jumps(traces, sign)
        if len(rows):
            yield f"after_snr_jump_{way}", _after_jump(traces, rollouts, rows)


def _goodput_cdf(rollouts: Mapping[str, Rollout]) -> bytes:
    figure, axes = new_figure()
    for name, colour in colours(list(rollouts)):
        value = np.sort(goodput_bit_s_hz(rollouts[name]))
        axes.step(value, (np.arange(len(value)) + 1) / len(value), where="post", color=colour, linewidth=1.4, label=readable(name))
    axes.axhline(0.05, color="#9aa5b1", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, None), ylim=(0, 1), xlabel="goodput of a user [bit/s/Hz]", ylabel="share of users below")
    percent(axes, "y")
    axes.legend(loc="lower right")
    return png(figure)


def _bler_over_time(rollouts: Mapping[str, Rollout]) -> bytes:
    """Running mean over users and SMOOTH_SLOTS slots."""
    figure, axes = new_figure()
    kernel = np.ones(SMOOTH_SLOTS) / SMOOTH_SLOTS
    for name, colour in colours(list(rollouts)):
        bler = np.convolve(1.0 - rollouts[name].ack_NT.mean(axis=0), kernel, mode="valid")
        time_s = (np.arange(len(bler)) + SMOOTH_SLOTS / 2) * SLOT_US * 1e-6
        axes.plot(time_s, bler, color=colour, linewidth=1.2, label=readable(name))
    axes.axhspan(BLER_TARGET - 0.01, BLER_TARGET + 0.01, color="#dde3e8", zorder=0)
    axes.set(xlim=(0, None), ylim=(0, None), xlabel="time since the first slot [s]", ylabel="BLER")
    percent(axes, "y")
    axes.legend(loc="upper right", ncols=2)
    return png(figure)


def _after_jump(traces: Traces, rollouts: Mapping[str, Rollout], rows: np.ndarray) -> bytes:
    """Expected goodput over the genie's, mean over the traces that jump, by slots since the jump."""
    figure, axes = new_figure()
    window = traces.step_slot_N[rows][:, None] + np.arange(-BEFORE, AFTER)
    best = genie_bit_s_hz(traces)[rows[:, None], window].mean(axis=0)
    kernel = np.ones(5) / 5
    for name, colour in colours([name for name in rollouts if name != "genie"]):
        got = expected_bit_s_hz(traces, rollouts[name])[rows[:, None], window].mean(axis=0)
        share = np.convolve(got, kernel, mode="valid") / np.convolve(best, kernel, mode="valid")
        axes.plot(np.arange(-BEFORE + 2, AFTER - 2), share, color=colour, linewidth=1.3, label=readable(name))
    axes.axvline(0, color="#9aa5b1", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlim=(-BEFORE, AFTER), ylim=(0, 1), xlabel="slots since the jump", ylabel="goodput over the genie's")
    percent(axes, "y")
    axes.legend(loc="lower right", ncols=2)
    return png(figure)


def _jumps(traces: Traces, sign: int) -> np.ndarray:
    """Traces whose mean SNR jumps up (sign 1) or down (-1) with room around it."""
    slots = traces.cqi_NT.shape[1]
    at = traces.step_slot_N.astype(int)
    inside = np.flatnonzero((at >= BEFORE) & (at <= slots - AFTER))
    if not len(inside):
        return inside
    best = genie_bit_s_hz(traces)[inside]
    before, after = (np.take_along_axis(best, at[inside][:, None] + offsets, axis=1).mean(axis=1)
                     for offsets in (np.arange(-BEFORE, 0), np.arange(AFTER)))  # fmt: skip
    return inside[np.sign(after - before) == sign]
