"""The pictures of link adaptation: goodput over users, Doppler and report age, BLER over time and target, bursts, jumps of the SNR.

Axis legend: N traces, T slots.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from rankd_pipeline.ran_functions.link_adaptation.config import BLER_TARGET, SLOT_US
from rankd_pipeline.ran_functions.link_adaptation.metrics import (
    DOPPLER_CLASSES,
    DOPPLER_EDGES_HZ,
    bursts,
    expected_bit_s_hz,
    genie_bit_s_hz,
    goodput_bit_s_hz,
)
from rankd_pipeline.ran_functions.link_adaptation.rollout import Policy, Rollout, Traces, roll_out
from rankd_pipeline.report.figures import INK, colours, new_figure, percent, png, readable

SMOOTH_SLOTS = 100
BEFORE, AFTER = 40, 200
"""Slots shown before and after a jump."""
AGE_EDGES_SLOTS = (13.0, 20.0)
"""Mean age of a user's CQI reports: periods of 10, 20 and 40 slots come to about 11, 16 and 26."""
TARGETS = (0.01, 0.03, 0.1, 0.2)
LONGEST_BURST = 12


def rollout_pictures(traces: Traces, rollouts: Mapping[str, Rollout]) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of each picture; `rollouts` by model, all over `traces`."""
    yield "goodput_cdf_over_users", _goodput_cdf(rollouts)
    yield "bler_over_time", _bler_over_time({name: r for name, r in rollouts.items() if name != "genie"})
    for way, sign in (("down", -1), ("up", 1)):
        rows = _jumps(traces, sign)
        if len(rows):
            yield f"after_snr_jump_{way}", _after_jump(traces, rollouts, rows)
    yield "nack_bursts_by_length", _nack_bursts({name: r for name, r in rollouts.items() if name != "genie"})


def gain_picture(traces: Traces, rollout: Rollout, reference: Rollout, names: tuple[str, str]) -> bytes:
    """By how much more goodput one model has than another, by Doppler and by age of the CQI; names: of both."""
    figure, axes = new_figure()
    doppler = np.searchsorted(DOPPLER_EDGES_HZ, traces.doppler_hz_N)
    age = np.searchsorted(AGE_EDGES_SLOTS, traces.cqi_age_slots_NT.mean(axis=1))
    got, least = goodput_bit_s_hz(rollout), goodput_bit_s_hz(reference)
    gain = np.full((len(AGE_EDGES_SLOTS) + 1, len(DOPPLER_CLASSES)), np.nan)
    for at in np.ndindex(*gain.shape):
        rows = (age == at[0]) & (doppler == at[1])
        if rows.any() and least[rows].sum() > 0:
            gain[at] = got[rows].sum() / least[rows].sum() - 1.0
            axes.text(at[1], at[0], f"{gain[at]:+.1%}\n{rows.sum()} users", ha="center", va="center", fontsize=8, color=INK)
    largest = max(float(np.nanmax(np.abs(gain))), 0.01)
    axes.imshow(gain, cmap="RdYlGn", vmin=-largest, vmax=largest, aspect="auto", alpha=0.6)
    axes.grid(visible=False)
    edges = [f"{edge:g}" for edge in DOPPLER_EDGES_HZ]
    axes.set_xticks(range(len(DOPPLER_CLASSES)), [f"< {edges[0]}", " to ".join(edges), f"> {edges[-1]}"])
    edges = [f"{edge:g}" for edge in AGE_EDGES_SLOTS]
    axes.set_yticks(range(len(AGE_EDGES_SLOTS) + 1), [f"< {edges[0]}", " to ".join(edges), f"> {edges[-1]}"])
    axes.set(xlabel="maximum Doppler [Hz]", ylabel="mean age of CQI [slots]")
    axes.set_title(f"goodput of {readable(names[0])} over {readable(names[1])}", fontsize=8.5, color=INK)
    return png(figure)


def target_picture(traces: Traces, models: Mapping[str, Policy]) -> bytes:
    """What comes of another BLER target, given at run time: BLER and goodput of each model that takes one."""
    figure, axes = new_figure()
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    side_by_side, users = traces.repeated(len(TARGETS)), len(traces.cqi_NT)
    for name, colour in colours(list(models)):
        rollout = roll_out(side_by_side, models[name].aiming_at(np.repeat(TARGETS, users)))
        bler = 1.0 - rollout.ack_NT.reshape(len(TARGETS), -1).mean(axis=1)
        goodput = goodput_bit_s_hz(rollout).reshape(len(TARGETS), -1).mean(axis=1)
        axes.plot(TARGETS, bler, color=colour, marker="o", markersize=4, linewidth=1.3, label=f"{readable(name)}: BLER")
        right.plot(TARGETS, goodput, color=colour, marker="s", markersize=4, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.plot(TARGETS, TARGETS, color="#9aa5b1", linewidth=0.8, label="as asked")
    axes.set(xscale="log", yscale="log", xlabel="BLER target", ylabel="BLER (solid)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(TARGETS, [f"{target:.0%}" for target in TARGETS])
        axis.set_ticks([], minor=True)
    right.set(ylim=(0, None), ylabel="goodput (dashed) [bit/s/Hz]")
    axes.legend(loc="lower right")
    return png(figure)


def _nack_bursts(rollouts: Mapping[str, Rollout]) -> bytes:
    """How often a user sees a run of at least so many NACKs."""
    figure, axes = new_figure()
    lengths = np.arange(1, LONGEST_BURST + 1)
    for name, colour in colours(list(rollouts)):
        lost = ~rollouts[name].ack_NT
        seconds = lost.size * SLOT_US * 1e-6
        rate = np.array([bursts(lost, int(length)).sum() for length in lengths]) / seconds
        seen = rate > 0
        axes.plot(lengths[seen], rate[seen], color=colour, marker=".", linewidth=1.3, label=readable(name))
    axes.set(yscale="log", xlabel="NACKs in a row, at least", ylabel="bursts of a user [1/s]", xticks=lengths)
    axes.legend(loc="upper right", ncols=2)
    return png(figure)


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
    axes.set(xlim=(0, None), ylim=(0, 1.3 * axes.get_ylim()[1]), xlabel="time since the first slot [s]", ylabel="BLER")
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
