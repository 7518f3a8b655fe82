"""From a pipeline's configuration to Dagster definitions: eleven assets, their gates as checks, a job, a schedule."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg

from rankd_pipeline.errors import GateStopped, RankdError
from rankd_pipeline.orchestration.metadata import gates_table, step_metadata
from rankd_pipeline.orchestration.mirrors import reconcile
from rankd_pipeline.orchestration.resources import MlflowTracking, RankdRun
from rankd_pipeline.orchestration.setup import pool_name
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import settings
from rankd_pipeline.spec import PipelineConfig, PipelineSpec
from rankd_pipeline.steps.chain import CHAIN, GATED, StepInfo
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
}
CRASH_RETRY = dg.RetryPolicy(max_retries=1, delay=1)
"""For a step whose process died or whose disk or network failed. Anything else would only fail again."""


def build_pipeline(config: PipelineConfig) -> dg.Definitions:
    """The definitions of one pipeline, without resources and executor (see `resources.common`)."""
    job = dg.define_asset_job(
        config.pipeline,
        selection=dg.AssetSelection.assets(*[[config.pipeline, info.name] for info in CHAIN]),
        description=f"The whole chain of {config.title or config.pipeline}: what is stored costs nothing.",
        tags={"rankd/pipeline": config.pipeline},
    )
    return dg.Definitions(
        assets=[*(_step_asset(config, info) for info in CHAIN), _champion(config)],
        asset_checks=[_gate_check(config, step) for step in GATED],
        jobs=[job],
        schedules=[_schedule(config, job)],
    )


def _step_asset(config: PipelineConfig, info: StepInfo) -> dg.AssetsDefinition:
    facets = load_function(config.function).code_versions
    code_version = "+".join([info.code_version, *(f"{facet}={facets.get(facet, '0')}" for facet in info.facets)])

    @dg.asset(
        key=[config.pipeline, info.name],
        deps=[dg.AssetKey([config.pipeline, name]) for name in info.inputs],
        code_version=code_version,
        description=info.title,
        group_name=config.pipeline,
        owners=list(config.owners),
        kinds=KINDS.get(info.name, {"python"}),
        pool=pool_name(config.pipeline),
        retry_policy=CRASH_RETRY,
    )
    def step(context: dg.AssetExecutionContext, rankd: RankdRun, mlflow: MlflowTracking) -> dg.MaterializeResult:
        with _clear_failures(context):
            spec = rankd.spec(config)
            current = settings()
            artifact = run_step(
                info.name, spec, open_store(current), current, run_id=context.run.run_id, note=context.log.info
            )  # fmt: skip
            metadata = {**step_metadata(artifact), **_tracked(context, mlflow, artifact, spec)}
        return dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.version), metadata=metadata, tags=_tags(artifact, spec)
        )  # fmt: skip

    return step


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
            spec = rankd.spec(config)
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
        yield
    except RankdError as error:
        metadata = {"exit_code": error.exit_code, "kind": type(error).__name__}
        raise dg.Failure(description=str(error), metadata=metadata, allow_retries=False) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise dg.Failure(description=f"{type(error).__name__}: {error}", metadata={"exit_code": 1}, allow_retries=False) from error


def _champion(config: PipelineConfig) -> dg.AssetSpec:
    """What serves now: not made by a run of its own, but by a deployment that won."""
    return dg.AssetSpec(
        dg.AssetKey([config.pipeline, "champion"]),
        deps=[dg.AssetKey([config.pipeline, "deployment"])],
        description="The deployed version that serves now; the ledger in the home is the truth, MLflow's alias mirrors it.",
        group_name=config.pipeline,
        owners=list(config.owners),
        kinds={"onnx"},
    )


def _schedule(config: PipelineConfig, job: object) -> dg.ScheduleDefinition:
    schedule = config.schedule
    return dg.ScheduleDefinition(
        name=f"{config.pipeline}_nightly",
        target=job,  # type: ignore[arg-type]
        cron_schedule=schedule.cron,
        execution_timezone=schedule.timezone,
        default_status=dg.DefaultScheduleStatus.RUNNING if schedule.enabled else dg.DefaultScheduleStatus.STOPPED,
        description="Runs the whole chain: unchanged steps are taken from the store.",
        tags={"rankd/pipeline": config.pipeline},
    )
