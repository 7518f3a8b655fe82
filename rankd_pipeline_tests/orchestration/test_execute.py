"""execute_chain: a run through the real instance in a process of its own, kills at every level, who waits for whom."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml

from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.execute import RunOutcome, StepEvent, execute_chain
from rankd_pipeline.orchestration.liveness import PROCESS_TAG
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import load_pipeline, pipeline_files
from rankd_pipeline.steps.chain import CHAIN
from rankd_pipeline_tests.orchestration.planted import plant

PIPELINE = "beam_management"
STEPS = tuple(info.name for info in CHAIN)


def run(current: Settings, scale: str = "laptop", **options: object) -> tuple[RunOutcome, list[StepEvent]]:
    events: list[StepEvent] = []
    outcome = execute_chain(PIPELINE, scale, 0, "default", current, watch=events.append, **options)  # type: ignore[arg-type]
    return outcome, events


def cpu_seconds_of_children() -> float:
    """Of children that have ended: says what a run costs whatever else this host does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.get() as opened:
        yield opened


def test_a_stored_chain_takes_seconds_and_is_in_the_ui(home: Settings) -> None:
    made = plant(load_pipeline(PIPELINE).at("laptop"), home)
    assert run(home)[0].status == "success"  # tracks the planted models in MLflow, once
    before = cpu_seconds_of_children()
    outcome, events = run(home)
    assert cpu_seconds_of_children() - before < 12  # 4 s on a quiet core; `make run` may take 20 s
    assert (outcome.status, outcome.exit_code, outcome.failed_step, outcome.message) == ("success", 0, None, "")
    assert set(outcome.cached) == set(outcome.seconds) == set(STEPS)
    assert sorted(event.step for event in events if event.state == "cached") == sorted(STEPS)
    with instance() as opened:
        record = opened.get_run_by_id(str(outcome.run_id))
        assert record is not None and record.status == dg.DagsterRunStatus.SUCCESS
        assert (
            PROCESS_TAG in record.tags
            and record.tags["rankd/scale"] == "laptop"
            and record.run_config["resources"]["rankd"]["config"]["scale"] == "laptop"
        )
        event = opened.get_latest_materialization_event(dg.AssetKey([PIPELINE, "deployment"]))
        assert event is not None and event.asset_materialization is not None
        metadata = event.asset_materialization.metadata
        assert metadata["mlflow_model_version"].value == "1"
        assert event.asset_materialization.tags["rankd/recipe"] == made["deployment"].recipe  # type: ignore[index]
    assert leftovers() == []


def test_a_gate_ends_the_run_with_exit_code_3_and_what_to_do(home: Settings) -> None:
    plant(load_pipeline(PIPELINE).at("laptop"), home, {"calibration_scorecard": "fail"})
    outcome, events = run(home)
    assert (outcome.status, outcome.exit_code, outcome.failed_step) == ("stopped", 3, "calibration_scorecard")
    assert "margin" in outcome.message and "more labels" in outcome.message
    assert [event.text for event in events if event.step == "calibration_scorecard" and event.state == "gate"] == [outcome.message]


def test_a_step_alone_past_a_failed_gate_is_refused(home: Settings) -> None:
    plant(load_pipeline(PIPELINE).at("laptop"), home, {"calibration_scorecard": "fail"}, upto="soft_labels")
    outcome, _ = run(home, steps=["student"], in_process=True)
    assert (outcome.status, outcome.exit_code, outcome.failed_step) == ("stopped", 3, "student")


@pytest.mark.parametrize(
    ("pipeline", "scale", "variant", "named"),
    [("nope", "laptop", "default", "nope"), (PIPELINE, "huge", "default", "huge"), (PIPELINE, "laptop", "nope", "nope")],
)
def test_bad_arguments_are_refused_before_anything_starts(
    home: Settings, pipeline: str, scale: str, variant: str, named: str
) -> None:
    with pytest.raises(RankdError, match=named):
        execute_chain(pipeline, scale, 0, variant, home)
    with instance() as opened:
        assert opened.get_runs_count() == 0


def test_a_yaml_file_of_one_s_own_runs_by_its_path(home: Settings, tmp_path: Path) -> None:
    document = yaml.safe_load(pipeline_files()[PIPELINE].read_text())
    document["attributes"].update(pipeline="beams_west")
    path = tmp_path / "west.yaml"
    path.write_text(yaml.safe_dump(document))
    plant(load_pipeline(path).at("laptop"), home)
    outcome = execute_chain(path, "laptop", 0, "default", home)
    assert outcome.status == "success", outcome.message
    with instance() as opened:
        assert opened.get_latest_materialization_event(dg.AssetKey(["beams_west", "deployment"])) is not None


