"""The pictures of a run: each function returns the bytes of a small PNG, the same bytes for the same input.

Drawn with matplotlib's Figure objects on the Agg canvas: no display, no global state, safe in any process.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rankd_pipeline.evaluation.bootstrap import slices
from rankd_pipeline.evaluation.calibration import Reliability, reliability_of
from rankd_pipeline.evaluation.table import parse_cell, select

if TYPE_CHECKING:
    from rankd_pipeline.ran_functions.contract import Metric, RanFunction

INK, GRID, ACCENT, SECOND, GOOD, BAD = "#1f2933", "#dde3e8", "#1f6feb", "#e07b00", "#2e8b57", "#c0392b"
# Networks have their own colour in every picture; baselines take the muted ones in order.
_FIXED = {"teacher": ACCENT, "student": SECOND, "shipped": SECOND, "student_scratch": "#f2b673", "student_int8": "#a85a00"}
_MUTED = ("#6b7785", "#2e8b57", "#8e6bb0", "#b05a6b", "#4aa3a2", "#9a8f3c", "#3f5d7d", "#d6729f", "#7a4b2a", "#111111")
_WRITTEN = {"knn": "kNN", "los": "LoS", "nlos": "NLoS"}
CAPTIONS = {
    "reliability": "Reliability on the test set, before and after calibration",
    "training_curve": "Training and validation loss of the deployed student",
    "temperature_sweep": "Distillation temperature, chosen by the validation score (one seed)",
    "paired_seeds": "The three ways to train the student, paired over seeds",
    "phases": "When the student learned from its teacher (AL-PL)",
    "selected_dimensions": "Dimensions of the teacher that CA-KS selected, at the end of training",
    "attention_maps": "Attention maps of teacher and student on one test sample, mean over heads, last layer",
    "channel_true_and_predicted": "A channel as received and as predicted, magnitude over time and frequency",
    "nmse_over_horizon": "NMSE against how far ahead, time task, test sets",
    "nmse_over_speed": "NMSE against speed, time task, test sets",
    "latency": "Paced latency of the chosen runtime, beside the host's own control",
    "race": "The race across runtimes: paced p50 to p99.9 against the budget",
}


def caption(name: str) -> str:
    """What is written under the picture called ``name``."""
    if name in CAPTIONS:
        return CAPTIONS[name]
    metric, by, part = name.partition("_by_")
    if by:
        return f"{readable(metric)} by {readable(part)}, 95 % intervals by drop" + (" (* held out)" if part != "split" else "")
    words = readable(name.removesuffix("_cdf")) + (": share of test samples above it" if name.endswith("_cdf") else "")
    return words[0].upper() + words[1:]


def scorecard_figures(
    function: "RanFunction", table: pd.DataFrame, splits: Sequence[str], models: Sequence[str]
) -> dict[str, bytes]:
    """The teacher's pictures by name: reliability, the CDF of each non-rate metric, the headline metric by split and cell."""
    pictures = {}
    raw, calibrated = (reliability_of(table, model, "test") for model in ("teacher_raw", "teacher"))
    if raw is not None and calibrated is not None:
        pictures["reliability"] = reliability_diagram(raw, calibrated)
    for metric in function.secondary_metrics:
        if (
            not metric.is_rate
            and metric.aggregate == "mean"
            and not select(table, model=models[0], split="test", metric=metric.name).empty
        ):
            pictures[f"{metric.name}_cdf"] = sample_cdf(table, metric, models, "test")
    headline = function.metric
    pictures[f"{headline.name}_by_split"] = scores_by_split(table, headline, models, splits)
    parts = parse_cell(str(table["cell"].iloc[0]))
    for part in parts:
        pictures[f"{headline.name}_by_{part}"] = scores_by_cell(table, headline, models, splits, part)
    return pictures


