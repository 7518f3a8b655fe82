"""What keeps a pipeline right in Dagster: field assets, the jobs that look and re-distill, and what starts them.

Sensors only read what is stored (steps/triggers.py decides); they import no torch and answer in well under a second.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.resources import MlflowTracking
from rankd_pipeline.settings import settings
from rankd_pipeline.spec import PipelineConfig, PipelineSpec, SensorSwitch, SiteData
from rankd_pipeline.steps.runner import open_store

SITE_TAG, JOB_TAG, WHY_TAG = "rankd/site", "rankd/job", "rankd/why"
REDISTILL = "redistill"
UNDER_WAY = [
    dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]  # fmt: skip
ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


def drift_job_name(pipeline: str) -> str:
    return f"{pipeline}_drift"


def redistill_job_name(pipeline: str) -> str:
    return f"{pipeline}_{REDISTILL}"


# -- what a run works on ------------------------------------------------------------------------------------------------
def site_of(instance: dg.DagsterInstance, run_id: str) -> SiteData | None:
    """The site data that a run was started for; every step of the run reads the same tag, whatever arrives meanwhile."""
    run = instance.get_run_by_id(run_id)
    text = run.tags.get(SITE_TAG) if run is not None else None
    return SiteData.model_validate_json(text) if text else None


def site_tags(config: PipelineConfig, site: SiteData | None, why: str) -> dict[str, str]:
    """Tags of a re-distillation."""
    tags = {"rankd/pipeline": config.pipeline, JOB_TAG: REDISTILL, WHY_TAG: why[:400]}
    return tags if site is None else {**tags, SITE_TAG: site.model_dump_json()}


def run_config_of(spec: PipelineSpec) -> dict[str, Any]:
    """Run configuration of a job under `spec`."""
    return {"resources": {"rankd": {"config": {"scale": spec.scale, "seed": spec.seed, "variant": spec.variant}}}}


# -- sensors and the schedule ---------------------------------------------------------------------------------------------
def telemetry_sensor(config: PipelineConfig, job: Any) -> dg.SensorDefinition:
    """New files in the telemetry folder start the drift job."""

    @dg.sensor(
        name=f"{config.pipeline}_telemetry", job=job, **_switch(config.sensors.telemetry),
        description="New telemetry files: take them in and judge the field.",
    )  # fmt: skip
    def look(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        from rankd_pipeline.steps.triggers import telemetry_tick

        with _told() as trouble:
            tick = telemetry_tick(config, settings(), context.cursor, _running(context.instance, job.name))
            if not tick.start:
                return dg.SensorResult(skip_reason=tick.why, cursor=tick.cursor)
            tags = {"rankd/pipeline": config.pipeline, WHY_TAG: tick.why[:400]}
            return dg.SensorResult(run_requests=[dg.RunRequest(tags=tags)], cursor=tick.cursor)
        return dg.SensorResult(skip_reason=trouble[0])

    return look


def drift_sensor(config: PipelineConfig, job: Any) -> dg.SensorDefinition:
    """A drift report that asks for it starts a re-distillation, once a window, with a cooldown."""

    @dg.sensor(
        name=f"{config.pipeline}_drift", job=job, **_switch(config.sensors.drift),
        description="Reads the newest drift report and re-distills the champion if it asks for that; says why when it does not.",
    )  # fmt: skip
    def look(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        import time

        from rankd_pipeline.steps.triggers import drift_tick
        from rankd_pipeline.steps.watch import field_spec

        with _told() as trouble:
            current = settings()
            store = open_store(current)
            running, failures = _running(context.instance, job.name), _failures(context.instance, job.name)
            tick = drift_tick(config, store, current, context.cursor, running, failures, time.time())
            if not tick.start:
                return dg.SensorResult(skip_reason=tick.why, cursor=tick.cursor)
            request = dg.RunRequest(
                run_key=tick.key, run_config=run_config_of(field_spec(config, store, current)),
                tags=site_tags(config, tick.site, tick.why),
            )  # fmt: skip
            return dg.SensorResult(run_requests=[request], cursor=tick.cursor)
        return dg.SensorResult(skip_reason=trouble[0])

    return look


def mirror_sensor(config: PipelineConfig) -> dg.SensorDefinition:
    """MLflow's aliases and the champion asset catch up with the ledger."""

    @dg.sensor(
        name=f"{config.pipeline}_mirrors", minimum_interval_seconds=60, default_status=dg.DefaultSensorStatus.RUNNING,
        description="Brings MLflow's aliases and the champion asset to what the ledger says, where they lag behind.",
    )  # fmt: skip
    def look(context: dg.SensorEvaluationContext, mlflow: MlflowTracking) -> dg.SensorResult:
        from rankd_pipeline.orchestration.mirrors import reconcile
        from rankd_pipeline.store.ledger import open_ledger

        with _told() as trouble:
            current = settings()
            pending = open_ledger(current, config.pipeline).pending() if current.serving_dir.is_dir() else {}
            if not pending:
                return dg.SensorResult(skip_reason="the mirrors show what the ledger says")
            events: list[dg.AssetMaterialization] = []
            left = reconcile(config.pipeline, current, mlflow.tracker(), context.instance, events.append, at_once=False)
            why = "; ".join(f"{name}: {text}" for name, text in left.items()) or f"caught up: {', '.join(pending)}"
            return dg.SensorResult(skip_reason=why, asset_events=events)
        return dg.SensorResult(skip_reason=trouble[0])

    return look