def test_two_at_once_take_turns_and_say_so(home: Settings) -> None:
    plant(load_pipeline(PIPELINE).at("laptop"), home)
    outcomes: list[tuple[RunOutcome, list[StepEvent]]] = []
    threads = [threading.Thread(target=lambda: outcomes.append(run(home))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.status for outcome, _ in outcomes] == ["success", "success"]
    waits = [event.text for _, events in outcomes for event in events if event.state == "note" and not event.step]
    assert len(waits) == 1 and "another run of beam_management is under way" in waits[0]


SLOW = """
import sys
from rankd_pipeline.orchestration.execute import execute_chain
from rankd_pipeline.settings import prepare_environment
outcome = execute_chain(sys.argv[1], "smoke", 0, "default", prepare_environment(), steps=["corpus"], in_process=False,
                        watch=lambda event: print(event.step, event.state, flush=True))
print("OUTCOME", outcome.status, outcome.exit_code, outcome.message, flush=True)
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A pipeline whose corpus is real and small: seconds, most of them imports."""
    document = yaml.safe_load(pipeline_files()[PIPELINE].read_text())
    simulation = {"seen_samples": 400, "heldout_site_samples": 40, "heldout_band_samples": 40, "shard_samples": 256}
    document["attributes"].update(pipeline="tiny", scales={"smoke": {"corpus": {"simulation": simulation}}})
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@contextlib.contextmanager
def running_corpus(pipeline: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A caller whose corpus step has just started, and [the run's process, the step's process]."""
    caller = subprocess.Popen([sys.executable, "-c", SLOW, str(pipeline)], stdout=subprocess.PIPE, text=True)
    try:
        assert caller.stdout is not None
        assert caller.stdout.readline().split() == ["corpus", "started"]
        (run_process,) = [item for item in psutil.Process(caller.pid).children() if "execute" in " ".join(item.cmdline())]
        yield caller, [run_process, _step_process(run_process)]
    finally:
        caller.kill()
        caller.wait()


def _step_process(run_process: psutil.Process) -> psutil.Process:
    """The run's grandchild: run -> forkserver -> step."""
    servers = [child for child in run_process.children() if "forkserver" in " ".join(child.cmdline())]
    (step,) = [grandchild for server in servers for grandchild in server.children()]
    return step


def gone(processes: list[psutil.Process], within_s: float = 10.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return not [item for item in alive if item.is_running() and item.status() != psutil.STATUS_ZOMBIE]


def leftovers() -> list[str]:
    found = psutil.Process().children(recursive=True)
    return [" ".join(item.cmdline())[:80] for item in found if "execute" in " ".join(item.cmdline())]


@pytest.mark.parametrize("victim", ["caller", "run"])
def test_kill_9_leaves_no_process_and_the_next_run_goes_on(home: Settings, tiny: Path, victim: str) -> None:
    with running_corpus(tiny) as (caller, processes):
        tree = [*processes, *processes[0].children(recursive=True)]
        os.kill(caller.pid if victim == "caller" else processes[0].pid, signal.SIGKILL)
        assert gone(tree)
        if victim == "run":
            assert caller.stdout is not None
            assert "was killed by signal 9" in caller.stdout.read()
    with instance() as opened:
        (killed,) = opened.get_runs()
        assert killed.status == dg.DagsterRunStatus.STARTED  # nobody was left to say so
        outcome = execute_chain(tiny, "smoke", 0, "default", home, steps=["corpus"], in_process=True)
        assert outcome.status == "success", outcome.message
        reaped = opened.get_run_by_id(killed.run_id)
        assert reaped is not None and reaped.status == dg.DagsterRunStatus.FAILURE


def test_kill_9_of_a_step_is_made_good_by_a_second_attempt(home: Settings, tiny: Path) -> None:
    with running_corpus(tiny) as (caller, processes):
        os.kill(processes[1].pid, signal.SIGKILL)
        assert caller.stdout is not None
        output = caller.stdout.read()
    assert "corpus started" in output  # again
    assert "corpus done" in output and "OUTCOME success 0" in output


def test_ctrl_c_ends_the_run_and_says_so(home: Settings, tiny: Path) -> None:
    with running_corpus(tiny) as (caller, processes):
        caller.send_signal(signal.SIGINT)
        assert caller.stdout is not None
        assert "OUTCOME interrupted 130" in caller.stdout.read()
        assert gone(processes)
    with instance() as opened:
        (record,) = opened.get_runs()
        assert record.is_finished
