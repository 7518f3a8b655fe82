"""Telemetry made by hand for tests: no channel, no model, every column of the contract."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.telemetry.contract import TelemetrySchema, table_of, telemetry_schema

PIPELINE = "beam_management"
START_S = 1_790_000_000.0 // 3600 * 3600


def schema() -> TelemetrySchema:
    spec = load_pipeline(PIPELINE).at("smoke")
    function = load_function(spec.function)
    return telemetry_schema(function, function.corpus_config(spec.steps.corpus.simulation), 100.0)


def columns(rows: int = 100, hour: float = 0, labelled: float = 0.2, seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """One hour of a field in which nothing happens, ten rows a session; `changes` replace columns."""
    rng = np.random.default_rng([seed, int(hour * 3600)])
    session = np.arange(rows) // 10
    level = rng.normal(-90, 6, rows // 10 + 1)[session][:, None] + rng.normal(0, 4, (rows, 16))
    probability = rng.dirichlet(np.ones(64) * 0.05, rows).astype(np.float32)
    made = {
        "time_s": START_S + hour * 3600 + np.sort(rng.uniform(0, 3599, rows // 10 + 1))[session],
        "session": int(hour * 1000) * 1000 + session,
        "site": np.array(["market_square", "old_town"], dtype=object)[session % 2],
        "model": np.full(rows, "recipe-1", dtype=object),
        "band_ghz": np.full(rows, 3.5, np.float32),
        "l1_rsrp_dbm": np.clip(level, -140, -44).reshape(rows, 1, 16).astype(np.float32),
        "l1_rsrp_mask": np.ones((rows, 1, 16), np.uint8),
        "output": probability,
        "confidence": probability.max(axis=1),
        "latency_us": rng.gamma(20, 0.5, rows).astype(np.float32),
        "delay_spread_ns": np.exp(rng.normal(4.2, 0.5, rows // 10 + 1))[session].astype(np.float32),
        "delay_spread_ns_error": np.full(rows, 10.0, np.float32),
        "snr_db": rng.normal(40, 8, rows).astype(np.float32),
        "label": np.where(rng.random(rows) < 0.6, probability.argmax(axis=1), rng.integers(0, 64, rows)).astype(np.int32),
        "has_label": (rng.random(rows // 10 + 1) < labelled)[session],
    }
    return {**made, **changes}


def write(folder: Path, name: str, made: dict[str, np.ndarray] | pa.Table) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    pq.write_table(made if isinstance(made, pa.Table) else table_of(made, schema()), path)
    return path
