"""Pictures of channel estimation for the report: gain and distance to the bound in every cell, and block error curves."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.evaluation.table import parse_cell, select
from rankd_pipeline.ran_functions.channel_estimation.metrics import DELAY_SPREAD_EDGES_NS, SNR_EDGES_DB, SPEED_EDGES_KMH, ranges
from rankd_pipeline.report import figures

NETWORKS = ("teacher", "shipped")
REFERENCES = {"ls_linear": "gain of the {model} over LS linear", "lmmse_true": "distance of the {model} to LMMSE with the truth"}


def all_pictures(table: pd.DataFrame) -> Iterator[tuple[str, bytes]]:
    """Heat maps of each network in the table against LS and against the bound, and the block error curves, as (name, PNG)."""
    models = list(dict.fromkeys(table["model"].astype(str)))
    for network in (name for name in NETWORKS if name in models):
        for reference, title in REFERENCES.items():
            if reference in models:
                sign = 1.0 if reference == "ls_linear" else -1.0
                gain = sign * (cells_db(table, reference) - cells_db(table, network))
                yield title.format(model=network).replace(" ", "_"), heat_map(gain)
        if not select(table, model=network, metric="block_error").empty:
            yield f"block_errors_of_the_{network}_and_the_baselines", error_curves(table, network)


def cells_db(table: pd.DataFrame, model: str) -> np.ndarray:
    """NMSE in dB of a model on the test split: [SNR, delay spread x speed], NaN where there is no sample."""
    rows = select(table, model=model, split="test", metric="nmse")
    parts = [parse_cell(str(cell)) for cell in rows["cell"]]
    names = (ranges(SNR_EDGES_DB), ranges(DELAY_SPREAD_EDGES_NS), ranges(SPEED_EDGES_KMH))
    at = np.array([[names[0].index(p["snr"]), names[1].index(p["ds"]) * len(names[2]) + names[2].index(p["speed"])] for p in parts])
    total, count = (np.zeros((len(names[0]), len(names[1]) * len(names[2]))) for _ in range(2))
    np.add.at(total, tuple(at.T), (rows["value"] * rows["n"]).to_numpy())
    np.add.at(count, tuple(at.T), rows["n"].to_numpy(float))
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10.0 * np.log10(total / count)


def heat_map(values_db: np.ndarray) -> bytes:
    """Decibels by SNR (down) and by delay spread and speed (across), written into their cells."""
    figure, axes = figures.new_figure()
    top = max(1.0, float(np.nanmax(np.abs(values_db))))
    axes.imshow(values_db, cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values_db):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 * top else figures.INK
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    speeds, spreads = ranges(SPEED_EDGES_KMH), ranges(DELAY_SPREAD_EDGES_NS)
    labels = [f"{speed}\n{spread} ns" if i == 1 else speed for spread in spreads for i, speed in enumerate(speeds)]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(len(values_db)), ranges(SNR_EDGES_DB))
    axes.set(xlabel="speed [km/h] and delay spread", ylabel="SNR [dB]")
    axes.grid(visible=False)
    for edge in np.arange(len(speeds), len(labels), len(speeds)) - 0.5:
        axes.axvline(edge, color="white", linewidth=2)
    return figures.png(figure)


def error_curves(table: pd.DataFrame, network: str) -> bytes:
    """Block error rate of the network and of every baseline over SNR, with the SNR at 10 % and its 95 % interval by user."""
    figure, axes = figures.new_figure()
    rows = select(table, metric="block_error", split="test")
    others = [name for name in dict.fromkeys(rows["model"].astype(str)) if name not in NETWORKS]
    for model, colour in figures.colours([network, *others]):
        mine = select(rows, model=model)
        snr_db = np.array([float(parse_cell(str(cell))["snr_db"]) for cell in mine["cell"]])
        at = np.unique(snr_db)
        rate = [np.average(mine["value"][snr_db == x], weights=mine["n"][snr_db == x]) for x in at]
        style = "--" if model == "lmmse_true" else "-"
        reached = estimate(rows, f"{model}@test", metric="block_error", aggregate="crossing(0.1,snr_db)", higher_is_better=False)
        interval = "" if reached.ci95 is None else f" [{reached.ci95[0]:.2f}, {reached.ci95[1]:.2f}]"
        axes.plot(at, np.maximum(rate, 1e-3), style, color=colour, linewidth=1.6 if model == network else 1.1, marker="o",
                  markersize=3, label=f"{figures.readable(model)}: {reached.value:.2f} dB{interval}")  # fmt: skip
    axes.axhline(0.1, color=figures.INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(yscale="log", ylim=(1e-3, 1.0), xlabel="SNR [dB]", ylabel="block error rate")
    axes.legend(loc="lower left", fontsize=6.5, title="SNR at 10 %", title_fontsize=6.5)
    return figures.png(figure)
