"""Which sessions of telemetry train, which validate, and which are held back to judge the challenger by."""

import numpy as np

TRAIN, VAL, JUDGE = "train", "val", "judge"


def roles_of(session: np.ndarray, has_label: np.ndarray, judge_share: float, val_share: float, seed: int) -> np.ndarray:
    """Role of each row [n] (str): a whole session has one, drawn from its number and the seed, in any artifact it is in.

    Sessions without a label train: the teacher labels them.
    """
    draw = uniform_of(session, seed)
    labelled = np.isin(session, np.unique(session[has_label]))
    return np.where(labelled & (draw < judge_share), JUDGE, np.where(labelled & (draw < judge_share + val_share), VAL, TRAIN))


def uniform_of(session: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each session, the same for the same session and seed (SplitMix64)."""
    with np.errstate(over="ignore"):
        x = session.astype(np.int64).view(np.uint64) + np.uint64(seed % 2**63) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53
