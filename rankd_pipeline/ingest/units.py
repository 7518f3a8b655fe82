"""Units that logs are written in, and what they are in ours."""

from collections.abc import Callable

import numpy as np

from rankd_pipeline.errors import RankdError


def _from_linear(milliwatts_per_unit: float) -> Callable[[np.ndarray], np.ndarray]:
    def convert(values: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return 10.0 * np.log10(np.where(values > 0, values * milliwatts_per_unit, np.nan))

    return convert


def _times(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: values * factor


# ours -> theirs -> conversion; a value that has no logarithm becomes NaN.
CONVERSIONS: dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]] = {
    "dBm": {
        "dBm": _times(1.0), "dBm*10": _times(0.1), "dBm*100": _times(0.01), "dBW": lambda v: v + 30.0,
        "W": _from_linear(1e3), "mW": _from_linear(1.0),
        "uW": _from_linear(1e-3), "nW": _from_linear(1e-6), "pW": _from_linear(1e-9),
    },
    "km/h": {"km/h": _times(1.0), "m/s": _times(3.6), "mph": _times(1.609344)},
    "GHz": {"GHz": _times(1.0), "MHz": _times(1e-3), "kHz": _times(1e-6), "Hz": _times(1e-9)},
    "s": {"s": _times(1.0), "ms": _times(1e-3), "us": _times(1e-6), "ns": _times(1e-9), "min": _times(60.0)},
}  # fmt: skip


def converter(ours: str, theirs: str | None, where: str) -> Callable[[np.ndarray], np.ndarray]:
    """The conversion of values in unit `theirs` (None: already ours) into `ours`.

    Raises: RankdError naming the units that are known.
    """
    if theirs is None or theirs == ours:
        return _times(1.0)
    known = CONVERSIONS.get(ours, {})
    if theirs not in known:
        raise RankdError(f"{where}: unit {theirs!r} cannot be turned into {ours!r}; expected one of: {', '.join(known) or ours}.")
    return known[theirs]


def likely_units(ours: str, values: np.ndarray, low: float, high: float) -> list[str]:
    """Units in which at least 90 % of `values` would lie in [low, high] of `ours`."""
    found = []
    for name, convert in CONVERSIONS.get(ours, {}).items():
        converted = convert(values)
        if name != ours and np.mean((converted >= low) & (converted <= high)) >= 0.9:
            found.append(name)
    return found
