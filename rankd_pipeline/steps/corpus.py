"""Step 1: the corpus, simulated in shards by parallel workers or imported from the user's own tables."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.steps.data import FEATURES, LABELS, TRUTH
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.site_data import join_site_data
from rankd_pipeline.store.tensors import column_array, iter_tables, write_parquet
from rankd_pipeline.training.parallel import map_processes
from rankd_pipeline.training.seeds import derive_seed


def corpus(ctx: StepContext) -> None:
    """Write `features/`, `truth/` and `labels/` (what the field delivers for labelled rows), one Parquet file a shard."""
    if ctx.spec.site is not None:
        join_site_data(ctx)
    elif ctx.config.source is not None:
        _import(ctx)
    else:
        _simulate(ctx)
    _describe(ctx)


def _simulate(ctx: StepContext) -> None:
    raw, seed = ctx.spec.steps.corpus.simulation, derive_seed(ctx.spec.seed, "corpus")
    count = len(ctx.function.plan(ctx.corpus_config, seed))
    jobs = [
        {"function": ctx.spec.function, "config": raw, "seed": seed, "index": index, "out": str(ctx.out)} for index in range(count)
    ]
    # A shard is there whole or not at all, so a killed step simulates only what is missing.
    missing = [job for job in jobs if not _shard_path(ctx.out, TRUTH, job["index"]).exists()]
    done = count - len(missing)
    ctx.progress(done, count, "shards")

    def on_done(_: int, __: Any) -> None:
        nonlocal done
        done += 1
        ctx.progress(done, count, "shards")

    map_processes(simulate_job, missing, ctx.workers, on_done)


def simulate_job(job: dict[str, Any]) -> int:
    """Simulate one shard and write its three tables, the truth last; returns the number of samples."""
    function = load_function(job["function"])
    config = function.corpus_config(job["config"])
    features, truth = function.simulate(config, function.plan(config, job["seed"])[job["index"]])
    write_shard(Path(job["out"]), job["index"], features, truth, function)
    return features.num_rows


def write_shard(out: Path, index: int, features: pa.Table, truth: pa.Table, function: Any) -> None:
    """Write the tables of one shard; the truth goes last and marks the shard as whole."""
    kinds = [(FEATURES, features), (TRUTH, truth)]
    if not function.self_labelled:
        labelled = features.filter(pc.field("labelled"))["sample_id"].combine_chunks()
        kinds.insert(1, (LABELS, function.delivered_labels(truth.filter(pc.field("sample_id").isin(labelled)))))
    for kind, table in kinds:
        path = _shard_path(out, kind, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        write_parquet(table, temporary)
        temporary.replace(path)


def _shard_path(out: Path, kind: str, index: int) -> Path:
    return out / kind / f"part-{index:05d}.parquet"


def _import(ctx: StepContext) -> None:
    from rankd_pipeline.ingest.tables import ingest, load_source

    source = load_source(ctx.config.source)
    schema = ctx.function.schema(ctx.corpus_config)
    imported = ingest(source, schema, root=ctx.home, seed=derive_seed(ctx.spec.seed, "corpus"))
    for index, (features, truth) in enumerate(imported):
        write_shard(ctx.out, index, features, truth, ctx.function)
        ctx.progress(index + 1, index + 2, "shards")
    ctx.write_json("rejected.json", imported.rejected)


def _describe(ctx: StepContext) -> None:
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("split", "site", "band_ghz", "scenario", "source")}
    labelled = train = 0
    for table in iter_tables(ctx.out / FEATURES, [*counts, "labelled"]):
        columns = {name: column_array(table[name]) for name in table.column_names}
        for name, counter in counts.items():
            values, occurrences = np.unique(columns[name].astype(object), return_counts=True)
            keys = [f"{value:g}" if name == "band_ghz" else str(value) for value in values]
            counter.update(dict(zip(keys, occurrences.tolist(), strict=True)))
        is_train = columns["split"] == "train"
        train += int(is_train.sum())
        labelled += int((is_train & columns["labelled"]).sum())
    if not train:
        raise RankdError("corpus: it has no training sample; the sample counts or the split shares leave split 'train' empty.")
    ctx.metrics.update(
        samples=sum(counts["split"].values()),
        samples_by_split=dict(sorted(counts["split"].items())),
        sites=dict(sorted(counts["site"].items())),
        bands_ghz=dict(sorted(counts["band_ghz"].items())),
        scenarios=dict(sorted(counts["scenario"].items())),
        sources=dict(sorted(counts["source"].items())),
        train_labelled_share=labelled / train,
        rejected_rows=0,
    )
    rejected = ctx.out / "rejected.json"
    if rejected.exists():
        import json

        ctx.metrics["rejected_rows"] = len(json.loads(rejected.read_text()))
    ctx.observed["bytes"] = sum(path.stat().st_size for path in ctx.out.rglob("*.parquet"))
