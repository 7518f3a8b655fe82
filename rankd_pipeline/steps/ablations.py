"""Ablations: what one part of the chain buys, trained with and without it on the same seeds; stored like any artifact."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rankd_pipeline.distillation.heads import outputs_of
from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.paired import paired_gain
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineSpec
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.data import TRUTH, features_of, inputs_of_rows, read_npy, split_is, write_npy
from rankd_pipeline.steps.grid import grid
from rankd_pipeline.steps.runner import code_version, run_step
from rankd_pipeline.steps.ssl_weights import WEIGHTS
from rankd_pipeline.steps.teacher import fit_teacher
from rankd_pipeline.store.artifact import Artifact, Recipe, Store
from rankd_pipeline.store.tensors import column_array, iter_tables, rows_of
from rankd_pipeline.training.fit import FitConfig
from rankd_pipeline.training.parallel import map_processes
from rankd_pipeline.training.seeds import derive_seed
from rankd_pipeline.training.weights import load_weights

Note = Callable[[str], None]
CODE_VERSION = "2"
"""Of this module; what trains the teachers has that of the step."""
SHARES, SEEDS = (0.05, 0.30, 1.00), 5
LABELS = ("label", "has_label", "target")


def ssl(spec: PipelineSpec, store: Store, current: Settings, note: Note) -> dict[str, Any]:
    """The teacher with and without self-supervised weights at 5 %, 30 % and 100 % of the training drops labelled.

    Paired: both arms of a seed see the same drops, order and initial head. Scores are on the validation split: an
    ablation guides choices, and choices never look at the test split. Returns {title, rows, seeds}.
    """
    made: dict[str, Artifact] = {}
    for step in ("corpus", "audit_report", "ssl_weights"):
        note(f"ablate ssl: {step}")
        made[step] = run_step(step, spec, store, current)
    if made["ssl_weights"].skipped is not None:
        raise RankdError(f"ablate ssl: there are no self-supervised weights to compare with: {made['ssl_weights'].skipped}.")
    recipe = Recipe(
        spec.pipeline, "ablate_ssl", f"{CODE_VERSION}+teacher {code_version(STEPS['teacher'], spec.function)}",
        {"teacher": spec.config_of("teacher"), "shares": SHARES, "seeds": SEEDS}, spec.scale, spec.seed, spec.variant,
        {name: item.version for name, item in made.items()}, {},
    )  # fmt: skip
    with store.lock(f"{spec.pipeline}-ablate_ssl-{recipe.digest}", wait=note):
        artifact = store.get(spec.pipeline, "ablate_ssl", recipe.digest)
        if artifact is None:
            draft = store.draft(recipe)
            result = _compare(spec, made, draft.scratch, current.workers, note)
            (draft.out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
            artifact = store.publish(draft, made)
    return json.loads(artifact.file("table.json").read_text())


def _compare(spec: PipelineSpec, made: dict[str, Artifact], scratch: Path, workers: int, note: Note) -> dict[str, Any]:
    _lay_out(spec, made["corpus"], scratch / "data")
    jobs = [
        {
            "function": spec.function, "corpus": spec.steps.corpus.simulation, "network": spec.steps.teacher.network,
            "fit": spec.steps.teacher.fit, "loss": spec.steps.teacher.loss, "share": share, "ssl": with_ssl,
            "seed": derive_seed(spec.seed, "ablate_ssl", seed), "data": str(scratch / "data"),
            "weights": str(made["ssl_weights"].file(WEIGHTS)), "out": str(scratch / f"{share:g}-{seed}-{int(with_ssl)}"),
        }
        for share in SHARES for seed in range(SEEDS) for with_ssl in (True, False)
    ]  # fmt: skip
    done = 0

    def on_done(index: int, score: float) -> None:
        nonlocal done
        done += 1
        job = jobs[index]
        note(f"ablate ssl: {done} of {len(jobs)}: {job['share']:.0%} labels, {'with' if job['ssl'] else 'without'}: {score:.4f}")

    scores = map_processes(teacher_job, jobs, workers, on_done)
    rows = []
    for share in SHARES:
        with_ssl, without = (
            [s for job, s in zip(jobs, scores, strict=True) if (job["share"], job["ssl"]) == (share, arm)] for arm in (True, False)
        )
        gain = paired_gain(with_ssl, without)
        rows.append({
            "labelled": f"{share:.0%}", "with SSL": float(np.mean(with_ssl)), "without": float(np.mean(without)),
            "gain": gain.mean, "low": gain.ci95[0], "high": gain.ci95[1], "p": gain.p_one_sided,
        })  # fmt: skip
    return {
        "title": f"{spec.pipeline}, {spec.scale}: teacher with and without SSL, validation task score",
        "rows": rows,
        "seeds": SEEDS,
    }


def _lay_out(spec: PipelineSpec, corpus: Artifact, folder: Path) -> None:
    """Inputs and oracle labels of training and validation, with a rank of drops that shares are cut from."""
    function = load_function(spec.function)
    tables = [function.oracle_labels(table, spec.steps.oracle_labels.softness) for table in iter_tables(corpus.file(TRUTH))]
    oracle = pa.concat_tables(tables)
    for split in ("train", "val"):
        ids, inputs = inputs_of_rows(function, corpus, split_is(split))
        known = pc.field("sample_id").isin(pa.array(ids))
        table = oracle.filter(known)
        keep = np.isin(ids, table["sample_id"].to_numpy())
        rows = rows_of(table["sample_id"].to_numpy(), ids[keep])
        label = column_array(table["label"])[rows]
        labels = {"label": label.astype(np.int64) if label.ndim == 1 else label, "has_label": np.ones(len(rows), np.uint8)}
        if "target" in table.column_names:
            labels["target"] = column_array(table["target"])[rows]
        drops = features_of(corpus, ["drop_id"], split_is(split))["drop_id"][keep]
        unique = np.unique(drops)
        order = np.random.default_rng(derive_seed(spec.seed, "ablate_ssl", "drops")).permutation(len(unique))
        rank = order[np.searchsorted(unique, drops)] / len(unique)
        write_npy(folder / split, {**{name: values[keep] for name, values in inputs.items()}, **labels, "rank": rank})


def teacher_job(job: dict[str, Any]) -> float:
    """Train one teacher and return its validation task score; a finished job is read back."""
    out = Path(job["out"])
    if (out / "score.json").exists():
        return json.loads((out / "score.json").read_text())
    function = load_function(job["function"])
    head = function.head()
    train, val = read_npy(Path(job["data"]) / "train"), read_npy(Path(job["data"]) / "val")
    chosen = np.flatnonzero(train["rank"] < job["share"])
    names = [name for name in train if name not in (*LABELS, "rank")]
    torch.manual_seed(derive_seed(job["seed"], "init"))
    model = function.teacher(function.corpus_config(job["corpus"]), job["network"])
    if job["ssl"]:
        load_weights(model, job["weights"])
    else:
        function.set_statistics(model, {name: np.asarray(train[name]) for name in names})
    inputs = {name: np.asarray(val[name]) for name in names}
    fit_teacher(
        function, model, {name: np.asarray(train[name][chosen]) for name in [*names, *LABELS] if name in train}, inputs,
        np.asarray(val["label"]), FitConfig.model_validate(job["fit"]).model_copy(update={"threads": 1}), job["loss"], job["seed"],
        out,
    )  # fmt: skip
    score = head.task_score(outputs_of(model, inputs), np.asarray(val["label"]))
    (out / "score.tmp").write_text(json.dumps(score))
    (out / "score.tmp").replace(out / "score.json")
    return score


ABLATIONS: dict[str, Callable[[PipelineSpec, Store, Settings, Note], dict[str, Any]]] = {"ssl": ssl, "grid": grid}
