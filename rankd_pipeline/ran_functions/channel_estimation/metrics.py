"""What a channel estimate is worth: error power by condition, honesty of its interval, and blocks lost in the decoder.

    nmse         squared error over the mean power of the user's channel, mean over the slot's grid; a row a drop and cell
    covered      share of real and imaginary parts within the 90 % interval
    block_error  share of transport blocks that are not decoded right, through Sionna's LDPC chain (`block_errors`)

Cells are ``site=<profile>|band=<GHz>GHz|snr=<dB>|ds=<ns>|speed=<km/h>``, the last three as ranges; those of block_error
``snr_db=<dB>``. The NMSE of a cell is a ratio of means, not a mean of ratios: a deep fade has no NMSE of its own.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.table import format_cell, validate_table
from rankd_pipeline.ran_functions.channel_estimation.decoding import DecodingConfig, block_errors

__all__ = ["DecodingConfig", "block_errors", "cells", "evaluate_estimates", "ranges"]

# Inner edges of the cells: 5 dB of SNR, a factor of 2.15 of delay spread, walking, town and road.
SNR_EDGES_DB = (-5.0, 0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
DELAY_SPREAD_EDGES_NS = (30.0, 65.0, 140.0, 300.0)
SPEED_EDGES_KMH = (3.0, 30.0, 75.0, 120.0)


def evaluate_estimates(
    model: str, predicted: np.ndarray, channel: np.ndarray, meta: Mapping[str, np.ndarray], has_interval: bool
) -> pd.DataFrame:
    """Score one model's estimates.

    Args:
        model: the name that goes into the table.
        predicted: [n, 2, 2, T, K]: estimate and half width of its interval, of real and imaginary parts.
        channel: [n, 2, T, K], the truth, of unit mean power over the user's fading.
        meta: `split` (one text or [n]), `drop_id`, `site`, `band_ghz`, `snr_db`, `delay_spread_ns`, `speed_kmh` [n].
        has_interval: the second part of `predicted` is an interval that is to be judged.
    Raises:
        RankdError: shapes that do not fit, or an estimate that is not finite.
    """
    if predicted.shape != (len(channel), 2, *channel.shape[1:]):
        raise RankdError(f"Evaluation of {model}: estimates {predicted.shape} for channels {channel.shape}.")
    bad = ~np.isfinite(predicted).reshape(len(predicted), -1).all(1)
    if bad.any():
        raise RankdError(
            f"Evaluation of {model}: the estimate of sample {int(bad.argmax())} is not finite ({int(bad.sum())} in all)."
        )
    residual = predicted[:, 0] - channel
    keys = pd.DataFrame(
        {"split": meta["split"], "unit": np.asarray(meta["drop_id"], np.int64), "cell": cells(meta)}, index=range(len(channel))
    )
    # Real and imaginary parts add up to the error of a complex number.
    parts = [_grouped(keys, "nmse", 2.0 * (residual**2).mean((1, 2, 3)))]
    if has_interval:
        parts.append(_grouped(keys, "covered", (np.abs(residual) <= predicted[:, 1]).mean((1, 2, 3))))
    return validate_table(pd.concat(parts, ignore_index=True).assign(model=model))


def cells(meta: Mapping[str, np.ndarray]) -> np.ndarray:
    """The cell of each sample [n] (str)."""
    parts = {
        "site": np.asarray(meta["site"]).astype(str),
        "band": np.array([f"{ghz:g}GHz" for ghz in np.asarray(meta["band_ghz"], np.float64).round(3)]),
        "snr": _ranges(meta["snr_db"], SNR_EDGES_DB),
        "ds": _ranges(meta["delay_spread_ns"], DELAY_SPREAD_EDGES_NS),
        "speed": _ranges(meta["speed_kmh"], SPEED_EDGES_KMH),
    }
    frame = pd.DataFrame(parts)
    code = frame.groupby(list(parts), sort=True).ngroup().to_numpy()
    unique = frame.drop_duplicates().sort_values(list(parts)).to_dict("records")
    names = [format_cell(**{str(key): str(value) for key, value in record.items()}) for record in unique]
    return np.array(names, dtype=object)[code]


def ranges(edges: Sequence[float]) -> list[str]:
    """Names of the ranges between the edges, as the cells have them."""
    return [f"{low:g}..{high:g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]


def _ranges(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """The range of each value; what lies outside belongs to the first or the last."""
    index = np.digitize(np.asarray(values, np.float64), edges[1:-1])
    return np.array(ranges(edges), dtype=object)[index].astype(str)


def _grouped(keys: pd.DataFrame, metric: str, value: np.ndarray) -> pd.DataFrame:
    """Mean and count of `value` [n] over each (split, drop, cell)."""
    groups = keys.assign(metric=metric, value=value.astype(np.float64)).groupby(["metric", "split", "unit", "cell"], sort=True)
    return groups["value"].agg(value="mean", n="size").reset_index()
