"""Pictures of channel prediction for the report: channels true and predicted, error over horizon and speed, attention."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from rankd_pipeline.ran_functions.channel_prediction.config import PATCH
from rankd_pipeline.ran_functions.channel_prediction.metrics import SPEED_EDGES_KMH, nmse_of_samples, speed_bin
from rankd_pipeline.ran_functions.channel_prediction.patches import (
    TASKS,
    coordinates,
    hidden_patches,
    network_inputs,
    unpatchify,
    wanted_patches,
)
from rankd_pipeline.ran_functions.contract import Arrays, Predictor
from rankd_pipeline.report import figures

if TYPE_CHECKING:
    import torch

SHOWN = ("teacher", "student_scratch", "hold", "ar", "ar_cleaned", "wiener", "lstm", "transformer")


def all_pictures(models: Mapping[str, Predictor], features: Arrays) -> Iterator[tuple[str, bytes]]:
    """The scorecard's pictures as (name, PNG)."""
    shown = {name: models[name] for name in SHOWN if name in models}
    yield "channel_true_and_predicted", channels(shown, features)
    estimates = {task: {name: _estimate(model(asked)) for name, model in shown.items()} for task, asked in _asked(features)}
    yield "nmse_over_horizon", over_horizon(estimates["time"], dict(_asked(features))["time"])
    yield "nmse_over_speed", over_speed(estimates["time"], dict(_asked(features))["time"])


def _asked(features: Arrays) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for task in TASKS:
        yield task, {**features, "task": np.full(len(features["grid"]), task)}


def _estimate(predicted: np.ndarray) -> np.ndarray:
    """The estimate [n, M, E] of a model with or without half widths."""
    return predicted[:, 0] if predicted.ndim == 4 else predicted


def channels(models: Mapping[str, Predictor], features: Arrays) -> bytes:
    """Magnitude over time and frequency at the first antenna: received, and what each model puts into the hidden half."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    row = int(np.argmax(np.asarray(features["speed_kmh"])))
    one = {name: values[row : row + 1] for name, values in features.items()}
    names = ["received", *[name for name in ("teacher", "wiener", "hold") if name in models]]
    figure = Figure(figsize=(7, 3.6), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(TASKS), len(names), sharex=True, sharey=True, squeeze=False)
    grid = tuple(int(size) for size in one["grid"][0])
    for line, (task, asked) in zip(axes, _asked(one), strict=True):
        for place, name in zip(line, names, strict=True):
            csi = asked["csi"][:, : int(np.prod(grid))].copy()
            wanted = wanted_patches(grid, task)
            if name != "received":
                csi[:, wanted] = _estimate(models[name](asked))[:, : len(wanted)]
            magnitude = np.abs(unpatchify(csi, grid)[0, :, 0])
            place.imshow(magnitude.T, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=2.5)
            edge = PATCH * int(grid[0 if task == "time" else 2] * 0.5) - 0.5
            (place.axvline if task == "time" else place.axhline)(edge, color="white", linewidth=1.2)
            place.tick_params(labelsize=7)
            if line is axes[0]:
                place.set_title(figures.readable(name), fontsize=8)
            if line is axes[-1]:
                place.set_xlabel("instant", fontsize=8)
        line[0].set_ylabel(f"{task}\nsubcarrier", fontsize=8)
    figure.suptitle(f"|h| of {one['site'][0]}, {float(one['speed_kmh'][0]):.0f} km/h; hidden: beyond the white line", fontsize=8)
    return figures.png(figure)


def over_horizon(estimates: Mapping[str, np.ndarray], features: Arrays) -> bytes:
    """NMSE (dB of the mean) of each model against how far ahead it looks, instants."""
    truth = hidden_patches(features["csi"], features["grid"], features["task"])
    figure, axes = figures.new_figure()
    for name, colour in figures.colours(estimates):
        sums: dict[int, list[np.ndarray]] = {}
        for grid in np.unique(features["grid"], axis=0):
            rows = np.flatnonzero((features["grid"] == grid).all(axis=1))
            place = coordinates(grid)[wanted_patches(grid, "time")][:, 0]
            error, power = (np.square(x[rows][:, : len(place)].astype(np.float64)).reshape(len(rows), len(place), PATCH, -1).sum(-1)
                            for x in (estimates[name] - truth, truth))  # fmt: skip
            for patch in np.unique(place):
                share = error[:, place == patch].sum(axis=1) / np.maximum(power[:, place == patch].sum(axis=1), 1e-12)
                for inner in range(PATCH):
                    sums.setdefault(int(patch - place.min()) * PATCH + inner + 1, []).append(share[:, inner])
        at = sorted(sums)
        level = [10 * np.log10(np.concatenate(sums[i]).mean()) for i in at]
        axes.plot(at, level, color=colour, linewidth=1.5, marker="o", markersize=3, label=figures.readable(name))
    axes.set(xlabel="instants ahead", ylabel="NMSE [dB]")
    axes.legend(loc="lower right", ncols=2)
    return figures.png(figure)


def over_speed(estimates: Mapping[str, np.ndarray], features: Arrays) -> bytes:
    """NMSE (dB of the mean) of each model against the user's speed, time task."""
    truth = hidden_patches(features["csi"], features["grid"], features["task"])
    bins = speed_bin(np.asarray(features["speed_kmh"]))
    order = [f"{a}-{b}" for a, b in zip(SPEED_EDGES_KMH[:-1], SPEED_EDGES_KMH[1:], strict=True) if f"{a}-{b}" in bins]
    figure, axes = figures.new_figure()
    for name, colour in figures.colours(estimates):
        each = nmse_of_samples(estimates[name], truth)
        axes.plot(order, [10 * np.log10(each[bins == item].mean()) for item in order], color=colour, linewidth=1.5, marker="o",
                  markersize=4, label=figures.readable(name))  # fmt: skip
    axes.set(xlabel="speed [km/h]", ylabel="NMSE [dB]")
    axes.legend(loc="lower right", ncols=2)
    return figures.png(figure)


def attention(networks: "Mapping[str, torch.nn.Module]", features: Arrays) -> bytes:
    """Maps, averaged over heads, of the last encoder and decoder layer on one sample, networks side by side."""
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    one = {name: np.asarray(features[name][:1]) for name in ("csi", "grid", "task")}
    view = {name: torch.from_numpy(values) for name, values in network_inputs(one["csi"], one["grid"], one["task"]).items()}
    view["label"] = torch.from_numpy(hidden_patches(one["csi"], one["grid"], one["task"]))
    figure = Figure(figsize=(2.4 * len(networks) + 0.6, 4.8), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(networks), squeeze=False)
    for column, (name, network) in enumerate(networks.items()):
        with torch.no_grad():
            found = network.eval().internals(view)  # type: ignore[operator]
        for line, stack in enumerate(("encoder", "decoder")):
            axes[line, column].imshow(found.attention[stack][-1][0].mean(0).numpy(), cmap="magma", aspect="equal")
            axes[line, column].set_title(f"{figures.readable(name)}, {stack}", fontsize=8)
            axes[line, column].tick_params(labelsize=6)
    figure.supxlabel("patch attended to (decoder: visible, then wanted)", fontsize=8)
    return figures.png(figure)
