"""How much does the audit find? Plants every fault of the catalogue at random place and severity, and audits clean corpora.

`python -m benchmarks.audit_catalogue` simulates a pool of clean drops once (cached), draws a fresh clean corpus from it for every
seed, and writes `benchmarks/results/audit_catalogue.md` with the recall of each fault by severity and the false alarms.
"""

import argparse
import datetime
import os
import platform
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rankd_pipeline.audit.faults import CATALOGUE, Corpus, recall_table, resample, run_catalogue
from rankd_pipeline.audit.schema import SourceInfo
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.store.tensors import column_array

RESULT = Path(__file__).parent / "results" / "audit_catalogue.md"


def clean_pool(samples: int, seed: int, cache: Path | None = None) -> Corpus:
    """A simulated beam management corpus with a label for every row, from which clean corpora are drawn."""
    function = load_function("beam_management")
    held_out = max(samples // 7, 200)
    config = function.corpus_config(
        {"seen_samples": samples, "heldout_site_samples": held_out, "heldout_band_samples": held_out, "shard_samples": 512}
    )
    paths = [None if cache is None else cache / f"{kind}-{samples}-{seed}.parquet" for kind in ("features", "truth")]
    if all(path is not None and path.exists() for path in paths):
        features, truth = (pq.read_table(path) for path in paths)
    else:
        shards = [function.simulate(config, shard) for shard in function.plan(config, seed)]
        features, truth = (pa.concat_tables(tables) for tables in zip(*shards, strict=True))
        for path, table in zip(paths, (features, truth), strict=True):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table, path)
    schema = function.schema(config)
    labels = function.delivered_labels(truth)
    sources = (SourceInfo(name="sionna", owner="rankd", may_leave=True),)
    return Corpus({c.name: column_array(features[c.name]) for c in schema.columns}, labels, sources, schema)


def report(trials: pd.DataFrame, rows: int, seconds: float) -> str:
    """The result as a Markdown page."""
    clean = trials[trials["fault"] == "clean"]
    planted = trials[trials["fault"] != "clean"]
    table = recall_table(trials)
    command = f"python -m benchmarks.audit_catalogue --seeds {len(planted) // len(table)} --clean {len(clean)}"
    lines = [
        "# Audit: planted faults",
        "",
        f"`{command}`, {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. "
        f"Corpora of about {rows} rows, drawn from a pool of simulated drops.",
        "",
        f"- Clean corpora: {len(clean)}; with any finding: **{int(clean['found'].sum())}**; "
        f"stopped: {int(clean['stopped'].sum())}.",
        f"- Planted faults: {len(planted)} trials of {len(table)} kinds; found {planted['found'].mean():.1%}, "
        f"named rightly {planted['named'].mean():.1%}; kinds with recall of at least 90 %: {int((table['named'] >= 0.9).sum())}.",
        f"- {seconds / len(trials):.2f} s a trial.",
        "",
        "found: the audit says anything at all. named: it names this fault. stopped: it fails the corpus (some faults only warn). "
        "Severity is drawn uniformly and cut in thirds.",
        "",
        "| fault | severity from low to high | trials | found | named | stopped | low | medium | high |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for fault, row in table.iterrows():
        cells = [
            f"{row[c]:.0%}" if row[c] == row[c] else "–"
            for c in ("found", "named", "stopped", "named_low", "named_medium", "named_high")
        ]
        lines.append(f"| {fault} | {CATALOGUE[str(fault)].scale} | {int(row['trials'])} | {' | '.join(cells)} |")
    missed = planted[~planted["named"]]
    lines += ["", f"Missed: {len(missed)}."]
    lines += [
        f"- {m.fault}, seed {m.seed}, severity {m.severity:.2f}: {f'found as {m.findings}' if m.findings else 'nothing found'}"
        for m in missed.itertuples()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the catalogue and write its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=24, help="corpora that get every fault")
    parser.add_argument("--clean", type=int, default=60, help="clean corpora")
    parser.add_argument("--pool", type=int, default=12_000, help="seen samples of the simulated pool")
    parser.add_argument("--share", type=float, default=0.15, help="share of the pool in each corpus")
    parser.add_argument("--cache", type=Path, default=None, help="folder to keep the pool in")
    arguments = parser.parse_args()
    pool = clean_pool(arguments.pool, seed=1, cache=arguments.cache)

    def make_clean(seed: int) -> Corpus:
        return resample(pool, np.random.default_rng(seed), arguments.share)

    start = time.monotonic()
    trials = run_catalogue(make_clean, range(arguments.seeds), range(10_000, 10_000 + arguments.clean))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(report(trials, make_clean(0).rows, time.monotonic() - start))
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
