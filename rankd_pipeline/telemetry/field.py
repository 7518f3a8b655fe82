"""Plays the field: the deployed bundle on simulated channels of a world that may have shifted, written as telemetry.

What is simulated comes from the function (`field_config`, `simulate`, `field_context`); how a base station calls the
model, estimates its context and labels a few sessions is the same for all. A file appears whole, by one rename.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.contract import RanFunction, Shift
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.runtime.bundle import load_bundle
from rankd_pipeline.store.tensors import column_array
from rankd_pipeline.telemetry.contract import CONTEXT, error_column, table_of, telemetry_schema
from rankd_pipeline.telemetry.windows import HOUR_S
from rankd_pipeline.training.parallel import map_processes
from rankd_pipeline.training.seeds import derive_seed

SLOW_HOST = "slow_host"
HOST_SHIFTS = {SLOW_HOST: Shift("another tenant on the host: one call in twenty waits for one to four budgets", "slow_host")}
"""Shifts of the host, which every function knows; a function brings those of its radio."""


@dataclass(frozen=True)
class Play:
    """What to play.

    rows: of each hour, rounded to whole sessions. labelled_share: of the sessions, as periodic full sweeps label them.
    start_s: of the first hour, seconds since 1970, a whole hour.
    """

    bundle: Path
    shifts: frozenset[str]
    hours: int
    rows: int
    labelled_share: float
    seed: int
    start_s: float


def known_shifts(function: RanFunction) -> dict[str, Shift]:
    """Every shift that can be played."""
    return {**function.shifts, **HOST_SHIFTS}


def play(
    function: RanFunction, corpus: Mapping[str, Any], budget_us: float, wanted: Play, out: Path, workers: int,
    on_done: Callable[[int, Path], None] | None = None,
) -> list[Path]:  # fmt: skip
    """Write one telemetry file an hour to `out`; returns their paths. Same arguments, same rows (latency apart).

    Raises: RankdError for an unknown shift, hours in the future, or a bundle of another function.
    """
    unknown = sorted(wanted.shifts - set(known_shifts(function)))
    if unknown:
        raise RankdError(f"shift {unknown[0]!r}: unknown to {function.name}; expected one of {', '.join(known_shifts(function))}.")
    ahead = wanted.start_s + wanted.hours * HOUR_S - time.time()
    if ahead > HOUR_S:
        raise RankdError(f"the field would be {ahead / HOUR_S:.0f} hours ahead of now; play fewer hours, or start earlier.")
    made_for = load_bundle(wanted.bundle).manifest.about
    if made_for["function"] != function.name:
        raise RankdError(f"{wanted.bundle}: a bundle of {made_for['function']}, expected one of {function.name}.")
    out.mkdir(parents=True, exist_ok=True)
    jobs = [
        {
            "function": function.name, "corpus": dict(corpus), "budget_us": budget_us, "bundle": str(wanted.bundle),
            "model": made_for["recipe"], "shifts": sorted(wanted.shifts), "rows": wanted.rows, "out": str(out),
            "labelled_share": wanted.labelled_share, "seed": wanted.seed, "start_s": wanted.start_s + hour * HOUR_S,
        }
        for hour in range(wanted.hours)
    ]  # fmt: skip
    told = (lambda index, path: on_done(index, Path(path))) if on_done is not None else None
    return [Path(path) for path in map_processes(hour_job, jobs, workers, told)]


def hour_job(job: Mapping[str, Any]) -> str:
    """Simulate, decide and write one hour; returns the path."""
    function = load_function(job["function"])
    cfg = function.corpus_config(job["corpus"])
    columns = hour_columns(function, cfg, job)
    start = datetime.fromtimestamp(job["start_s"], UTC)
    path = Path(job["out"]) / f"{start:%Y%m%dT%H%M}-{job['seed']}.parquet"
    temporary = path.with_name(f"{path.name}.tmp")
    pq.write_table(table_of(columns, telemetry_schema(function, cfg, job["budget_us"])), temporary, compression="zstd")
    temporary.rename(path)
    return str(path)


def hour_columns(function: RanFunction, cfg: Any, job: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of one hour, in order of time."""
    seed = derive_seed(job["seed"], "field", int(job["start_s"]))
    rng = np.random.default_rng(seed)
    features, truth, labels, world = simulated(function, cfg, frozenset(job["shifts"]), job["rows"], seed)
    n, sessions = len(features["drop_id"]), np.unique(features["drop_id"])
    predictor = load_bundle(Path(job["bundle"]))
    output = function.deployed_predictor(predictor, predictor.signature)(features)
    latency_us = np.resize(predictor.call_times_us(function.calls(features, predictor.signature, predictor)), n)
    if SLOW_HOST in job["shifts"]:
        waits = rng.random(n) < 0.05
        latency_us = latency_us + np.where(waits, rng.uniform(1.0, 4.0, n) * job["budget_us"], 0.0)
    begins = np.sort(rng.uniform(0.0, HOUR_S - 1.0, len(sessions)))
    of_row = np.searchsorted(sessions, features["drop_id"])
    has_label = (rng.random(len(sessions)) < job["labelled_share"])[of_row]
    columns: dict[str, np.ndarray] = {
        **function.without_labels(features),
        "time_s": job["start_s"] + begins[of_row],
        "session": int(job["start_s"] // HOUR_S) * 1_000_000 + of_row,
        "model": np.full(n, job["model"], dtype=object),
        "output": output,
        "confidence": function.head().confidence(output),
        "latency_us": latency_us.astype(np.float32),
        "label": labels,
        "has_label": has_label,
    }
    for name, values in function.field_context(world, features, truth).items():
        columns.update(_estimated(name, np.asarray(values, np.float64), rng))
    order = np.argsort(columns["time_s"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def simulated(
    function: RanFunction, cfg: Any, shifts: frozenset[str], rows: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, Any]:
    """(features, truth, delivered label of every row, configuration) of the world under `shifts`: `rows` rows, whole sessions."""
    world = function.field_config(cfg, shifts, rows)
    shards = function.plan(world, seed)
    tables = [function.simulate(world, shard) for shard in shards]
    features, truth = (pa.concat_tables([pair[side] for pair in tables]) for side in (0, 1))
    delivered = function.delivered_labels(truth)
    rows_of_features, rows_of_truth, rows_of_labels = (
        {name: column_array(table[name]) for name in table.column_names} for table in (features, truth, delivered)
    )
    ids = rows_of_features["sample_id"]
    truth_rows = _in_order(rows_of_truth, ids)
    label = function.own_labels(rows_of_features) if function.self_labelled else _in_order(rows_of_labels, ids)["label"]
    # The plan rounds up to whole sessions in every cell; which of them are kept is chance, not their cell.
    sessions, sizes = np.unique(rows_of_features["drop_id"], return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sessions))
    chosen = sessions[order][: max(1, int(np.searchsorted(np.cumsum(sizes[order]), rows, side="right")))]
    keep = np.isin(rows_of_features["drop_id"], chosen)
    return (
        {name: values[keep] for name, values in rows_of_features.items()},
        {name: values[keep] for name, values in truth_rows.items()},
        label[keep],
        world,
    )


def _in_order(columns: Mapping[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of `columns` whose sample_id is each of `ids`."""
    order = np.argsort(columns["sample_id"])
    rows = order[np.searchsorted(columns["sample_id"], ids, sorter=order)]
    return {name: values[rows] for name, values in columns.items()}


def _estimated(name: str, true: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a base station's estimator makes of a quantity, with the error that it states."""
    quantity = next(item for item in CONTEXT if item.name == name)
    draw = rng.standard_normal(len(true))
    if quantity.relative:
        value, error = true * np.exp(quantity.error * draw), np.abs(true) * quantity.error
    else:
        value, error = true + quantity.error * draw, np.where(np.isfinite(true), quantity.error, np.nan)
    low, high = quantity.valid_range
    return {name: np.clip(value, low, high).astype(np.float32), error_column(name): error.astype(np.float32)}
