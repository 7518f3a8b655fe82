"""Reads the rows of a telemetry artifact: its files are the field's own, its windows say which rows belong together."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rankd_pipeline.store.artifact import Artifact
from rankd_pipeline.telemetry.contract import TelemetrySchema, read_file
from rankd_pipeline.telemetry.windows import Window

FILES, WINDOWS = "files", "windows.json"


def write_windows(windows: Sequence[Window]) -> list[dict[str, Any]]:
    return [asdict(window) for window in windows]


def windows_of(artifact: Artifact) -> list[Window]:
    """The windows of a telemetry artifact, oldest first."""
    return [Window(**item) for item in json.loads(artifact.file(WINDOWS).read_text())]


def columns_of_files(artifact: Artifact, schema: TelemetrySchema, spans: Sequence[tuple[float, float]]) -> dict[str, np.ndarray]:
    """Columns of all rows in the spans [start_s, end_s), in order of time; see `read_file` for the names."""
    parts = []
    for path, (first, last) in _files(artifact):
        if not any(first < end and last >= start for start, end in spans):
            continue
        columns, _ = read_file(path, schema)
        keep = np.zeros(len(columns["time_s"]), bool)
        for start, end in spans:
            keep |= (columns["time_s"] >= start) & (columns["time_s"] < end)
        parts.append({name: values[keep] for name, values in columns.items()})
    return sorted_rows(concatenated(parts, schema))


def concatenated(parts: Sequence[Mapping[str, np.ndarray]], schema: TelemetrySchema) -> dict[str, np.ndarray]:
    """Columns of several parts one after the other; a part without labels has zeros there."""
    names = [*schema.required, *schema.optional, "has_label"]
    if not parts:
        return {name: np.zeros(0) for name in names}
    joined = {name: np.concatenate([part[name] for part in parts]) for name in names}
    labelled = [part["label"] for part in parts if "label" in part]
    if labelled:
        empty = labelled[0][:0]
        filled = [part.get("label", np.zeros((len(part["time_s"]), *empty.shape[1:]), empty.dtype)) for part in parts]
        joined["label"] = np.concatenate(filled)
    return joined


def sorted_rows(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows in order of time, then session: the same rows, the same order, however they were spread over files."""
    order = np.lexsort((columns["session"], columns["time_s"]))
    return {name: values[order] for name, values in columns.items()}


def _files(artifact: Artifact) -> Iterator[tuple[Any, tuple[float, float]]]:
    for name, span in artifact.metrics["spans"].items():
        yield artifact.file(f"{FILES}/{name}"), (span[0], span[1])
