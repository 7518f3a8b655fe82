"""Step 2: the corpus health card; its verdict is a blocking gate."""

from rankd_pipeline.audit.report import AuditConfig, audit
from rankd_pipeline.audit.schema import SourceInfo
from rankd_pipeline.report.page import render_audit
from rankd_pipeline.spec import validated
from rankd_pipeline.steps.data import FEATURES, LABELS
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.store.tensors import iter_tables
from rankd_pipeline.telemetry.contract import SOURCE

MOVED = ("dead_component", "missing_component", "missing_values", "missing_run", "level_shift", "label_shift")
"""What a field that has moved looks like. The drift report has told it already: in telemetry that is what is to be learned."""


def audit_report(ctx: StepContext) -> None:
    """Write `audit.json` and `report.html`; metrics carry the verdict and the card."""
    import pyarrow as pa

    corpus = ctx.inputs["corpus"]
    config = validated(AuditConfig, ctx.config.checks, f"pipeline {ctx.spec.pipeline}, steps.audit_report.checks")
    if ctx.spec.site is not None:
        config = config.model_copy(update={"accept": {**config.accept, SOURCE: (*config.accept.get(SOURCE, ()), *MOVED)}})
    report = audit(
        lambda: iter_tables(corpus.file(FEATURES)),
        None if ctx.function.self_labelled else pa.concat_tables(iter_tables(corpus.file(LABELS))),
        ctx.function.schema(ctx.corpus_config),
        (*ctx.spec.steps.corpus.sources, *_site_sources(ctx)),
        config,
    )
    document = report.to_json()
    ctx.write_json("audit.json", document)
    (ctx.out / "report.html").write_text(render_audit(document))
    failed = [finding for finding in document["findings"] if finding["severity"] == "fail"]
    ctx.metrics.update(
        verdict=document["verdict"],
        card=document["card"],
        findings=len(document["findings"]),
        reason="; ".join(f"{item['fault']} at {item['where']}: {item['next_step']}" for item in failed[:3]),
    )


def _site_sources(ctx: StepContext) -> tuple[SourceInfo, ...]:
    """Who owns the telemetry that has joined the corpus."""
    site = ctx.inputs["corpus"].metrics.get("site")
    if site is None:
        return ()
    return (SourceInfo(name=SOURCE, owner=site["owner"], may_leave=site["may_leave"], kind="network_log"),)