def student_figures(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]], temperature: float) -> dict[str, bytes]:
    """The student's pictures by name; ``metrics`` may hold ``sweep`` and ``seed_scores``, ``history`` the chosen fit's epochs."""
    record = metrics.get("distillation") or {}
    pictures = {"training_curve": training_curve(history)}
    if record.get("phases"):
        pictures["phases"] = phases(record["phases"], record["history"])
    if record.get("selection"):
        pictures["selected_dimensions"] = selected_dimensions(record["selection"], record["widths"])
    if metrics.get("sweep"):
        pictures["temperature_sweep"] = temperature_sweep(metrics["sweep"], temperature)
    if metrics.get("seed_scores"):
        pictures["paired_seeds"] = paired_seeds(metrics["seed_scores"])
    return pictures


def latency_figures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures of a race (``LatencyReport.model_dump()``) by name: the winner's histogram and the race itself."""
    return {"race": race(report), "latency": latency_histogram(report)}


def reliability_diagram(before: Reliability, after: Reliability) -> bytes:
    """Accuracy against confidence by bin, before and after calibration; the area of a mark is its share of samples.

    The line leaves out bins of less than a thousandth of the samples: what they say is luck.
    """
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="perfect")
    for bins, colour, label in ((before, _MUTED[0], "before"), (after, ACCENT, "after")):
        often = bins.count >= 1e-3 * bins.count.sum()
        axes.plot(bins.confidence[often], bins.accuracy[often], color=colour, linewidth=1.4, label=f"{label}: ECE {bins.ece:.3f}")
        axes.scatter(bins.confidence, bins.accuracy, s=6 + 110 * bins.count / bins.count.sum(), color=colour, alpha=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    percent(axes, "xy")
    axes.legend(loc="upper left")
    return png(figure)


def sample_cdf(table: pd.DataFrame, metric: "Metric", models: Sequence[str], split: str) -> bytes:
    """Distribution over samples of a metric written one row a sample (the CDF of the L1-RSRP loss); the tail is drawn log."""
    figure, axes = new_figure()
    lowest, top, left = 1.0, 0.0, 0.0
    for model, colour in colours(models):
        rows = select(table, model=model, split=split, metric=metric.name)
        if rows.empty:
            continue
        value, n = rows["value"].to_numpy(), rows["n"].to_numpy(float)
        if "db" in metric.aggregate:  # rows are linear, their aggregate is in dB
            value = 10 * np.log10(np.maximum(value, 1e-12))
        order = np.argsort(value, kind="stable")
        above = 1 - np.cumsum(n[order]) / n.sum()
        at = np.unique(np.searchsorted(-above, -np.geomspace(1, 5e-3, 400)).clip(max=len(above) - 1))
        axes.step(value[order][at], np.maximum(above[at], 1e-4), where="post", color=colour, linewidth=1.4, label=readable(model))
        lowest, top = min(lowest, above[0]), max(top, value[order][at[-1]])
        left = min(left, value[order][0])
    axes.set(yscale="log", ylim=(5e-3, 1), xlim=(left, top * 1.02 or 1), xlabel=f"{readable(metric.name)} [{metric.unit}]")
    axes.set_ylabel("share of samples above")
    axes.set_yticks([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01], ["100 %", "50 %", "20 %", "10 %", "5 %", "2 %", "1 %"])
    axes.minorticks_off()
    axes.legend(loc="upper right", ncols=2 if len(models) > 4 else 1)
    return png(figure)


def scores_by_split(table: pd.DataFrame, metric: "Metric", models: Sequence[str], splits: Sequence[str]) -> bytes:
    """The headline metric of each model on each split, with 95 % intervals by drop."""
    # The other parts of the cell stay: an aggregate over cells needs them.
    cells = table["cell"].astype(str)
    marked = table.assign(cell=cells.where(cells == "", cells + "|") + "split=" + table["split"].astype(str))
    frame = pd.concat([slices(select(marked, split=s), by="split", metric=metric.name, models=models, splits=[s],
                              aggregate=metric.aggregate, higher_is_better=metric.higher_is_better) for s in splits])  # fmt: skip
    return _points(frame.loc[:, ~frame.columns.duplicated()], "split", metric, models, list(splits))


def scores_by_cell(table: pd.DataFrame, metric: "Metric", models: Sequence[str], splits: Sequence[str], part: str) -> bytes:
    """The headline metric of each model for each value of a cell part (site, band, link), with 95 % intervals by drop.

    Values that the test set has are shown on the test set; those that only held-out splits have, marked with an asterisk, there.
    """
    test = slices(table, by=part, metric=metric.name, models=models, splits=["test"], aggregate=metric.aggregate,
                  higher_is_better=metric.higher_is_better)  # fmt: skip
    seen = set(test[part])
    others = select(table, metric=metric.name)
    new = np.array([parse_cell(str(c)).get(part) not in seen for c in pd.Categorical(others["cell"]).categories] or [False])
    others = others.loc[new[pd.Categorical(others["cell"]).codes] & others["split"].isin(list(splits)).to_numpy()]
    held_out = slices(others.assign(split="held out"), by=part, metric=metric.name, models=models, splits=["held out"],
                      aggregate=metric.aggregate, higher_is_better=metric.higher_is_better)  # fmt: skip
    frame = pd.concat([test, held_out.assign(**{part: held_out[part].astype(str) + "*"})], ignore_index=True)
    return _points(frame, part, metric, models, sorted({str(value) for value in frame[part]}, key=_natural))


def training_curve(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Training and validation loss by epoch (rows of EpochRecord); the kept epoch is marked."""
    figure, axes = new_figure()
    epoch = [row["epoch"] for row in history]
    axes.plot(epoch, [row["train_loss"] for row in history], color=_MUTED[0], linewidth=1.2, label="training")
    checked = [(row["epoch"], row["validation"]) for row in history if row["validation"] is not None]
    if checked:
        at, loss = zip(*checked, strict=True)
        axes.plot(at, loss, color=ACCENT, linewidth=1.6, label="validation")
        best = int(np.argmin(loss))
        axes.scatter([at[best]], [loss[best]], color=ACCENT, zorder=3, label=f"kept: epoch {at[best]}")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.legend(loc="upper right")
    return png(figure)


def phases(turns: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]) -> bytes:
    """Validation loss of a distilled student by epoch; the epochs in which its teacher was run are shaded."""
    figure, axes = new_figure()
    checked = [(row["epoch"], row["validation"]) for row in history if row["validation"] is not None]
    if checked:
        axes.plot(*zip(*checked, strict=True), color=SECOND, linewidth=1.6, marker="o", markersize=3, label="validation")
    shaded = False
    for turn in turns:
        if turn["phase"] == "PL":
            label = None if shaded else "passive learning (teacher is run)"
            axes.axvspan(turn["epoch"] - 0.5, turn["epoch"] + 0.5, color=ACCENT, alpha=0.15, linewidth=0, label=label)
            shaded = True
    axes.set(xlabel="epoch", ylabel="loss")
    axes.legend(loc="upper right")
    return png(figure)


def selected_dimensions(selection: Mapping[str, Sequence[int]], widths: Mapping[str, int]) -> bytes:
    """Which dimensions of the teacher each selector has chosen (dark), by index."""
    figure, axes = new_figure()
    axes.grid(visible=False)
    widest = max(widths.values())
    chosen = np.full((len(selection), widest), np.nan)
    for line, (name, slots) in enumerate(selection.items()):
        chosen[line, : widths[name]] = 0.15
        chosen[line, list(slots)] = 1.0
    axes.imshow(chosen, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(selection)), [readable(name) for name in selection])
    axes.set_xlabel("dimension of the teacher")
    return png(figure)


def temperature_sweep(rows: Sequence[Mapping[str, Any]], chosen: float) -> bytes:
    """Validation score (left) and divergence from the teacher (right) against the distillation temperature."""
    figure, axes = new_figure()
    rows = sorted(rows, key=lambda row: row["temperature"])
    at = [row["temperature"] for row in rows]
    lines = axes.plot(at, [row["validation_score"] for row in rows], color=ACCENT, marker="o", label="validation score")
    axes.set(xlabel="distillation temperature T", ylabel="validation score", xticks=at, xticklabels=[f"{t:g}" for t in at])
    if all(row.get("divergence") is not None for row in rows):
        right = axes.twinx()
        lines += right.plot(at, [row["divergence"] for row in rows], color=_MUTED[0], marker="s", markersize=4,
                            linestyle=(0, (4, 3)), label="KL from the teacher")  # fmt: skip
        right.set_ylabel("KL [nat]")
        right.spines["top"].set_visible(False)
    axes.axvline(chosen, color=SECOND, linewidth=1, zorder=0)
    axes.annotate(f"  chosen: T = {chosen:g}", (chosen, 0.03), xycoords=("data", "axes fraction"), color=SECOND, fontsize=8)
    figure.legend(handles=lines, loc="outside upper center", ncols=2, fontsize=7.5)
    return png(figure)


def paired_seeds(scores: Mapping[str, Sequence[float]]) -> bytes:
    """Test score of each way to train the student; a line joins the three of one seed."""
    figure, axes = new_figure()
    arms = [arm for arm in ("scratch", "hard", "distilled") if arm in scores] or list(scores)
    for values in zip(*(scores[arm] for arm in arms), strict=True):
        axes.plot(range(len(arms)), values, color=GRID, linewidth=1, zorder=1)
    for x, arm in enumerate(arms):
        axes.scatter([x] * len(scores[arm]), scores[arm], color=ACCENT if arm == "distilled" else _MUTED[0], s=22, zorder=2)
        axes.hlines(float(np.mean(scores[arm])), x - 0.16, x + 0.16, color=INK, linewidth=1.6, zorder=3)
    names = {"scratch": "from scratch\non the labels", "hard": "on the teacher's\nhard labels", "distilled": "distilled"}
    axes.set(xlim=(-0.5, len(arms) - 0.5), ylabel="test score")
    axes.set_xticks(range(len(arms)), [names.get(arm, arm) for arm in arms])
    return png(figure)


def latency_histogram(report: Mapping[str, Any]) -> bytes:
    """Call times of a race's winner (``LatencyReport.model_dump()``), paced and back to back, beside the host's control."""
    candidate = next(item for item in report["candidates"] if item["runtime"] == report["winner"])
    budget_us = report["budget_us"]
    figure, axes = new_figure()
    histogram = candidate["histogram"]
    edges = np.asarray(histogram["edges_us"])
    for name, colour, label in (("back_to_back", _MUTED[0], "back to back"), ("control", _MUTED[1], "control: fixed work"),
                                ("paced", ACCENT, "paced, caches dirtied")):  # fmt: skip
        counts = np.asarray(histogram[name], float)
        if counts.sum():
            axes.stairs(counts / counts.sum(), edges, color=colour, linewidth=1.3, label=label, fill=name == "paced", alpha=0.75)
    axes.axvline(candidate["paced"]["p999_us"], color=ACCENT, linewidth=1, linestyle=(0, (4, 3)), label="paced p99.9")
    axes.axvline(budget_us, color=BAD, linewidth=1.4, label=f"budget {budget_us:g} us")
    axes.set(xscale="log", yscale="log", xlabel=f"{candidate['runtime']}: time of one call [us]", ylabel="share of calls")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7)
    return png(figure)


def race(report: Mapping[str, Any]) -> bytes:
    """Each runtime's paced p50, p99 and p99.9 with its interval, against the budget; what was not built is named, too."""
    figure, axes = new_figure()
    timed = [item for item in report["candidates"] if item["paced"] is not None]
    for y, item in enumerate(timed):
        tail, colour = item["paced"], ACCENT if item["runtime"] == report["winner"] else _MUTED[0]
        low, high = tail["p999_ci95_us"]
        axes.plot([tail["p50_us"], tail["p999_us"]], [y, y], color=colour, linewidth=1.4)
        axes.plot(
            [low, high if high is not None else tail["max_us"]],
            [y, y],
            color=colour,
            linewidth=6,
            alpha=0.25,
            solid_capstyle="butt",
        )
        for key, marker in (("p50_us", "o"), ("p99_us", "|"), ("p999_us", "D")):
            axes.plot(tail[key], y, marker=marker, markersize=5 if marker != "|" else 9, color=colour, linestyle="none")
    axes.axvline(report["budget_us"], color=BAD, linewidth=1.4)
    labels = [item["runtime"] + (" (wins)" if item["runtime"] == report["winner"] else "") for item in timed]
    axes.set_yticks(range(len(timed)), labels)
    axes.set(ylim=(len(timed) - 0.5, -0.5), xscale="log", xlabel="paced call [us]: p50 (dot), p99 (bar), p99.9 (diamond, interval)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.annotate(f"budget {report['budget_us']:g} us", (report["budget_us"], 0.02), xycoords=("data", "axes fraction"),
                  color=BAD, fontsize=7.5, rotation=90, ha="right", va="bottom")  # fmt: skip
    return png(figure)


def _points(frame: pd.DataFrame, by: str, metric: "Metric", models: Sequence[str], order: Sequence[str]) -> bytes:
    """Values with their intervals, dodged by model inside each category."""
    figure, axes = new_figure()
    width = 0.7 / max(len(models), 1)
    for i, (model, colour) in enumerate(colours(models)):
        rows = frame.loc[frame["model"] == model].set_index(by).reindex(list(order))
        x = np.arange(len(order)) + (i - (len(models) - 1) / 2) * width
        value = rows["value"].to_numpy(float)
        down, up = (np.nan_to_num(np.abs(rows[end].to_numpy(float) - value)) for end in ("lo", "hi"))
        axes.errorbar(x, value, np.stack([down, up]), fmt="o", markersize=4, color=colour, elinewidth=1.2, label=readable(model))
    for edge in np.arange(len(order) - 1) + 0.5:
        axes.axvline(edge, color=GRID, linewidth=0.8)
    axes.grid(visible=False, axis="x")
    long = len(order) > 4 and max(map(len, order)) > 5
    labels = [readable(value) for value in order]
    axes.set_xticks(range(len(order)), labels, rotation=35 if long else 0, ha="right" if long else "center")
    axes.set(xlim=(-0.5, len(order) - 0.5), ylabel=readable(metric.name) + ("" if metric.is_rate else f" [{metric.unit}]"))
    if metric.is_rate:
        percent(axes, "y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=7)
    return png(figure)


def colours(models: Iterable[str]) -> list[tuple[str, str]]:
    """(model, colour) in order; the networks' colours are fixed."""
    muted = iter(_MUTED * 4)
    return [(model, _FIXED[model] if model in _FIXED else next(muted)) for model in models]


def readable(text: str, unit: bool = False) -> str:
    """A name from the tables as people write it: ``l1_rsrp_loss_db`` -> ``L1-RSRP loss`` (with its unit: ``... [dB]``)."""
    if match := re.search(r"_(db|dbm|us|ghz)$", text):
        written = {"db": "dB", "dbm": "dBm", "us": "us", "ghz": "GHz"}[match[1]]
        return readable(text[: match.start()]) + (f" [{written}]" if unit else "")
    text = re.sub(r"^top(\d+)$", r"Top-\1", text).replace("l1_rsrp", "L1-RSRP").replace("set_b", "Set B").replace("_", " ")
    return re.sub(r"\b(knn|nmse|bler|ece|int8|fp32|rsrp|mcs|los|nlos)\b", lambda m: _WRITTEN.get(m[0], m[0].upper()), text)


def _natural(text: str) -> tuple[float, str]:
    """Sorts 3.5GHz before 28GHz, and -5..0 before 0..5."""
    number = re.match(r"-?\d+(\.\d+)?", text)
    return (float(number[0]) if number else float("inf"), text)


def percent(axes: Axes, which: str) -> None:
    """Ticks of the axes named in ``which`` ("x", "y", "xy") as percentages."""
    for axis in (axes.xaxis,) * ("x" in which) + (axes.yaxis,) * ("y" in which):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def new_figure() -> tuple[Figure, Axes]:
    """An empty picture in the size and style of all the others; write it with :func:`png`."""
    figure = Figure(figsize=(5, 3), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.grid(visible=True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The bytes of the picture, the same for the same picture."""
    for axes in figure.axes:
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(fontsize=8.5, color=INK)
        axes.tick_params(labelsize=8)
        if legend := axes.get_legend():
            legend.set_frame_on(False)
            for text in legend.get_texts():
                text.set_fontsize(7.5)
    for legend in figure.legends:
        legend.set_frame_on(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
