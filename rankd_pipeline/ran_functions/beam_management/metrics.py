"""What a beam prediction is worth: the metrics of TR 38.843 (spatial beam prediction) as a long evaluation table.

    top1              share of samples whose chosen beam is the genie-best of Set A
    top4              share whose genie-best beam is among the four highest scores ("Top-K/1")
    within_1db        share whose chosen beam is at most 1 dB below the genie-best
    l1_rsrp_loss_db   noise-free RSRP of the genie-best beam minus that of the chosen beam; one row a sample, so that
                      quantiles and the CDF can be read
    ece_bin_XX        mean of (confidence − correct) of the samples in confidence bin XX; only where the scores are
                      probabilities
    confidence_bin_XX mean confidence of the same samples; with the row above it gives the reliability diagram

Cells are ``site=<site>|band=<GHz>GHz|link=<los|nlos|indoor>``; an indoor UE is "indoor" whatever its line of sight.
Parts that the meta does not hold are left out.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.calibration import BINS, confidence_bin
from rankd_pipeline.evaluation.table import format_cell, validate_table

TOP_K = 4
TRUTH = "rsrp_dbm"  # noise-free RSRP of each Set A beam [n, beams]


def evaluate_scores(
    model: str,
    scores_or_prob: np.ndarray,
    truth: Mapping[str, np.ndarray],
    meta: Mapping[str, np.ndarray],
    is_probability: bool,
    bins: int = BINS,
) -> pd.DataFrame:
    """Score one model's predictions.

    Args:
        model: the name that goes into the table.
        scores_or_prob: [n, beams]; higher means better. A model that only chooses gives ones at its choices.
        truth: holds ``rsrp_dbm`` [n, beams], noise-free, dBm.
        meta: ``split`` and ``drop_id`` [n] (``split`` may be one str); optional ``site``, ``band_ghz``, ``los``,
            ``indoor`` [n].
        is_probability: rows sum to one, so that the calibration rows are written too.
        bins: number of equal-width confidence bins.
    Returns:
        The long table, rows ordered by metric, then split, drop and cell (or by sample).
    Raises:
        RankdError: shapes that do not fit, or a score that is not finite.
    """
    scores = np.asarray(scores_or_prob, np.float64)
    rsrp_dbm = np.asarray(truth[TRUTH], np.float64)
    _check(model, scores, rsrp_dbm)
    n = len(scores)
    chosen = scores.argmax(1)
    best = rsrp_dbm.argmax(1)
    row = np.arange(n)
    loss_db = rsrp_dbm[row, best] - rsrp_dbm[row, chosen]
    # Rank of the best beam: how many beams score strictly higher, ties before it in order, as argmax breaks them.
    score_best = scores[row, best][:, None]
    ahead = (scores > score_best) | ((scores == score_best) & (np.arange(scores.shape[1]) < best[:, None]))
    drop_id = _column(meta, "drop_id", n).astype(np.int64)
    keys = pd.DataFrame({"split": _column(meta, "split", n), "unit": drop_id, "cell": cells(meta, n)})
    # A tie in RSRP (clipped or quantised truth) is no miss: the chosen beam is as good as the best.
    values = {"top1": loss_db <= 0.0, "top4": ahead.sum(1) < TOP_K, "within_1db": loss_db <= 1.0}
    parts = [_grouped(keys, metric, value) for metric, value in values.items()]
    parts.append(keys.assign(metric="l1_rsrp_loss_db", value=loss_db, n=1))
    if is_probability:
        confidence = scores.max(1)
        index = confidence_bin(confidence, bins)
        for prefix, value in (("ece_bin", confidence - values["top1"]), ("confidence_bin", confidence)):
            names = np.array([f"{prefix}_{b:02d}" for b in range(bins)], dtype=object)
            parts.append(_grouped(keys, names[index], value))
    return validate_table(pd.concat(parts, ignore_index=True).assign(model=model))


def cells(meta: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """The cell of each sample [n] (str), from what the meta holds of ``site``, ``band_ghz``, ``los``, ``indoor``."""
    parts: dict[str, np.ndarray] = {}
    if "site" in meta:
        parts["site"] = _column(meta, "site", n).astype(str)
    if "band_ghz" in meta:
        parts["band"] = np.array([f"{b:g}GHz" for b in _column(meta, "band_ghz", n)])
    if "los" in meta:
        link = np.where(_column(meta, "los", n).astype(bool), "los", "nlos")
        if "indoor" in meta:
            link = np.where(_column(meta, "indoor", n).astype(bool), "indoor", link)
        parts["link"] = link
    if not parts:
        return np.full(n, "", dtype=object)
    frame = pd.DataFrame(parts)
    code = frame.groupby(list(parts), sort=True).ngroup().to_numpy()
    unique = frame.drop_duplicates().sort_values(list(parts)).to_dict("records")
    names = [format_cell(**{str(key): str(value) for key, value in record.items()}) for record in unique]
    return np.array(names, dtype=object)[code]


def _grouped(keys: pd.DataFrame, metric: str | np.ndarray, value: np.ndarray) -> pd.DataFrame:
    """Mean and count of ``value`` [n] over each (metric, split, drop, cell)."""
    groups = keys.assign(metric=metric, value=value.astype(np.float64)).groupby(["metric", "split", "unit", "cell"], sort=True)
    return groups["value"].agg(value="mean", n="size").reset_index()


def _column(meta: Mapping[str, np.ndarray], name: str, n: int) -> np.ndarray:
    if name not in meta:
        raise RankdError(f"Evaluation: meta has no '{name}'; it holds {sorted(meta)}.")
    column = np.asarray(meta[name])
    column = np.full(n, column) if column.ndim == 0 else column
    if column.shape != (n,):
        raise RankdError(f"Evaluation: meta '{name}' has shape {column.shape}; expected ({n},), one for each sample.")
    return column


def _check(model: str, scores: np.ndarray, rsrp_dbm: np.ndarray) -> None:
    if scores.ndim != 2 or scores.shape != rsrp_dbm.shape or len(scores) == 0:
        raise RankdError(
            f"Evaluation of {model}: scores {scores.shape} against true RSRP {rsrp_dbm.shape}; expected the same [n, beams], n > 0."
        )
    for name, array in (("score", scores), ("true RSRP", rsrp_dbm)):
        bad = ~np.isfinite(array).all(1)
        if bad.any():
            first, count = int(bad.argmax()), int(bad.sum())
            raise RankdError(f"Evaluation of {model}: the {name} of sample {first} is not finite ({count} in all).")
