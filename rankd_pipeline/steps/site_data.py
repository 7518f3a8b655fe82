"""Site data: recent telemetry joins the general corpus, so that a chain can be run again on both."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rankd_pipeline.audit.schema import ColumnSpec, as_column
from rankd_pipeline.errors import RankdError
from rankd_pipeline.spec import PipelineSpec
from rankd_pipeline.steps.data import FEATURES, LABELS, split_is
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.store.artifact import Artifact
from rankd_pipeline.store.tensors import column_array, iter_tables, read_columns, shards, tensor_array, write_parquet
from rankd_pipeline.telemetry.contract import SOURCE, telemetry_schema
from rankd_pipeline.telemetry.roles import JUDGE, roles_of
from rankd_pipeline.telemetry.rows import columns_of_files
from rankd_pipeline.training.seeds import derive_seed

SCENARIO = "field"
SILENT, REPORTED = 0.02, 0.05
"""An element (a beam) is silent at a site that reports it SILENT times as often as the general corpus, or less; one that is
reported in fewer than REPORTED of the general rows says nothing."""


def join_site_data(ctx: StepContext) -> None:
    """Write the shards of the general corpus (linked, not copied) and one more with the telemetry's rows.

    Sessions that judge the challenger later are left out altogether. There is no truth for what the field delivers.
    """
    base, telemetry, site = ctx.inputs["base_corpus"], ctx.inputs["telemetry"], ctx.spec.site
    assert site is not None
    for path in base.path.rglob("*.parquet"):
        _link(path, ctx.out / path.relative_to(base.path))
    schema = telemetry_schema(ctx.function, ctx.corpus_config, ctx.spec.steps.latency_profile.budget_us)
    columns = columns_of_files(telemetry, schema, site.windows)
    if not len(columns["time_s"]):
        raise RankdError(f"{ctx.spec.pipeline}/corpus: telemetry {telemetry.recipe} has no row in the windows that were asked for.")
    role = roles_for(ctx.spec, columns)
    kept = _by_session(_learned_from(ctx, columns, role))
    known = read_columns(base.file(FEATURES), ["sample_id", "drop_id"])
    first_id, first_unit = int(known["sample_id"].max()) + 1, int(known["drop_id"].max()) + 1
    index = len(shards(base.file(FEATURES)))
    features = _features(ctx, kept, first_id, first_unit)
    write_parquet(features, ctx.out / FEATURES / f"part-{index:05d}.parquet")
    if kept["has_label"].any() and not ctx.function.self_labelled:
        ids = features.filter(features["labelled"])["sample_id"]
        labels = _as_stored(kept["label"][kept["has_label"]], base)
        write_parquet(pa.table({"sample_id": ids, "label": labels}), ctx.out / LABELS / f"part-{index:05d}.parquet")
    sites, counts = np.unique(kept["site"].astype(str), return_counts=True)
    ctx.metrics["site"] = {
        "telemetry": telemetry.recipe, "windows": [list(window) for window in site.windows], "first_id": first_id,
        "rows": len(role), "held_back": int((role == JUDGE).sum()), "labelled": int(kept["has_label"].sum()),
        "owner": ctx.spec.steps.telemetry.owner, "may_leave": ctx.spec.steps.telemetry.may_leave,
        "share": ctx.spec.steps.telemetry.site_share, "silent": _silent(ctx, base, features),
        "sites": dict(zip(sites.tolist(), counts.tolist(), strict=True)),
    }  # fmt: skip


def _learned_from(ctx: StepContext, columns: dict[str, np.ndarray], role: np.ndarray) -> dict[str, np.ndarray]:
    """The rows that join the corpus, their role as their split.

    Where the label is a part of the sample, it is put there, and a row without one, half a sample, is left out.
    """
    learned = role != JUDGE
    if ctx.function.self_labelled:
        learned &= columns["has_label"]
    if not learned.any():
        raise RankdError(
            f"{ctx.spec.pipeline}/corpus: none of the {len(role)} telemetry rows in the windows that were asked for has what it "
            "takes to learn from it; expected labelled ones beside those that judge: deliver more labels (docs/telemetry.md)."
        )
    kept = {name: values[learned] for name, values in {**columns, "split": role.astype(object)}.items()}
    return dict(ctx.function.with_labels(kept, kept["label"])) if ctx.function.self_labelled else kept


def _as_stored(label: np.ndarray, base: Artifact) -> pa.Array:
    """Labels of the field in the precision of the general corpus' own: the shards of a corpus are of one type."""
    known = next(iter_tables(base.file(LABELS), ["label"]), None)
    if known is not None:
        label = label.astype(column_array(known["label"].slice(0, 1)).dtype)
    return pa.array(label) if label.ndim == 1 else tensor_array(label)


