"""What a channel prediction is worth: NMSE over the hidden part, linear and sample by sample, as a long evaluation table.

The convention is WiFo's: of each sample the mean squared error over its hidden entries, divided by the mean square of the
true ones; the plain mean over samples, then over sets; and only then decibels (the aggregate `db_of_cells(set,task)`). The
mean of decibels would be another, much lower number.

    nmse            against the channel as received, its noise included: comparable with WiFo, whose best possible value at
                    20 dB is 0.0099
    nmse_clean      against the noise-free channel
    nmse_horizon    like nmse, at one distance from the last visible instant (subcarrier); cells have a `horizon`
    covered         share of the hidden real numbers that lie inside the interval that the model gives

Cells are ``set=D3-s|task=time|speed=0-3``, speed in km/h.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from rankd_pipeline.evaluation.table import format_cell, validate_table
from rankd_pipeline.ran_functions.channel_prediction.config import PATCH
from rankd_pipeline.ran_functions.channel_prediction.patches import (
    coordinates,
    hidden_patches,
    questions,
    wanted_patches,
)

SPEED_EDGES_KMH = (0, 3, 10, 30, 100, 300)


def nmse_of_samples(estimate_nME: np.ndarray, truth_nME: np.ndarray) -> np.ndarray:
    """Squared error over power of each sample [n], linear; zero patches behind a shorter sample do not count."""
    error = np.square(estimate_nME.astype(np.float64) - truth_nME).reshape(len(truth_nME), -1).sum(axis=1)
    power = np.square(truth_nME.astype(np.float64)).reshape(len(truth_nME), -1).sum(axis=1)
    return error / np.maximum(power, 1e-12)


def speed_bin(speed_kmh: np.ndarray) -> np.ndarray:
    """Names [n] of the speed ranges, km/h."""
    names = np.array([f"{low}-{high}" for low, high in zip(SPEED_EDGES_KMH[:-1], SPEED_EDGES_KMH[1:], strict=True)])
    return names[np.clip(np.searchsorted(SPEED_EDGES_KMH, speed_kmh, side="right") - 1, 0, len(names) - 1)]


def answered(predicted: np.ndarray) -> np.ndarray:
    """Rows [n] that a model has answered: a file of one fixed shape answers those of other shapes with NaN."""
    return np.asarray(np.isfinite(predicted.reshape(len(predicted), -1)).all(axis=1))


def evaluate_task(
    model: str, predicted: np.ndarray, features: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], task: str, split: str,
    calibrated: bool, keep: np.ndarray,
) -> pd.DataFrame:  # fmt: skip
    """Rows of one model on one task.

    Args:
        predicted: [n, M, E], or [n, 2, M, E] with half widths where calibrated.
        features: csi [n, L, E], grid [n, 3], drop_id, site, speed_kmh [n]. truth: csi_clean [n, L, E].
        keep: [n] rows that count.
    """
    tasks = np.full(len(features["grid"]), task)
    wanted = hidden_patches(features["csi"], features["grid"], tasks)[keep]
    clean = hidden_patches(truth["csi_clean"].astype(np.float32), features["grid"], tasks)[keep]
    estimate = (predicted[:, 0] if calibrated else predicted)[keep]
    cells = _cells(features, task)[keep]
    frame = pd.DataFrame({"unit": np.asarray(features["drop_id"], np.int64)[keep], "cell": cells})
    parts = [
        frame.assign(metric="nmse", value=nmse_of_samples(estimate, wanted)),
        frame.assign(metric="nmse_clean", value=nmse_of_samples(estimate, clean)),
    ]
    grids = features["grid"][keep]
    parts += [
        frame.iloc[rows].assign(cell=frame["cell"].iloc[rows] + f"|horizon={horizon}", metric="nmse_horizon", value=value)
        for rows, horizon, value in _by_horizon(estimate, wanted, grids, task)
    ]
    if calibrated:
        inside = np.abs(predicted[keep, 0] - wanted) <= predicted[keep, 1]
        there = np.abs(wanted).sum(axis=-1, keepdims=True) > 0
        share = (inside & there).sum(axis=(1, 2)) / (there.sum(axis=(1, 2)) * wanted.shape[-1])
        parts.append(frame.assign(metric="covered", value=share))
    return validate_table(pd.concat(parts, ignore_index=True).assign(model=model, split=split, n=1))


def _by_horizon(estimate: np.ndarray, wanted: np.ndarray, grids: np.ndarray, task: str):
    """(rows, horizon, nmse [rows]) for each distance, in instants or subcarriers, from what is visible."""
    axis = {"time": 0, "frequency": 2}[task]
    for rows, grid, _ in questions(grids, np.full(len(grids), task)):
        place = coordinates(grid)[wanted_patches(grid, task)][:, axis]
        shape = (len(rows), len(place), PATCH, PATCH, PATCH, 2)
        est, true = (values[rows][:, : len(place)].reshape(shape).astype(np.float64) for values in (estimate, wanted))
        for patch in np.unique(place):
            for inner in range(PATCH):
                at = (slice(None), place == patch, *(inner if axis == i else slice(None) for i in (0, 1, 2)))
                error, power = (np.square(x[at]).reshape(len(rows), -1).sum(axis=1) for x in (est - true, true))
                yield rows, int((patch - place.min()) * PATCH + inner + 1), error / np.maximum(power, 1e-12)


def _cells(features: Mapping[str, np.ndarray], task: str) -> np.ndarray:
    names = {}
    keys = list(zip(np.asarray(features["site"]).astype(str), speed_bin(np.asarray(features["speed_kmh"])), strict=True))
    for site, speed in set(keys):
        names[site, speed] = format_cell(set=site, task=task, speed=str(speed))
    return np.array([names[key] for key in keys], dtype=object)