def nightly_schedule(config: PipelineConfig, job: Any) -> dg.ScheduleDefinition:
    """Every night: re-distill on what has come, or run the chain again where there is no telemetry."""

    @dg.schedule(
        name=f"{config.pipeline}_nightly", job=job, cron_schedule=config.schedule.cron,
        execution_timezone=config.schedule.timezone,
        default_status=dg.DefaultScheduleStatus.RUNNING if config.schedule.enabled else dg.DefaultScheduleStatus.STOPPED,
        description="Re-distills the champion on recent telemetry; without any, runs the chain: what is stored costs nothing.",
    )  # fmt: skip
    def nightly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        from rankd_pipeline.steps.triggers import recent_site
        from rankd_pipeline.steps.watch import field_spec

        with _told() as trouble:
            current = settings()
            store = open_store(current)
            site = recent_site(config, store, current)
            why = "nightly" if isinstance(site, SiteData) else f"nightly, without telemetry: {site}"
            tags = site_tags(config, site if isinstance(site, SiteData) else None, why)
            return dg.RunRequest(run_config=run_config_of(field_spec(config, store, current)), tags=tags)
        return dg.SkipReason(trouble[0])

    return nightly


def pin_site(instance: dg.DagsterInstance, run_id: str, tags: Mapping[str, str]) -> None:
    """Give a re-distillation that was started by hand in the UI the telemetry of this moment, for all of its steps."""
    if tags.get(JOB_TAG) != REDISTILL or SITE_TAG in tags or WHY_TAG in tags:
        return
    from rankd_pipeline.spec import load_pipeline
    from rankd_pipeline.steps.triggers import recent_site

    config, current = load_pipeline(tags["rankd/pipeline"]), settings()
    site = recent_site(config, open_store(current), current)
    known = site if isinstance(site, SiteData) else None
    why = "by hand" if known is not None else f"by hand, without telemetry: {site}"
    instance.add_run_tags(run_id, site_tags(config, known, why))


# -- helpers ----------------------------------------------------------------------------------------------------------------
def _switch(switch: SensorSwitch) -> dict[str, Any]:
    status = dg.DefaultSensorStatus.RUNNING if switch.enabled else dg.DefaultSensorStatus.STOPPED
    return {"minimum_interval_seconds": switch.interval_s, "default_status": status}


@contextmanager
def _told() -> Iterator[list[str]]:
    """What a user can mend becomes a reason to skip: a sentence in the UI, not a traceback every half minute."""
    trouble: list[str] = []
    try:
        yield trouble
    except RankdError as error:
        trouble.append(str(error))


def _running(instance: dg.DagsterInstance, job: str) -> str | None:
    """Run id of a run of this job that has not ended."""
    found = instance.get_run_records(dg.RunsFilter(job_name=job, statuses=UNDER_WAY), limit=1)
    return found[0].dagster_run.run_id if found else None


def _failures(instance: dg.DagsterInstance, job: str) -> list[str]:
    """What the last runs in a row failed with, newest first; empty after a success."""
    from rankd_pipeline.steps.triggers import MAX_FAILURES

    failures = []
    for record in instance.get_run_records(dg.RunsFilter(job_name=job, statuses=ENDED), limit=MAX_FAILURES):
        if record.dagster_run.status != dg.DagsterRunStatus.FAILURE:
            break
        failures.append(_sentence(instance, record.dagster_run.run_id) if not failures else record.dagster_run.run_id[:8])
    return failures


def _sentence(instance: dg.DagsterInstance, run_id: str) -> str:
    """The first step failure of a run in its own words."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        data = entry.dagster_event.step_failure_data if entry.dagster_event is not None else None
        if data is not None and data.user_failure_data is not None and data.user_failure_data.description:
            return data.user_failure_data.description
    return f"run {run_id[:8]}"