def _silent(ctx: StepContext, base: Artifact, site: pa.Table) -> list[dict[str, Any]]:
    """What the site does not report although the general corpus does: column, its mask, elements (flat indices).

    Where most of a column is silent, nothing is lost but a habit of reporting; that is not hidden from the general rows.
    """
    found = []
    for spec in ctx.function.schema(ctx.corpus_config).columns:
        if spec.mask is None:
            continue
        everywhere = read_columns(base.file(FEATURES), [spec.mask], split_is("train"))[spec.mask].mean(axis=0).ravel()
        here = column_array(site[spec.mask]).mean(axis=0).ravel()
        silent = np.flatnonzero((here <= SILENT * everywhere) & (everywhere >= REPORTED))
        if 0 < len(silent) <= len(here) // 2:
            found.append({"column": spec.name, "mask": spec.mask, "elements": silent.tolist()})
    return found


def roles_for(spec: PipelineSpec, columns: dict[str, np.ndarray]) -> np.ndarray:
    """The role of each row; the same for corpus and judge, whichever reads them."""
    telemetry = spec.steps.telemetry
    seed = derive_seed(spec.seed, "telemetry", "roles")
    return roles_of(columns["session"], columns["has_label"], telemetry.judge_share, telemetry.val_share, seed)


def _by_session(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sessions one after the other by their first row, as a corpus has its units; within one, in order of time."""
    sessions, unit = np.unique(columns["session"], return_inverse=True)
    begins = np.full(len(sessions), np.inf)
    np.minimum.at(begins, unit, columns["time_s"])
    order = np.lexsort((columns["time_s"], unit, begins[unit]))
    return {name: values[order] for name, values in {**columns, "unit": unit}.items()}


def _features(ctx: StepContext, columns: dict[str, np.ndarray], first_id: int, first_unit: int) -> pa.Table:
    """Telemetry rows as the corpus has them: same columns, same types, ids after the general corpus."""
    schema, n = ctx.function.schema(ctx.corpus_config), len(columns["time_s"])
    filled = {
        **columns, schema.id_column: first_id + np.arange(n), schema.unit_column: first_unit + columns["unit"],
        "group": np.full(n, ctx.function.field_group(ctx.corpus_config), dtype=object),
        "source": np.full(n, SOURCE, dtype=object), "scenario": np.full(n, SCENARIO, dtype=object),
        "labelled": columns["has_label"],
    }  # fmt: skip
    return pa.table({spec.name: as_column(_values(filled, spec, n), spec) for spec in schema.columns})


def _values(columns: dict[str, np.ndarray], spec: ColumnSpec, n: int) -> np.ndarray:
    """A corpus column from telemetry; context that the field did not deliver is 0, as a masked value is."""
    values = columns.get(spec.name)
    if values is None:
        return np.zeros((n, *spec.shape)) if spec.dtype != "string" else np.full(n, "", dtype=object)
    return np.nan_to_num(values) if values.dtype.kind == "f" else values


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:  # another file system
        temporary = target.with_name(f"{target.name}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
