"""From a pipeline's configuration to Dagster definitions: assets, their gates as checks, jobs, and what starts them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg

from rankd_pipeline.errors import INTERRUPTED, GateStopped, RankdError
from rankd_pipeline.orchestration.field import (
    JOB_TAG,
    REDISTILL,
    drift_job_name,
    drift_sensor,
    mirror_sensor,
    nightly_schedule,
    redistill_job_name,
    site_of,
    telemetry_sensor,
)
from rankd_pipeline.orchestration.lifeline import insistent_interrupts
from rankd_pipeline.orchestration.metadata import gates_table, step_metadata
from rankd_pipeline.orchestration.mirrors import reconcile
from rankd_pipeline.orchestration.resources import MlflowTracking, RankdRun
from rankd_pipeline.orchestration.setup import pool_name
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import settings
from rankd_pipeline.spec import PipelineConfig, PipelineSpec
from rankd_pipeline.steps.chain import CHAIN, GATED, INFO, StepInfo
from rankd_pipeline.steps.runner import open_store, require_passed, resolve, run_step
from rankd_pipeline.store.artifact import Artifact

KINDS = {
    "corpus": {"sionna", "parquet"},
    "ssl_weights": {"pytorch"},
    "teacher": {"pytorch"},
    "student": {"pytorch"},
    "quantized_onnx": {"onnx"},
    "latency_profile": {"onnx"},
    "deployment": {"onnx", "mlflow"},
    "telemetry": {"parquet"},
    "shadow_run": {"onnx"},
}
JOINS = {"corpus": ("telemetry",)}
"""What joins a step on a re-distillation: an edge in the graph, so that a champion leads back to the telemetry behind it."""
CRASH_RETRY = dg.RetryPolicy(max_retries=1, delay=1)
"""For a step whose process died or whose disk or network failed. Anything else would only fail again."""


def build_pipeline(config: PipelineConfig) -> dg.Definitions:
    """The definitions of one pipeline, without resources and executor (see `resources.common`)."""
    chain = [[config.pipeline, info.name] for info in CHAIN]
    about, tags = config.title or config.pipeline, {"rankd/pipeline": config.pipeline}
    job = dg.define_asset_job(
        config.pipeline, selection=dg.AssetSelection.assets(*chain), tags=tags,
        description=f"The whole chain of {about}: what is stored costs nothing.",
    )  # fmt: skip
    look = dg.define_asset_job(
        drift_job_name(config.pipeline), tags=tags,
        selection=dg.AssetSelection.assets([config.pipeline, "telemetry"], [config.pipeline, "drift_report"]),
        description=f"Take the telemetry of {about} in and judge the field.",
    )  # fmt: skip
    redistill = dg.define_asset_job(
        redistill_job_name(config.pipeline), tags={**tags, JOB_TAG: REDISTILL},
        selection=dg.AssetSelection.assets(*chain, [config.pipeline, "shadow_run"]),
        description=f"Re-distill the champion of {about} on recent telemetry, and promote or refuse what comes out.",
    )  # fmt: skip
    return dg.Definitions(
        assets=[*(_step_asset(config, info) for info in CHAIN), *_field_assets(config), _champion(config)],
        asset_checks=[_gate_check(config, step) for step in GATED],
        jobs=[job, look, redistill],
        schedules=[nightly_schedule(config, redistill)],
        sensors=[telemetry_sensor(config, look), drift_sensor(config, redistill), mirror_sensor(config)],
    )


def _step_asset(config: PipelineConfig, info: StepInfo) -> dg.AssetsDefinition:
    facets = load_function(config.function).code_versions
    code_version = "+".join([info.code_version, *(f"{facet}={facets.get(facet, '0')}" for facet in info.facets)])

    @dg.asset(
        key=[config.pipeline, info.name],
        deps=[dg.AssetKey([config.pipeline, name]) for name in (*info.inputs, *JOINS.get(info.name, ()))],
        code_version=code_version,
        **_common(config, info),
    )
    def step(context: dg.AssetExecutionContext, rankd: RankdRun, mlflow: MlflowTracking) -> dg.MaterializeResult:
        with _clear_failures(context):
            spec = rankd.spec(config, site_of(context.instance, context.run.run_id))
            current = settings()
            artifact = run_step(
                info.name, spec, open_store(current), current, run_id=context.run.run_id, note=context.log.info
            )  # fmt: skip
            metadata = {**step_metadata(artifact), **_tracked(context, mlflow, artifact, spec)}
        return dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.version), metadata=metadata, tags=_tags(artifact, spec)
        )  # fmt: skip

    return step  # type: ignore[return-value]  (Dagster's overloads do not see through the keywords)


def _common(config: PipelineConfig, info: StepInfo) -> dict[str, Any]:
    return {
        "description": info.title, "group_name": config.pipeline, "owners": list(config.owners),
        "kinds": KINDS.get(info.name, {"python"}), "pool": pool_name(config.pipeline), "retry_policy": CRASH_RETRY,
    }  # fmt: skip


def _field_assets(config: PipelineConfig) -> list[dg.AssetsDefinition]:
    """What comes back from the field, and the challenger's shadow run: outside the nightly chain's eleven."""

    def key(name: str) -> dg.AssetKey:
        return dg.AssetKey([config.pipeline, name])

    @dg.asset(key=key("telemetry"), code_version=INFO["telemetry"].code_version, **_common(config, INFO["telemetry"]))
    def telemetry(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        from rankd_pipeline.steps.watch import field_spec, take_telemetry

        with _clear_failures(context):
            current = settings()
            store = open_store(current)
            spec = field_spec(config, store, current)
            artifact = take_telemetry(spec, store, current, context.run.run_id, context.log.info)
            return _result(artifact, spec)

    @dg.asset(
        key=key("drift_report"), deps=[key("telemetry")], code_version=INFO["drift_report"].code_version,
        **_common(config, INFO["drift_report"]),
    )  # fmt: skip
    def drift_report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        from rankd_pipeline.steps.watch import field_spec, report_drift

        with _clear_failures(context):
            current = settings()
            store = open_store(current)
            spec = field_spec(config, store, current)
            artifact = report_drift(spec, store, current, context.run.run_id, context.log.info)
            context.log.info(f"window {artifact.metrics['window']}: {artifact.metrics['why']}")
            return _result(artifact, spec)

    @dg.asset(
        key=key("shadow_run"), deps=[key("deployment"), key("telemetry")], code_version=INFO["shadow_run"].code_version,
        **_common(config, INFO["shadow_run"]),
    )  # fmt: skip
    def shadow_run(context: dg.AssetExecutionContext, rankd: RankdRun, mlflow: MlflowTracking) -> dg.MaterializeResult:
        from rankd_pipeline.steps.promotion import challenge

        with _clear_failures(context):
            spec = rankd.spec(config, site_of(context.instance, context.run.run_id))
            if spec.site is None:
                reason = "no site data in this run: its deployment was judged on the general test set alone"
                return dg.MaterializeResult(metadata={"skipped": reason})
            current = settings()
            store = open_store(current)
            artifact, entry = challenge(spec, store, current, context.run.run_id, context.log.info)
            store.note_use(artifact, context.run.run_id)
            context.log.info(f"version {entry.version}: {entry.event}, {entry.reason}")
            behind = reconcile(config.pipeline, current, mlflow.tracker(), context.instance, context.log_event)
            for name, text in behind.items():
                context.log.warning(f"{name} pending: {text}")
            return _result(artifact, spec, version=entry.version, decision=entry.event)

    return [telemetry, drift_report, shadow_run]  # type: ignore[return-value]  (as in _step_asset)


def _result(artifact: Artifact, spec: PipelineSpec, **metadata: Any) -> dg.MaterializeResult:
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.version), metadata={**step_metadata(artifact), **metadata}, tags=_tags(artifact, spec)
    )  # fmt: skip


def _tags(artifact: Artifact, spec: PipelineSpec) -> dict[str, str]:
    return {"rankd/scale": spec.scale, "rankd/seed": str(spec.seed), "rankd/variant": spec.variant, "rankd/recipe": artifact.recipe}


def _tracked(context: dg.AssetExecutionContext, mlflow: MlflowTracking, artifact: Artifact, spec: PipelineSpec) -> dict[str, Any]:
    """Log the artifact's model to MLflow; a deployment is first entered in the ledger, which the mirrors then follow."""
    tracker = mlflow.tracker()
    promoted = artifact.step == "deployment" and not artifact.skipped
    if promoted:
        _promote(context, artifact, spec)
    result = tracker.track(artifact, context.run.run_id, "/".join(context.asset_key.path))
    if result is None:
        return {}
    problems = [result.problem] if result.problem else []
    if promoted:
        behind = reconcile(spec.pipeline, settings(), tracker, context.instance, context.log_event)
        problems += [f"{name} pending: {text}" for name, text in behind.items() if text != result.problem]
    for text in problems:
        context.log.warning(f"not tracked: {text}")
    if result.problem:
        return {"mlflow": f"not tracked: {result.problem}"}
    links: dict[str, Any] = {"mlflow_run_id": result.run_id, "mlflow_run": dg.MetadataValue.url(result.url)}
    if result.model_version:
        links["mlflow_model_version"] = result.model_version
    return {**links, **({"mlflow": "not tracked: " + "; ".join(problems)} if problems else {})}


