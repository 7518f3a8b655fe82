"""Step 11: the bundle: the very file that was profiled, proven better than the classical method, with its lineage."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rankd_pipeline.evaluation.gates import verdict_of
from rankd_pipeline.evaluation.table import concat_tables, read_table, write_table
from rankd_pipeline.ran_functions.contract import Baseline, Predictor
from rankd_pipeline.report.page import render_model_card
from rankd_pipeline.runtime.bundle import MODEL, load_bundle, python_caller, write_bundle
from rankd_pipeline.runtime.onnx_export import read_metadata, read_signature
from rankd_pipeline.steps.calibration_scorecard import fitted_baselines
from rankd_pipeline.steps.data import present_splits
from rankd_pipeline.steps.promotion import SHIPPED
from rankd_pipeline.steps.quantized_onnx import c_form, model_file
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.scoring import end_metric_of, evaluate_splits, headline, judge_gates, score_table
from rankd_pipeline.steps.summary import figures_of, summarise, tables_of
from rankd_pipeline.store.artifact import sha256_file
from rankd_pipeline.store.lineage import write_lineage


def deployment(ctx: StepContext) -> None:
    """Write `bundle/` (self-contained), `evaluation.parquet`, `scores.json`; metrics carry score, gates and verdict.

    Raises: RankdError if the bundle does not verify after it was written.
    """
    race, files = ctx.inputs["latency_profile"], ctx.inputs["quantized_onnx"]
    model = files.file(model_file(race.metrics["candidate"], race.metrics["precision"]))
    content = {MODEL: model}
    if race.metrics["engine"] == "c":
        source = c_form(files, race.metrics["candidate"], race.metrics["precision"]).source
        assert source is not None  # it was raced
        content |= {path.name: path for path in (source.source, source.header)}
    lineage = ctx.scratch / "lineage.json"
    lineage.write_text(json.dumps(write_lineage(ctx.inputs, ctx.store), indent=1, sort_keys=True) + "\n")
    content["lineage.json"] = lineage
    bundle = ctx.out / "bundle"
    if not bundle.exists():
        write_bundle(bundle, content, _about(ctx, sha256_file(model)), _card(ctx, model))
    # These tell times and run ids; the model itself is deterministic.
    ctx.draft.volatile.update(f"bundle/{name}" for name in ("lineage.json", "manifest.json", "model_card.html"))
    _judge(ctx, load_bundle(bundle))


def _judge(ctx: StepContext, predictor: Any) -> None:
    """Score the bundle as shipped, on the test splits, against the classical methods."""
    corpus = ctx.inputs["corpus"]
    baselines = [item for item in ctx.function.baselines(ctx.corpus_config) if not item.learned]
    models: dict[str, Predictor] = {
        SHIPPED: ctx.function.deployed_predictor(predictor, predictor.signature),
        **fitted_baselines(ctx, baselines),
    }
    splits = present_splits(corpus)
    table = evaluate_splits(ctx, corpus, models, splits, [SHIPPED], baselines)
    table = concat_tables([table, *_end_metric(ctx, models[SHIPPED], baselines)])
    write_table(table, ctx.out / "evaluation.parquet")
    ctx.write_json("scores.json", score_table(ctx, table, list(models), splits))
    resamples = ctx.spec.steps.calibration_scorecard.resamples
    gates = judge_gates(ctx, ctx.spec.gates.deployment, table, [item.name for item in baselines if item.gate], resamples)
    score, race = headline(ctx, table, SHIPPED), ctx.inputs["latency_profile"].metrics
    ctx.metrics.update(
        score=score.value, score_ci95=list(score.ci95 or ()), test_data=corpus.version,
        precision=race["precision"], runtime=race["runtime"], sites=corpus.metrics["sites"],
        gates=[gate.model_dump(mode="json") for gate in gates], verdict=verdict_of(gates),
        reason="; ".join(gate.sentence() for gate in gates if gate.verdict != "pass"),
    )  # fmt: skip
    _draw(ctx, table)


def _end_metric(ctx: StepContext, shipped: Predictor, baselines: Sequence[Baseline]) -> list[pd.DataFrame]:
    """The file's end metric beside the baselines', which is dear to compute: the scorecard has theirs, on the same samples."""
    tables = end_metric_of(ctx, ctx.inputs["corpus"], {SHIPPED: shipped}, baselines)
    if not tables:
        return []
    earlier = read_table(ctx.inputs["calibration_scorecard"].file("evaluation.parquet"))
    known = earlier["model"].isin([item.name for item in baselines]) & earlier["metric"].isin(list(tables[0]["metric"].unique()))
    return [*tables, earlier.loc[known]]


def _draw(ctx: StepContext, table: pd.DataFrame) -> None:
    folder = ctx.out / "figures"
    for name, picture in ctx.function.table_figures(table):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(picture)


def _about(ctx: StepContext, digest: str) -> dict[str, Any]:
    """What the bundle's manifest says beside the hashes."""
    race = ctx.inputs["latency_profile"].metrics
    stamps = [] if ctx.spec.enforced else ["smoke, not deployable"]
    if race["verdict"] == "inconclusive":
        stamps.append("latency unproven on this host")
    return {
        "pipeline": ctx.spec.pipeline, "function": ctx.spec.function, "scale": ctx.spec.scale, "seed": ctx.spec.seed,
        "variant": ctx.spec.variant, "student": race["candidate"], "recipe": ctx.draft.recipe.digest, "runtime": race["runtime"],
        "precision": race["precision"], "model_sha256": digest, "budget_us": race["budget_us"], "stamps": stamps,
        "sites": sorted(ctx.inputs["corpus"].metrics["sites"]), "sources": sorted(ctx.inputs["corpus"].metrics["sources"]),
        "licence": "Apache-2.0",
    }  # fmt: skip


def _card(ctx: StepContext, model: Path) -> str:
    signature = read_signature(model)
    about = _about(ctx, sha256_file(model))
    summary = summarise(ctx.spec, ctx.inputs)
    lineage = json.loads(read_metadata(model)["rankd.lineage"])
    tables = tables_of(ctx.inputs)
    tables["Lineage"] = pd.DataFrame([{"step": step, **ids} for step, ids in lineage.items()])
    return render_model_card(
        summary.scorecard, {name: str(value) for name, value in about.items() if np.isscalar(value)},
        signature.model_dump(mode="json"), {"Python": python_caller(signature)}, figures_of(ctx.inputs), tables,
        [*summary.notes, *about["stamps"]], summary.gates, summary.targets,
    )  # fmt: skip
