"""From telemetry columns to named series, one number a row: what is tested, plotted and blamed.

A small feature tensor becomes its common level and each element relative to it, with whether the element was missing:
so a fault of one element and a move of all are told apart. A large one becomes summaries that follow the radio: its
level, its spread, and how fast it turns along each axis.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rankd_pipeline.audit.schema import ColumnSpec
from rankd_pipeline.telemetry.contract import CONTEXT, TelemetrySchema

MAX_ELEMENTS = 64
Kind = Literal["level", "element", "missing", "summary", "context", "output"]


@dataclass(frozen=True)
class Series:
    """One number a row [n], NaN where there is none. of: column it comes from; element: position in its tensor, or None."""

    name: str
    kind: Kind
    of: str
    values: np.ndarray
    element: int | None = None


def input_series(columns: Mapping[str, np.ndarray], schema: TelemetrySchema) -> list[Series]:
    """Every series of the features."""
    found: list[Series] = []
    for spec in schema.features:
        if spec.role != "feature":
            continue
        values = np.asarray(columns[spec.name], np.float64).reshape(len(columns[spec.name]), -1)
        mask = np.asarray(columns[spec.mask]).reshape(values.shape) > 0 if spec.mask else np.isfinite(values)
        values = np.where(mask, values, np.nan)
        found += _elements(spec, values, mask) if spec.width <= MAX_ELEMENTS else _summaries(spec, values)
    return found


def context_series(columns: Mapping[str, np.ndarray]) -> list[Series]:
    """What the base station estimated; a quantity that it never knows is left out."""
    found = []
    for quantity in CONTEXT:
        values = np.asarray(columns[quantity.name], np.float64)
        if np.isfinite(values).any():
            found.append(Series(quantity.name, "context", quantity.name, values))
            known = np.isfinite(values).astype(np.float64)
            if known.mean() < 1.0:  # how often it exists tells, too: no K-factor without a line of sight
                found.append(Series(f"{quantity.name} known", "context", quantity.name, known))
    return found


def output_series(output: np.ndarray, confidence: np.ndarray) -> list[Series]:
    """What the model delivered: how sure it was, and its level and spread."""
    flat = np.asarray(output, np.float64).reshape(len(output), -1)
    found = [
        Series("output spread", "output", "output", flat.std(axis=1)),
        Series("output peak", "output", "output", flat.max(axis=1)),
    ]
    if np.isfinite(confidence).any():
        found.append(Series("confidence", "output", "confidence", np.asarray(confidence, np.float64)))
    return found


def element_name(spec: ColumnSpec, element: int) -> str:
    """`ssb_beam 7`, from the axes of the tensor; axes of length one are not worth a word."""
    at = np.unravel_index(element, spec.shape or (1,))
    axes = spec.axes or tuple(f"axis{i}" for i in range(len(spec.shape)))
    parts = [f"{axis} {int(index)}" for axis, index, size in zip(axes, at, spec.shape, strict=True) if size > 1]
    return ", ".join(parts) or spec.name


def _elements(spec: ColumnSpec, values: np.ndarray, mask: np.ndarray) -> list[Series]:
    if values.shape[1] == 1:
        found = [Series(spec.name, "level", spec.name, values[:, 0])]
        return found + ([Series(f"{spec.name} missing", "missing", spec.name, 1.0 - mask[:, 0], 0)] if spec.mask else [])
    count = mask.sum(axis=1)
    level = np.divide(np.nansum(values, axis=1), count, out=np.full(len(values), np.nan), where=count > 0)
    found = [Series(f"{spec.name} level", "level", spec.name, level)]
    for element in range(values.shape[1]):
        name = f"{spec.name}[{element_name(spec, element)}]"
        found.append(Series(name, "element", spec.name, values[:, element] - level, element))
        if spec.mask:
            found.append(Series(f"{name} missing", "missing", spec.name, 1.0 - mask[:, element], element))
    return found


def _summaries(spec: ColumnSpec, values: np.ndarray) -> list[Series]:
    tensor = values.reshape(len(values), *spec.shape)
    power = np.nanmean(values**2, axis=1)
    found = [
        Series(f"{spec.name} level", "level", spec.name, 10 * np.log10(np.maximum(power, 1e-30))),
        Series(f"{spec.name} missing", "missing", spec.name, np.isnan(values).mean(axis=1)),
    ]
    for axis, size in enumerate(spec.shape, 1):
        if size > 2:
            step = np.diff(tensor, axis=axis).reshape(len(values), -1)
            turn = np.nanmean(step**2, axis=1) / np.maximum(power, 1e-30)
            label = spec.axes[axis - 1] if spec.axes else f"axis{axis - 1}"
            found.append(Series(f"{spec.name} turn along {label}", "summary", spec.name, np.log10(np.maximum(turn, 1e-12))))
    return found