def _promote(context: dg.AssetExecutionContext, artifact: Artifact, spec: PipelineSpec) -> None:
    """Enter the bundle in the ledger, and say whether it serves."""
    from rankd_pipeline.steps.promotion import promote

    current = settings()
    entry = promote(spec, artifact, open_store(current), current, context.run.run_id)
    context.log.info(f"version {entry.version}: {entry.event}, {entry.reason}")


def _gate_check(config: PipelineConfig, step: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=dg.AssetKey([config.pipeline, step]),
        name="gates",
        blocking=True,
        description=f"The verdict of {step}. At smoke scale it is shown and does not block.",
        pool=pool_name(config.pipeline),
        retry_policy=CRASH_RETRY,
    )
    def gates(context: dg.AssetCheckExecutionContext, rankd: RankdRun) -> dg.AssetCheckResult:
        with _clear_failures(context):
            spec = rankd.spec(config, site_of(context.instance, context.run.run_id))
            artifact = resolve(step, spec, open_store(settings()))
            if artifact is None:
                raise RankdError(f"{config.pipeline}/{step}: not made yet at scale {spec.scale}; materialize it first.")
            return _judged(artifact, spec)

    return gates


def _judged(artifact: Artifact, spec: PipelineSpec) -> dg.AssetCheckResult:
    verdict = str(artifact.metrics.get("verdict"))
    try:
        require_passed(artifact, enforced=True)
        passed, text = True, f"{artifact.step}: verdict {verdict}"
    except GateStopped as stopped:
        passed, text = False, str(stopped)
    severity = dg.AssetCheckSeverity.ERROR if spec.enforced else dg.AssetCheckSeverity.WARN
    metadata: dict[str, Any] = {"verdict": verdict, "enforced": spec.enforced, "recipe": artifact.recipe}
    if artifact.metrics.get("gates"):
        metadata["gates"] = gates_table(artifact.metrics["gates"])
    return dg.AssetCheckResult(passed=passed, severity=severity, description=text, metadata=metadata)


@contextmanager
def _clear_failures(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> Iterator[None]:
    """One clear sentence for what a user can mend; a retry only where it can help."""
    try:
        with insistent_interrupts():
            yield
    except RankdError as error:
        metadata = {"exit_code": error.exit_code, "kind": type(error).__name__}
        raise dg.Failure(description=str(error), metadata=metadata, allow_retries=False) from error
    except dg.DagsterExecutionInterruptedError as error:  # Dagster takes it for a failure like others, and would try again
        raise dg.Failure(description="interrupted", metadata={"exit_code": INTERRUPTED}, allow_retries=False) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise dg.Failure(description=f"{type(error).__name__}: {error}", metadata={"exit_code": 1}, allow_retries=False) from error


def _champion(config: PipelineConfig) -> dg.AssetSpec:
    """What serves now: not made by a run of its own, but by a deployment that won."""
    return dg.AssetSpec(
        dg.AssetKey([config.pipeline, "champion"]),
        deps=[dg.AssetKey([config.pipeline, name]) for name in ("deployment", "shadow_run")],
        description="The deployed version that serves now; the ledger in the home is the truth, MLflow's alias mirrors it.",
        group_name=config.pipeline,
        owners=list(config.owners),
        kinds={"onnx"},
    )
