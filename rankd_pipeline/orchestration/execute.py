"""Runs a pipeline through the real Dagster instance, in a process of its own: what the CLI calls and the UI then shows.

The process apart keeps the terminal clean (its output goes to <home>/logs), and dies with the caller, however that ends.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from rankd_pipeline.errors import INTERRUPTED, RankdError
from rankd_pipeline.orchestration.lifeline import die_with_parent
from rankd_pipeline.orchestration.setup import initialise
from rankd_pipeline.settings import TELEMETRY_OFF, Settings, prepare_environment, settings

if TYPE_CHECKING:
    import dagster as dg

    from rankd_pipeline.spec import SiteData

Status = Literal["success", "stopped", "failed", "interrupted"]
State = Literal["started", "done", "cached", "failed", "gate", "note"]
LAUNCH_TAG = "rankd/launch"
DISK_FULL = ("No space left on device", "database or disk is full")  # of the file system, of SQLite
INTERRUPTED_TEXT = "what is finished is stored, run again to go on"


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    status: stopped means that a gate stopped it. message: one clear sentence unless it succeeded. seconds: by step, in
    this run. cached: steps that the store already held. exit_code: 0, or what `rankd run` should exit with.
    """

    run_id: str | None
    status: Status
    failed_step: str | None
    message: str
    seconds: dict[str, float] = field(default_factory=dict)
    cached: tuple[str, ...] = ()
    exit_code: int = 0


@dataclass(frozen=True)
class StepEvent:
    """What happened to a step; text is a sentence for notes, gates and failures."""

    step: str
    state: State
    text: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class _Request:
    pipeline: str
    scale: str
    seed: int
    variant: str
    steps: tuple[str, ...]
    in_process: bool
    launch: str
    site: str | None = None


# -- the caller's side (imports no Dagster) -----------------------------------------------------------------------------
def execute_chain(
    pipeline: str | Path,
    scale: str,
    seed: int,
    variant: str,
    settings: Settings,
    steps: Sequence[str] | None = None,
    in_process: bool | None = None,
    watch: Callable[[StepEvent], None] | None = None,
    site: "SiteData | None" = None,
) -> RunOutcome:
    """Materialize a pipeline's chain (or only `steps`) through Dagster and wait for it; with `site` its re-distillation.

    pipeline is a name, or a path to a YAML file with the same attributes. in_process: the steps share the run's process,
    which saves a second for each but keeps their memory; left open, they do where everything is stored already, and at
    smoke scale. A second call for the same pipeline waits for the first. watch gets the steps'
    events while they happen, from this thread; call it from the main thread, so that Ctrl-C reaches the run.

    Raises: RankdError for an unknown pipeline, scale or variant, or a home that cannot be set up.
    """
    from rankd_pipeline.spec import load_pipeline
    from rankd_pipeline.steps.runner import open_store, plan

    tell = watch or (lambda event: None)
    config = load_pipeline(pipeline)
    spec = config.at(scale, seed, variant, site)
    initialise(settings)
    with _one_at_a_time(settings, config.pipeline, tell):
        wanted = steps or ()
        stored = site is None and not any(row.runs for row in plan(spec, open_store(settings)) if not wanted or row.step in wanted)
        name = str(Path(pipeline).resolve()) if Path(pipeline).is_file() else str(pipeline)
        pinned = site.model_dump_json() if site is not None else None
        shared = in_process if in_process is not None else stored or scale == "smoke"
        request = _Request(name, scale, seed, variant, tuple(wanted), shared, uuid.uuid4().hex, pinned)
        return _supervise(request, settings, config.pipeline, tell)


