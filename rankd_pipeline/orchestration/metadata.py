"""What a person wants to see of an artifact in the Dagster UI: numbers over time, tables, pictures, links."""

import base64
from collections.abc import Mapping
from typing import Any

import dagster as dg

from rankd_pipeline.store.artifact import Artifact

MAX_PICTURE_BYTES = 100_000
"""A picture lies in the event log as text; larger ones slow the UI down and stay in the artifact's folder only."""
MAX_NUMBERS = 40


def step_metadata(artifact: Artifact) -> dict[str, Any]:
    """Metadata of one materialization, generic over steps: from the artifact's metrics, `figures/*.png` and `report.html`."""
    observed = artifact.observed
    metadata: dict[str, Any] = {
        "recipe": artifact.recipe,
        "cached": artifact.cached,
        "artifact": dg.MetadataValue.path(str(artifact.path)),
        "seconds": float(observed.get("seconds") or 0.0),
    }
    if artifact.skipped:
        metadata["skipped"] = artifact.skipped
    if observed.get("run_id"):
        metadata["made_by"] = dg.MetadataValue.dagster_run(observed["run_id"])
    if (artifact.path / "report.html").is_file():
        metadata["report"] = dg.MetadataValue.path(str(artifact.path / "report.html"))
    for name, entry in artifact.manifest["inputs"].items():
        metadata[f"from_{name}"] = dg.MetadataValue.asset(dg.AssetKey([artifact.pipeline, entry["step"]]))
    metadata.update(_metrics(artifact.metrics))
    metadata.update(_pictures(artifact))
    return metadata


def gates_table(gates: list[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """The gates of a step: what was asked, what was found with its 95 % interval, and the verdict."""
    names = ("gate", "value", "ci95_low", "ci95_high", "needs", "unit", "verdict", "next_step")
    schema = dg.TableSchema([dg.TableColumn(name) for name in names])
    return dg.MetadataValue.table([dg.TableRecord(_gate_row(gate)) for gate in gates], schema=schema)


def exit_code_of(failure: Any) -> int | None:
    """The exit code that a step's failure (StepFailureData) was given by `rankd`, if it was."""
    user = failure.user_failure_data
    code = user.metadata.get("exit_code") if user is not None and user.metadata else None
    return None if code is None else int(code.value)


def _gate_row(gate: Mapping[str, Any]) -> dict[str, str]:
    low, high = gate.get("ci95") or (None, None)
    return {
        "gate": str(gate["name"]),
        "value": _short(gate.get("value")),
        "ci95_low": _short(low),
        "ci95_high": _short(high),
        "needs": f"{gate.get('comparator', '')} {_short(gate.get('threshold'))}",
        "unit": str(gate.get("unit", "")),
        "verdict": str(gate["verdict"]),
        "next_step": "" if gate["verdict"] == "pass" else str(gate.get("next_step", "")),
    }


def _metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers are plotted over time; one level of nesting becomes a table, anything else stays JSON."""
    metadata: dict[str, Any] = {}
    numbers = 0
    for name, value in metrics.items():
        key = f"metric_{name}"
        if name == "gates" and value:
            metadata["gates"] = gates_table(value)
        elif isinstance(value, (bool, str)):
            metadata[name if name == "verdict" else key] = value
        elif isinstance(value, (int, float)) and numbers < MAX_NUMBERS:
            metadata[key] = value
            numbers += 1
        elif isinstance(value, (list, dict)) and value:
            metadata[key] = _table(value) if _is_table(value) else dg.MetadataValue.json(value)
    return metadata


def _is_table(value: "list[Any] | dict[str, Any]") -> bool:
    rows = list(value.values()) if isinstance(value, dict) else value
    scalars = (int, float, str, bool, type(None))
    return all(isinstance(row, dict) and row and all(isinstance(cell, scalars) for cell in row.values()) for row in rows)


def _table(value: "list[Any] | dict[str, Any]") -> dg.TableMetadataValue:
    rows = [{"name": name, **row} for name, row in value.items()] if isinstance(value, dict) else value
    columns = list(dict.fromkeys(column for row in rows for column in row))
    records = [dg.TableRecord({column: _short(row.get(column)) for column in columns}) for row in rows]
    return dg.MetadataValue.table(records, schema=dg.TableSchema([dg.TableColumn(column) for column in columns]))


def _pictures(artifact: Artifact) -> dict[str, Any]:
    """`figures/*.png` as Markdown with the picture inside, which the UI shows without fetching anything."""
    pictures = {}
    for path in sorted((artifact.path / "figures").glob("*.png")):
        data = path.read_bytes()
        if len(data) <= MAX_PICTURE_BYTES:
            encoded = base64.b64encode(data).decode()
            pictures[f"figure_{path.stem}"] = dg.MetadataValue.md(f"![{path.stem}](data:image/png;base64,{encoded})")
    return pictures


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
