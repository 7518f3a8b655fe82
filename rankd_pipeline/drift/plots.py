"""Plots of a drift report over time: how good the model was, what moved, how late it was."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankd_pipeline.report.figures import ACCENT, BAD, GOOD, GRID, SECOND, new_figure, png

Window = Mapping[str, Any]
KINDS = {
    "level": "feature level", "element": "feature elements", "missing": "missing reports", "summary": "feature shape",
    "context": "context", "output": "output",
}  # fmt: skip


def drift_figures(windows: Sequence[Window], budget_us: float, metric: str) -> dict[str, bytes]:
    """The pictures of a report by name; windows as `drift.json` holds them. Empty where no window has enough rows."""
    known = [window for window in windows if window["state"] != "too small"]
    if not known:
        return {}
    pictures = {"score_over_time": score_over_time(known, metric), "latency_over_time": latency_over_time(known, budget_us)}
    judged = [window for window in known if window["state"] == "judged"]
    if judged:
        pictures["drift_over_time"] = drift_over_time(judged)
    return pictures


def score_over_time(windows: Sequence[Window], metric: str) -> bytes:
    """Score on labelled rows with its interval, the classical method, and the estimate without labels."""
    figure, axes = _wide()
    at = np.arange(len(windows))
    shade_drift(axes, windows)
    told = (("expected", "estimated without labels (CBPE)", SECOND), ("score", f"{metric} on labelled rows", ACCENT))
    for name, label, colour in told:
        value, low, high = _with_interval(windows, name)
        there = np.isfinite(value)
        axes.fill_between(at[there], low[there], high[there], color=colour, alpha=0.18, linewidth=0)
        axes.plot(at[there], value[there], color=colour, marker="o", markersize=3, linewidth=1.2, label=label)
    baseline = np.array([_number(window["quality"].get("baseline")) for window in windows])
    there = np.isfinite(baseline)
    axes.plot(at[there], baseline[there], color=GOOD, linewidth=1.0, linestyle="--", label="classical method")
    axes.set_ylabel(metric)
    axes.legend()
    _name_windows(axes, windows)
    return png(figure)


def drift_over_time(windows: Sequence[Window]) -> bytes:
    """The largest PSI of each kind of series, window by window; filled where the move is beyond chance."""
    figure, axes = _wide()
    shade_drift(axes, windows)
    for (kind, label), colour in zip(KINDS.items(), (ACCENT, SECOND, BAD, "#8e6bb0", GOOD, "#4aa3a2"), strict=True):
        tests = [[test for test in window["tests"] if test["kind"] == kind] for window in windows]
        if not any(tests):
            continue
        size = [max((test["psi"] for test in group), default=np.nan) for group in tests]
        axes.plot(range(len(windows)), size, color=colour, linewidth=1.0, label=label)
        moved = [at for at, group in enumerate(tests) if any(test["moved"] for test in group)]
        axes.plot(moved, [size[at] for at in moved], color=colour, marker="o", markersize=4, linestyle="none")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylabel("largest PSI (dot: beyond chance)")
    axes.legend(ncols=2)
    _name_windows(axes, windows)
    return png(figure)


def latency_over_time(windows: Sequence[Window], budget_us: float) -> bytes:
    """p99.9 of each window against the budget."""
    figure, axes = _wide()
    axes.plot(range(len(windows)), [window["p999_us"] for window in windows], color=ACCENT, marker="o", markersize=3, linewidth=1.0)
    axes.axhline(budget_us, color=BAD, linewidth=1.0)
    axes.annotate(f"budget {budget_us:g} us", (0, budget_us), xytext=(2, 3), textcoords="offset points", fontsize=7, color=BAD)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("latency p99.9 (us)")
    _name_windows(axes, windows)
    return png(figure)


def shade_drift(axes: Axes, windows: Sequence[Window]) -> None:
    """Grey where the reference was taken, red where a drift asks for re-distillation, yellow where it asks for none."""
    colours = {"redistill": BAD, "harmless": "#d9c34a", "operator": "#d9c34a"}
    for at, window in enumerate(windows):
        colour = GRID if window["state"] == "reference" else colours.get(window.get("action") or "")
        if colour:
            axes.axvspan(at - 0.5, at + 0.5, color=colour, alpha=0.25, linewidth=0)


def _wide() -> tuple[Figure, Axes]:
    figure, axes = new_figure()
    figure.set_size_inches(7.0, 3.0)
    return figure, axes


def _with_interval(windows: Sequence[Window], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    value = np.array([_number(window["quality"].get(name)) for window in windows])
    ends = [window["quality"].get(f"{name}_ci95") or (np.nan, np.nan) for window in windows]
    return value, np.array([low for low, _ in ends], float), np.array([high for _, high in ends], float)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _name_windows(axes: Axes, windows: Sequence[Window]) -> None:
    step = max(1, len(windows) // 8)
    axes.set_xticks(range(0, len(windows), step), [window["key"][5:].replace("T", "\n") for window in windows[::step]], fontsize=6)
    axes.set_xlim(-0.5, len(windows) - 0.5)