@contextlib.contextmanager
def _one_at_a_time(current: Settings, pipeline: str, tell: Callable[[StepEvent], None]) -> Iterator[None]:
    """Two `rankd run` of a pipeline take turns; the kernel frees the lock of a killed one."""
    lock = FileLock(current.home / f".run-{pipeline}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(StepEvent("", "note", f"another run of {pipeline} is under way in {current.home}: waiting for it"))
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _supervise(request: _Request, current: Settings, pipeline: str, tell: Callable[[StepEvent], None]) -> RunOutcome:
    """Start the run's process, pass its events on, and return its outcome; a killed one is an outcome too."""
    log = current.home / "logs" / f"{pipeline}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    readable, writable = os.pipe()
    module = "rankd_pipeline.orchestration.execute"
    command = [sys.executable, "-m", module, json.dumps(asdict(request)), str(writable), str(os.getpid())]
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches the run once, from here, and its steps in order, from the run.
        process = subprocess.Popen(
            command, env=child_environment(current), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            pass_fds=(writable,), start_new_session=True,
        )  # fmt: skip
    os.close(writable)
    outcome: RunOutcome | None = None
    with open(readable, encoding="utf-8") as lines, process:
        try:
            for line in lines:
                message = json.loads(line)
                if message["kind"] == "outcome":
                    outcome = RunOutcome(**{**message["value"], "cached": tuple(message["value"]["cached"])})
                else:
                    tell(StepEvent(**message["value"]))
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C means now
                process.kill()
            return RunOutcome(None, "interrupted", None, INTERRUPTED_TEXT, exit_code=INTERRUPTED)
        except BaseException:
            process.kill()
            raise
    if outcome is not None:
        return outcome
    code = process.returncode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    message = f"the run's process {how}; what is finished is stored, run again to go on (its output: {log})"
    return RunOutcome(None, "failed", None, message, exit_code=1)


def child_environment(current: Settings) -> dict[str, str]:
    """The environment under which a child process sees these settings, with all telemetry off."""
    own = {
        "RANKD_HOME": str(current.home),
        "RANKD_STORE": current.store_uri if "://" in current.store_uri else str(Path(current.store_uri).absolute()),
        "RANKD_MLFLOW_URI": current.mlflow_uri,
        "RANKD_WORKERS": str(current.workers),
        "DAGSTER_HOME": str(current.dagster_home),
    }
    if current.postgres_url:
        own["RANKD_DAGSTER_POSTGRES_URL"] = current.postgres_url
    return {**os.environ, **TELEMETRY_OFF, **own}


# -- the run's own process ------------------------------------------------------------------------------------------------
def chain_job(pipeline: str, redistill: bool = False) -> "dg.JobDefinition":
    """The whole-chain job of a pipeline (or its re-distillation), by name or path; rebuilt in every step's process."""
    import dagster as dg

    from rankd_pipeline.orchestration.assets import build_pipeline
    from rankd_pipeline.orchestration.field import redistill_job_name
    from rankd_pipeline.orchestration.resources import common
    from rankd_pipeline.spec import load_pipeline

    config = load_pipeline(pipeline)
    return dg.Definitions.merge(build_pipeline(config), common()).resolve_job_def(
        redistill_job_name(config.pipeline) if redistill else config.pipeline
    )  # fmt: skip


def run_config(scale: str, seed: int, variant: str, in_process: bool = False) -> dict[str, Any]:
    """Dagster run configuration: what the Launchpad shows for the same run."""
    config: dict[str, Any] = {"resources": {"rankd": {"config": {"scale": scale, "seed": seed, "variant": variant}}}}
    if in_process:
        config["execution"] = {"config": {"in_process": True}}
    return config


def _execute(request: _Request, send: Callable[[str, dict[str, Any]], None]) -> RunOutcome:
    import dagster as dg

    from rankd_pipeline.orchestration.field import site_tags
    from rankd_pipeline.orchestration.liveness import process_tag, reap_orphans
    from rankd_pipeline.spec import SiteData, load_pipeline

    config = load_pipeline(request.pipeline)
    pipeline = config.pipeline
    job = dg.build_reconstructable_job(
        "rankd_pipeline.orchestration.execute", "chain_job",
        reconstructable_args=(request.pipeline,), reconstructable_kwargs={"redistill": request.site is not None},
    )  # fmt: skip
    selection = [dg.AssetKey([pipeline, step]) for step in request.steps] or None
    site = SiteData.model_validate_json(request.site) if request.site is not None else None
    pinned = site_tags(config, site, "by hand") if site is not None else {"rankd/pipeline": pipeline}
    tags = {LAUNCH_TAG: request.launch, **pinned, **process_tag()}
    with dg.DagsterInstance.get() as instance:
        reap_orphans(instance)
        with _Watcher(instance, request.launch, send) as watcher:
            launched = run_config(request.scale, request.seed, request.variant, request.in_process)
            run_id = dg.execute_job(job, instance, launched, tags=tags, asset_selection=selection).run_id
            watcher.finish(run_id)
        run = instance.get_run_by_id(run_id)
    return watcher.outcome(run_id, run.status if run else dg.DagsterRunStatus.FAILURE)


class _Watcher:
    """Reads a run's event log while it runs and sends what a person wants to know."""

    def __init__(self, instance: "dg.DagsterInstance", launch: str, send: Callable[[str, dict[str, Any]], None]) -> None:
        self._instance, self._launch, self._send = instance, launch, send
        self._cursor: str | None = None
        self._started: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._cached: set[str] = set()
        self._failure: tuple[str, str, int] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "_Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def finish(self, run_id: str) -> None:
        """Stop polling and read what is left."""
        self._stop.set()
        self._thread.join()
        self._read(run_id)

    def outcome(self, run_id: str, status: "dg.DagsterRunStatus") -> RunOutcome:
        """The run's outcome, from its status and what its events said."""
        common: dict[str, Any] = {"seconds": self._seconds, "cached": tuple(sorted(self._cached))}
        if status.value == "SUCCESS":
            return RunOutcome(run_id, "success", None, "", **common)
        ended = ("", INTERRUPTED_TEXT, INTERRUPTED) if status.value == "CANCELED" else ("", f"the run ended as {status.value}", 1)
        step, message, code = self._failure or ended
        if code == INTERRUPTED:
            return RunOutcome(run_id, "interrupted", None, INTERRUPTED_TEXT, **common, exit_code=code)
        return RunOutcome(run_id, "stopped" if code == 3 else "failed", step or None, message, **common, exit_code=code)

    def _poll(self) -> None:
        import dagster as dg

        run_id = None
        while not self._stop.wait(0.2):
            if run_id is None:
                runs = self._instance.get_runs(dg.RunsFilter(tags={LAUNCH_TAG: self._launch}), limit=1)
                run_id = runs[0].run_id if runs else None
            if run_id is not None:
                self._read(run_id)

    def _read(self, run_id: str) -> None:
        while True:
            found = self._instance.get_records_for_run(run_id, self._cursor)
            for record in found.records:
                self._note(record.event_log_entry)
            self._cursor = found.cursor
            if not found.has_more:
                return

    def _note(self, entry: Any) -> None:
        event = entry.dagster_event
        if event is None:
            if entry.step_key and 20 <= entry.level <= 30:  # a step's own notes and warnings; Dagster's errors have events
                self._tell(_step_name(entry.step_key), "note", entry.user_message)
            return
        step, kind = _step_name(event.step_key or ""), event.event_type_value
        is_check = (event.step_key or "").endswith("_gates")
        if kind in ("STEP_START", "STEP_RESTARTED") and not is_check:
            self._started[step] = entry.timestamp
            self._tell(step, "started")
        elif kind == "ASSET_MATERIALIZATION" and event.asset_key and event.asset_key.path[-1] == step:
            self._materialized(step, event, entry.timestamp)
        elif kind == "ASSET_CHECK_EVALUATION":
            self._checked(event.asset_check_evaluation_data)
        elif kind == "STEP_FAILURE":
            self._failed(step, event.step_failure_data)

    def _materialized(self, step: str, event: Any, timestamp: float) -> None:
        self._seconds[step] = round(timestamp - self._started.get(step, timestamp), 3)
        cached = event.materialization.metadata.get("cached")
        if cached is not None and cached.value:
            self._cached.add(step)
        self._tell(step, "cached" if step in self._cached else "done", seconds=self._seconds[step])

    def _checked(self, check: Any) -> None:
        step = check.asset_key.path[-1]
        self._tell(step, "gate", check.description or "")
        if not check.passed and check.severity.value == "ERROR":
            self._failure = self._failure or (step, check.description or "", 3)

    def _failed(self, step: str, data: Any) -> None:
        message, code = _failure_sentence(step, data)
        self._failure = self._failure or (step, message, code)
        if self._failure[0] == step:
            self._tell(step, "failed", self._failure[1])

    def _tell(self, step: str, state: State, text: str = "", seconds: float = 0.0) -> None:
        self._send("event", asdict(StepEvent(step, state, text, seconds)))


def _step_name(step_key: str) -> str:
    """`beam_management__teacher` and its check `beam_management__teacher_gates` -> `teacher`."""
    return step_key.rpartition("__")[2].removesuffix("_gates")


def _failure_sentence(step: str, data: Any) -> tuple[str, int]:
    """What went wrong, and the exit code: the step's own sentence where it had one."""
    from rankd_pipeline.orchestration.metadata import exit_code_of

    user = data.user_failure_data
    if user is not None:
        return user.description or f"{step} failed", exit_code_of(data) or 1
    error = data.error
    if error is not None and error.cls_name == "ChildProcessCrashException":
        return f"the process of {step} was killed (memory short?), twice; what is finished is stored, run again to go on", 1
    cause = error.cause or error if error is not None else None
    return (cause.message.strip() if cause is not None else f"{step} failed"), 1


def main() -> None:
    """What execute_chain starts, with the request, a file descriptor for events (JSON lines) and the caller's pid."""
    die_with_parent(int(sys.argv[3]))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
    prepare_environment()
    values = json.loads(sys.argv[1])
    request = _Request(**{**values, "steps": tuple(values["steps"])})
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8", buffering=1) as channel:
        guard = threading.Lock()

        def send(kind: str, value: dict[str, Any]) -> None:
            with guard:
                channel.write(json.dumps({"kind": kind, "value": value}) + "\n")

        try:
            outcome = _execute(request, send)
        except RankdError as error:
            outcome = RunOutcome(None, "failed", None, str(error), exit_code=error.exit_code)
        except Exception as error:
            if not any(text in str(error) for text in DISK_FULL):
                raise
            message = f"the disk of {settings().home} is full; what is finished is stored. Free space (`rankd gc`) and run again."
            outcome = RunOutcome(None, "failed", None, message, exit_code=2)
        send("outcome", asdict(outcome))


if __name__ == "__main__":
    main()
