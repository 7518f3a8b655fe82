"""How steps read a corpus artifact: model inputs, labels and truth by split, in sample order."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rankd_pipeline.ran_functions.contract import RanFunction, Run
from rankd_pipeline.runtime.signature import ModelSignature
from rankd_pipeline.store.artifact import Artifact
from rankd_pipeline.store.tensors import read_columns, rows_of

FEATURES, TRUTH, LABELS = "features", "truth", "labels"
EVALUATED = ("test", "heldout_site", "heldout_band")


def split_is(*splits: str) -> pc.Expression:
    return pc.field("split").isin(pa.array(splits))


def features_of(corpus: Artifact, columns: Sequence[str], where: pc.Expression | None = None) -> dict[str, np.ndarray]:
    """Feature columns (and sample_id) of the rows that `where` keeps, ordered by sample_id."""
    arrays = read_columns(corpus.file(FEATURES), ["sample_id", *(name for name in columns if name != "sample_id")], where)
    order = np.argsort(arrays["sample_id"], kind="stable")
    return {name: values[order] for name, values in arrays.items()}


def inputs_of_rows(
    function: RanFunction, corpus: Artifact, where: pc.Expression | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(sample ids [n], model inputs) of the rows that `where` keeps."""
    features = features_of(corpus, function.feature_columns, where)
    return features["sample_id"], function.model_inputs(features)


def calls_of_rows(
    function: RanFunction, corpus: Artifact, split: str, count: int, signature: ModelSignature, run: Run
) -> dict[str, np.ndarray]:
    """Up to `count` calls of the deployed model, from samples of a split spread evenly over the corpus."""
    features = features_of(corpus, function.feature_columns, split_is(split))
    rows = np.unique(np.linspace(0, len(features["sample_id"]) - 1, min(count, len(features["sample_id"]))).astype(int))
    calls = function.calls({name: values[rows] for name, values in features.items()}, signature, run)
    made = len(next(iter(calls.values())))
    kept = np.linspace(0, made - 1, min(count, made)).astype(int)
    return {name: values[kept] for name, values in calls.items()}


def labels_for(labels: Artifact, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(label [n] or [n, ...], has_label [n] bool) of `ids`; rows without a label hold 0."""
    columns = label_columns(labels, ids)
    return columns.get("label", np.zeros(len(ids), np.int64)), columns["has_label"].astype(bool)


def label_columns(labels: Artifact, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What a training batch knows of the labels of `ids`: label, has_label, and target [n, C] where class labels are soft.

    Of a self-labelled function it knows that every row has one; the label itself is in the inputs.
    """
    if labels.skipped is not None:
        return {"has_label": np.ones(len(ids), np.uint8)}
    soft = ["target"] if labels.metrics["softness"] > 0 else []
    table = read_columns(labels.file("labels"), ["sample_id", "label", *soft])
    order = np.argsort(table["sample_id"], kind="stable")
    sorted_ids = table["sample_id"][order]
    at = np.minimum(np.searchsorted(sorted_ids, ids), max(len(sorted_ids) - 1, 0))
    has = sorted_ids[at] == ids if len(sorted_ids) else np.zeros(len(ids), bool)

    def taken(values: np.ndarray, dtype: type) -> np.ndarray:
        found = values[order][at] if len(sorted_ids) else np.zeros((len(ids), *values.shape[1:]))
        found[~has] = 0
        return found.astype(dtype, copy=False)

    is_class = table["label"].ndim == 1
    columns = {"label": taken(table["label"], np.int64 if is_class else np.float32), "has_label": has.astype(np.uint8)}
    if soft:
        columns["target"] = taken(table["target"], np.float16)
    return columns


def labelled_inputs(
    function: RanFunction, corpus: Artifact, labels: Artifact, split: str
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """(sample ids, model inputs, label) of the labelled rows of a split, site data with their weight."""
    if function.self_labelled:
        features = features_of(corpus, function.feature_columns, split_is(split))
        ids, inputs, label = features["sample_id"], function.model_inputs(features), function.own_labels(features)
        rows = np.arange(len(ids))
    else:
        ids, inputs = inputs_of_rows(function, corpus, split_is(split))
        label, has = labels_for(labels, ids)
        rows = np.flatnonzero(has)
    rows = weighted(corpus, ids, rows)
    return ids[rows], {name: values[rows] for name, values in inputs.items()}, label[rows]


def training_columns(
    function: RanFunction, corpus: Artifact, labels: Artifact, labelled_only: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(sample ids, columns) of the training rows: training inputs, label columns, and the `group` where there are several."""
    features = as_trained(corpus, features_of(corpus, [*function.feature_columns, "group"], split_is("train")))
    names, group = np.unique(features.pop("group").astype(str), return_inverse=True)
    columns = {**function.training_inputs(features), **label_columns(labels, features["sample_id"])}
    if len(names) > 1:
        columns["group"] = group.astype(np.int16)
    ids = features["sample_id"]
    rows = weighted(corpus, ids, np.flatnonzero(columns["has_label"]) if labelled_only else np.arange(len(ids)))
    return ids[rows], {name: values[rows] for name, values in columns.items()}


def as_trained(corpus: Artifact, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features with what the site data never reports (a dead beam) hidden in half of the general training rows.

    They are many and know the answers, so they teach what to do without it; the other half keeps what the general corpus taught.
    features: with sample_id, and with split unless all rows are for training.
    """
    site = corpus.metrics.get("site") or {}
    for silent in site.get("silent", ()):
        ids = features["sample_id"]
        train = features["split"].astype(str) == "train" if "split" in features else True
        rows = np.flatnonzero((ids < site["first_id"]) & (ids % 2 == 1) & train)
        for name in {silent["column"], silent["mask"]} & features.keys():
            flat = features[name].reshape(len(ids), -1).copy()
            flat[np.ix_(rows, silent["elements"])] = 0
            features = {**features, name: flat.reshape(features[name].shape)}
    return features


def weighted(corpus: Artifact, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`rows` (positions in `ids`), those of site data as often as gives them their share of the whole: they are few."""
    site = corpus.metrics.get("site")
    if site is None:
        return rows
    of_site = rows[ids[rows] >= site["first_id"]]
    wanted = site["share"] / (1.0 - site["share"]) * (len(rows) - len(of_site))
    times = max(1, round(wanted / len(of_site))) if len(of_site) else 1
    return np.concatenate([rows, np.tile(of_site, times - 1)])


def evaluation_data(function: RanFunction, corpus: Artifact, split: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(features, truth) of a fully labelled split, row for row; only evaluation may call this."""
    feature_columns, truth_columns = function.evaluation_columns
    features = features_of(corpus, list(dict.fromkeys([*function.feature_columns, *feature_columns])), split_is(split))
    truth = read_columns(
        corpus.file(TRUTH), ["sample_id", *truth_columns], pc.field("sample_id").isin(pa.array(features["sample_id"]))
    )
    rows = rows_of(truth["sample_id"], features["sample_id"])
    return features, {name: values[rows] for name, values in truth.items()}


def present_splits(corpus: Artifact, wanted: Sequence[str] = EVALUATED) -> list[str]:
    """Those of `wanted` that the corpus has rows of."""
    return [split for split in wanted if corpus.metrics["samples_by_split"].get(split, 0)]


def write_npy(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Arrays as plain .npy files, which worker processes memory-map."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)


def read_npy(folder: Path) -> dict[str, np.ndarray]:
    """What `write_npy` wrote, memory-mapped copy on write: torch wants writable memory, the file stays as it is."""
    return {path.stem: np.load(path, mmap_mode="c", allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
