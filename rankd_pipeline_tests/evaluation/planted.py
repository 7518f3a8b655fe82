"""Evaluation tables whose right answers are known, for the tests of this package."""

import numpy as np
import pandas as pd

from rankd_pipeline.evaluation.table import validate_table


def planted_table(
    rates: dict[str, float],
    *,
    metric: str = "top1",
    drops: int = 200,
    per_drop: int = 10,
    spread: float = 0.1,
    seed: int = 0,
    cell: str = "site=a|band=28GHz|link=los",
) -> pd.DataFrame:
    """Models (``"model@split"`` -> true rate) on shared drops: a drop is easy or hard for every model alike."""
    rng = np.random.default_rng(seed)
    rows = []
    difficulty = {split: rng.normal(0, spread, drops) for split in sorted({m.split("@")[1] for m in rates})}
    for term, rate in rates.items():
        model, split = term.split("@")
        p = np.clip(rate + difficulty[split], 0, 1)
        value = rng.binomial(per_drop, p) / per_drop
        rows.append(
            pd.DataFrame({"model": model, "split": split, "unit": np.arange(drops), "cell": cell, "metric": metric,
                          "value": value, "n": per_drop})
        )  # fmt: skip
    return validate_table(pd.concat(rows, ignore_index=True))
