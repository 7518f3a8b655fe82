"""Step 4: one label a sample, with where it came from, and how noisy the field's own labels are."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import inside
from rankd_pipeline.steps.data import FEATURES, LABELS, TRUTH, features_of
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.store.tensors import column_array, iter_tables, read_columns, rows_of, tensor_array, write_parquet


def oracle_labels(ctx: StepContext) -> None:
    """Write `labels/part-00000.parquet` (sample_id, label, provenance) for every labelled sample."""
    if ctx.function.self_labelled:
        return ctx.skip("the label of a sample is the part of itself that a task hides")
    corpus = ctx.inputs["corpus"]
    labelled = features_of(corpus, ["labelled"], pc.field("labelled"))["sample_id"]
    sources = {"classical_sweep": _sweep(corpus), "simulation_oracle": _oracle(ctx, labelled)}
    if ctx.config.annotations is not None:
        sources["expert"] = _expert(ctx, corpus)
    chosen = merge(sources, ctx.config.precedence)
    if not len(chosen["sample_id"]):
        raise RankdError(
            "oracle_labels: not one sample has a label; give the corpus a label column, a larger labelled_share, or an expert "
            "CSV (steps.oracle_labels.annotations)."
        )
    columns = {name: tensor_array(values) if values.ndim > 1 else pa.array(values) for name, values in chosen.items()}
    write_parquet(pa.table(columns), ctx.out / "labels" / "part-00000.parquet")
    names, counts = np.unique(chosen["provenance"], return_counts=True)
    ctx.metrics.update(
        labels=len(chosen["sample_id"]),
        softness=ctx.config.softness if "target" in chosen else 0.0,
        by_provenance=dict(zip(names.tolist(), counts.tolist(), strict=True)),
        sweep_label_noise=disagreement(sources["classical_sweep"], sources["simulation_oracle"]),
        rejected_annotations=len(ctx.observed.get("rejected_annotations", [])),
    )
    return None


def merge(sources: dict[str, dict[str, np.ndarray]], precedence: tuple[str, ...]) -> dict[str, np.ndarray]:
    """One label a sample: from the first provenance in `precedence` that has it. Ordered by sample_id."""
    ids, labels, provenance = [], [], []
    taken = np.zeros(0, np.int64)
    for name in precedence:
        if name not in sources:
            continue
        fresh = ~np.isin(sources[name]["sample_id"], taken)
        ids.append(sources[name]["sample_id"][fresh])
        labels.append(sources[name]["label"][fresh])
        provenance.append(np.full(int(fresh.sum()), name, dtype=object))
        taken = np.concatenate([taken, ids[-1]])
    all_ids = np.concatenate(ids) if ids else taken
    order = np.argsort(all_ids, kind="stable")
    label = np.concatenate(labels)[order] if labels else np.zeros(0, np.int32)
    merged = {
        "sample_id": all_ids[order],
        "label": label.astype(np.int32 if label.ndim == 1 else np.float32),
        "provenance": np.concatenate(provenance)[order].astype(str) if provenance else np.zeros(0, str),
    }
    soft = next((source for source in sources.values() if "target" in source), None)
    return merged if soft is None else {**merged, "target": _targets(merged, soft)}


def _targets(merged: dict[str, np.ndarray], soft: dict[str, np.ndarray]) -> np.ndarray:
    """The label as a distribution [n, C]: the oracle's where it was taken from the oracle, else all on the class."""
    target = np.zeros((len(merged["label"]), soft["target"].shape[1]), np.float16)
    target[np.arange(len(target)), merged["label"]] = 1.0
    rows = np.flatnonzero(merged["provenance"] == "simulation_oracle")
    if len(rows):
        target[rows] = soft["target"][rows_of(soft["sample_id"], merged["sample_id"][rows])]
    return target


def disagreement(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float | None:
    """How far the two labellings are apart where both label a sample; None if there is none.

    Of classes the share on which they differ; of tensors the mean squared difference over the mean square of `other`.
    """
    both, at_one, at_other = np.intersect1d(one["sample_id"], other["sample_id"], return_indices=True)
    if not len(both):
        return None
    mine, theirs = one["label"][at_one], other["label"][at_other]
    if mine.ndim == 1:
        return float(np.mean(mine != theirs))
    power = float(np.mean(theirs.astype(np.float64) ** 2))
    return float(np.mean((mine.astype(np.float64) - theirs) ** 2)) / power if power else None


def _sweep(corpus) -> dict[str, np.ndarray]:
    return read_columns(corpus.file(LABELS), ["sample_id", "label"])


def _oracle(ctx: StepContext, labelled: np.ndarray) -> dict[str, np.ndarray]:
    """The simulator's answer, for the labelled samples only: the truth of the others is never read here."""
    parts = [
        ctx.function.oracle_labels(table, ctx.config.softness)
        for table in iter_tables(ctx.inputs["corpus"].file(TRUTH), where=pc.field("sample_id").isin(pa.array(labelled)))
    ]
    if not parts:
        return {"sample_id": np.zeros(0, np.int64), "label": np.zeros(0, np.int32)}
    table = pa.concat_tables(parts)
    return {name: column_array(table[name]) for name in table.column_names}


def _expert(ctx: StepContext, corpus) -> dict[str, np.ndarray]:
    from rankd_pipeline.ingest.annotations import read_annotations

    classes = ctx.function.schema(ctx.corpus_config).label.classes
    if not classes:
        raise RankdError(
            f"steps.oracle_labels.annotations: {ctx.spec.function} has no classes for a label, which is all that a CSV of "
            "annotations can hold; take the key out."
        )
    path = inside(ctx.home, ctx.config.annotations, "steps.oracle_labels.annotations")
    known = read_columns(corpus.file(FEATURES), ["sample_id"])["sample_id"]
    good, rejected = read_annotations(path, classes, known)
    rows = [{"row": number, "reason": reason} for number, reason in rejected]
    ctx.write_json("rejected_annotations.json", rows)
    ctx.observed["rejected_annotations"] = rows
    for row in rows[:5]:
        ctx.note(f"{path.name}, row {row['row']}: {row['reason']}; the row is left out")
    return {"sample_id": good["sample_id"].to_numpy(), "label": good["label"].to_numpy()}
