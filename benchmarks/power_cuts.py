"""kill -9 under the real daemon, at every step of a re-distillation: the run, the daemon, and everything at once.

`python -m benchmarks.power_cuts` (some twenty minutes, most of it waiting) sets up a home with a copy of this package whose
YAML asks for a small corpus and a nightly of every minute. The cron tick starts the first re-distillation; each step is then
killed in each way while it works, the next run goes on from what is stored, and at the end the books are checked: nothing made
twice, one decision, no run twice in MLflow, pools free. Writes benchmarks/results/power_cuts.md (not where `--steps` or `--ways`
asks for a part, as for a step that was over before it could be killed); exit code 1 if a check fails.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml

from rankd_pipeline.orchestration.field import SITE_TAG, WHY_TAG
from rankd_pipeline.orchestration.liveness import PROCESS_TAG
from rankd_pipeline.progress import read_progress
from rankd_pipeline.settings import Settings, prepare_environment
from rankd_pipeline.spec import deep_merge
from rankd_pipeline.steps.chain import CHAIN
from rankd_pipeline.steps.runner import host_id, open_store
from rankd_pipeline.store.ledger import open_ledger
from rankd_pipeline.tracking.mlflow import RECIPE_TAG
from rankd_pipeline_tests.orchestration.servers import PIPELINE, REPOSITORY, Servers

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks") / "results" / "power_cuts.md"
MEASURED = ("latency_profile", "deployment", "shadow_run")
"""What is measured has no second time: made again it would differ, and all behind it with it. These are killed first."""
STEPS = [*MEASURED, *(info.name for info in CHAIN if info.name not in MEASURED)]
WAYS = ("run", "daemon", "everything")
JOB = f"{PIPELINE}_redistill"
RUN = """
query Run($id: ID!) { runOrError(runId: $id) { ... on Run { status tags { key value } } } }"""
RUNS = """
query Runs($job: String!) {
  runsOrError(filter: {pipelineName: $job}) { ... on Runs { results { runId status tags { key value } } } }
}"""
POOLS = "{ instance { concurrencyLimits { activeSlotCount pendingStepCount } } }"
SWITCH_ON = """
mutation On($selector: ScheduleSelector!) {
  startSchedule(scheduleSelector: $selector) { ... on ScheduleStateResult { scheduleState { id } } }
}"""
OVER = ("SUCCESS", "FAILURE", "CANCELED")


# -- a home with a small pipeline -------------------------------------------------------------------------------------------
def lay_out(home: Path) -> Path:
    """A copy of the packages whose beam management is small at `laptop` scale, as somebody edits the YAML; its folder."""
    tree = home / "tree"
    for name in ("rankd_pipeline", "rankd_pipeline_tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = tree / "rankd_pipeline" / "defs" / PIPELINE / "defs.yaml"
    document = yaml.safe_load(path.read_text())
    attributes = document["attributes"]
    small = deep_merge(attributes["scales"]["smoke"], {"corpus": {"simulation": {"seen_samples": 4000}}})
    # One epoch of everything passes no gate, and gates are no matter here.
    attributes |= {"gates": {}, "scales": {"laptop": small}}
    path.write_text(yaml.safe_dump(document))
    set_cron(tree, "* * * * *")
    return tree


def set_cron(tree: Path, cron: str) -> None:
    path = tree / "rankd_pipeline" / "defs" / PIPELINE / "defs.yaml"
    document = yaml.safe_load(path.read_text())
    document["attributes"]["schedule"] = {"cron": cron, "timezone": "UTC"}
    path.write_text(yaml.safe_dump(document))


def rankd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "rankd_pipeline.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def field_that_drifted(current: Settings) -> None:
    """A champion, its calm field, and a shift of it that has been judged."""
    if open_ledger(current, PIPELINE).champion() is None:
        rankd("run", PIPELINE, "--scale", "laptop")
    rankd("field", PIPELINE, "--hours", "6", "--rows", "1000", "--seed", "1")
    rankd("field", PIPELINE, "--hours", "3", "--rows", "1500", "--labelled", "0.6", "--seed", "2", "--shift", "broken_beam")
    rankd("drift", PIPELINE)


def pid_of(state: dict[str, Any]) -> int | None:
    """The run's process, once it says which it is."""
    return json.loads(state["tags"][PROCESS_TAG])["pid"] if PROCESS_TAG in state["tags"] else None


# -- one trial -----------------------------------------------------------------------------------------------------------------
class Trials:
    """The servers of the home, the run under way, and what was seen."""

    def __init__(self, current: Settings) -> None:
        self.current, self.started = current, 0
        self.first = {artifact.recipe for step in STEPS for artifact in open_store(current).artifacts(PIPELINE, step)}
        self.server = self._serve()
        self.rows: list[tuple[str, str, str, float]] = []
        self.run = self.site = ""
        self.pid: int | None = None

    def _serve(self) -> Servers:
        self.started += 1
        return Servers(self.current, self.current.home / f"ui-{self.started}.log")

    def state(self) -> dict[str, Any]:
        found = self.server.graphql(RUN, id=self.run)["runOrError"]
        return {"status": found["status"], "tags": {tag["key"]: tag["value"] for tag in found["tags"]}}

    def from_cron(self) -> None:
        """Wait for the nightly's own tick; then set it to a time far off, so that it starts no other run beside the trials."""
        selector = {**REPOSITORY, "scheduleName": f"{PIPELINE}_nightly"}
        began = time.monotonic()
        self.server.graphql(SWITCH_ON, selector=selector)

        def ticked() -> str:
            runs = self.server.graphql(RUNS, job=JOB)["runsOrError"]["results"]
            return next((run["runId"] for run in runs if {"key": WHY_TAG, "value": "nightly"} in run["tags"]), "")

        self.run = self.server.until(ticked, 150)
        self.site = self.state()["tags"][SITE_TAG]  # every later run goes on with what this one was started for
        self.rows.append(("nightly", "its cron tick", "started the job", time.monotonic() - began))
        self.say()
        self.server.stop()
        set_cron(ROOT, "0 0 29 2 *")
        self.server = self._serve()

    def say(self) -> None:
        step, way, outcome, seconds = self.rows[-1]
        print(f"{step}, {way}: {outcome} ({seconds:.0f} s)", flush=True)

    def again(self) -> None:
        """The run that goes on: one under way, Dagster's own retry of a crashed run, or a new one on the same telemetry."""
        retried = bool(self.run) and "dagster/parent_run_id" in self.state()["tags"]  # a retry that crashes is not tried again
        end = time.monotonic() + (0 if retried else 45)
        while True:
            runs = self.server.graphql(RUNS, job=JOB)["runsOrError"]["results"]
            if waiting := [run["runId"] for run in runs if run["status"] not in OVER]:
                self.run = self.run if self.run in waiting else waiting[-1]
                return
            if time.monotonic() > end:
                break
            time.sleep(1)
        tags = {SITE_TAG: self.site, WHY_TAG: "the next run after a cut"}
        self.run = self.server.start(JOB, "laptop", tags=tags)

    def settled(self) -> None:
        """Wait until no run is under way; a retry that Dagster queued meanwhile finds everything stored."""
        self.server.until(
            lambda: all(run["status"] in OVER for run in self.server.graphql(RUNS, job=JOB)["runsOrError"]["results"]), 1800
        )

    def reach(self, step: str) -> bool:
        """Wait until the step is at work, as its progress file tells at once; False if the run was over before."""
        end, looked = time.monotonic() + 240, time.monotonic()
        self.pid = None
        while time.monotonic() < end:
            if any(state["step"] == step for state in read_progress(self.current.progress_dir, PIPELINE)):
                return True
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                state = self.state()
                self.pid = pid_of(state)
                if state["status"] in OVER:
                    return False
            time.sleep(0.01)
        raise AssertionError(f"{step} was not reached in 240 s")

    def forget(self, step: str) -> None:
        """Take what the re-distillation made of a step out of the store, so that the next run makes it again, to the same bytes."""
        for artifact in open_store(self.current).artifacts(PIPELINE, step):
            if artifact.recipe not in self.first:
                shutil.rmtree(artifact.path)

    def cut(self, step: str, way: str) -> None:
        self.again()
        reached = self.reach(step)
        if not reached and step not in MEASURED:
            self.settled()
            self.forget(step)
            self.again()
            reached = self.reach(step)
        if not reached:
            self.rows.append((step, way, "over before it could be killed", 0.0))
            return self.say()
        entries = len(open_ledger(self.current, PIPELINE).entries())
        began = time.monotonic()
        self._kill(way)
        status = self.server.until(lambda: found if (found := self.state()["status"]) in OVER else "", 240)
        assert status in ("FAILURE", "CANCELED", "SUCCESS"), status
        outcome = f"run {status}, next run goes on"
        assert len(open_ledger(self.current, PIPELINE).entries()) - entries in (0, 1), "half a promotion"
        self.again()
        self.server.until(lambda: self.state()["status"] in ("STARTED", *OVER), 120)
        self.rows.append((step, way, outcome, time.monotonic() - began))
        self.say()

    def _kill(self, way: str) -> None:
        if way == "run":
            pid = self.pid or pid_of(self.state())
            assert pid, "the run says no process"
            return os.kill(pid, signal.SIGKILL)
        if way == "everything":
            self.server.kill()
        else:
            children = psutil.Process(self.server.process.pid).children(recursive=True)
            (daemon,) = [item for item in children if "dagster._daemon" in item.cmdline()]
            daemon.kill()
            self.server.process.wait(90)  # `rankd ui` ends with it and says so
        self.server = self._serve()


# -- the books -----------------------------------------------------------------------------------------------------------------
def checks(trials: Trials) -> dict[str, bool]:
    from mlflow import MlflowClient

    current = trials.current
    store = open_store(current)
    made = {step: len(list(store.artifacts(PIPELINE, step))) for step in STEPS}
    events = [(entry.event, entry.version) for entry in open_ledger(current, PIPELINE).entries()]
    pools = trials.server.graphql(POOLS)["instance"]["concurrencyLimits"]
    client = MlflowClient(current.mlflow_uri)
    runs = client.search_runs([item.experiment_id for item in client.search_experiments()], max_results=1000)
    tracked = Counter(run.data.tags[RECIPE_TAG] for run in runs if RECIPE_TAG in run.data.tags)
    print(f"artifacts {made}; ledger {events}; MLflow runs {len(runs)}", flush=True)
    return {
        "the last run ends in SUCCESS": trials.state()["status"] == "SUCCESS",
        "every step has one artifact of the first chain and at most one of the re-distillation": max(made.values()) <= 2,
        "one decision: registered once, promoted or refused once": [event for event, _ in events[:3]]
        == ["registered", "champion", "registered"] and len(events) == 4 and events[3][0] in ("champion", "refused"),
        "no run is in MLflow twice": bool(tracked) and max(tracked.values()) == 1,
        "pools are free": not any(pool["activeSlotCount"] or pool["pendingStepCount"] for pool in pools),
    }  # fmt: skip


def run(current: Settings, steps: list[str], ways: list[str]) -> bool:
    field_that_drifted(current)
    trials = Trials(current)
    try:
        trials.from_cron()
        for step in steps:
            for way in ways:
                trials.cut(step, way)
        trials.settled()
        found = checks(trials)
    finally:
        trials.server.stop()
    lines = ["| step | killed | what came of it | seconds until the next run was under way |", "|---|---|---|---|"]
    lines += [f"| {step} | {way} | {outcome} | {seconds:.0f} |" for step, way, outcome, seconds in trials.rows]
    lines += ["", *(f"- {'PASS' if held else 'FAIL'}: {what}" for what, held in found.items())]
    head = (
        f"# kill -9 at every step, under the daemon\n\n`python -m benchmarks.power_cuts`, {host_id()}, {datetime.date.today()}\n\n"
    )
    (ROOT / RESULTS).write_text(head + "\n".join(lines) + "\n")
    print("\n".join(lines))
    return all(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="*", default=STEPS, choices=STEPS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    options = parser.parse_args()
    if ROOT.name == "tree":  # the copy
        sys.exit(0 if run(prepare_environment(), options.steps, options.ways) else 1)
    with tempfile.TemporaryDirectory() as folder:
        tree = lay_out(Path(folder))
        environment = {**os.environ, "PYTHONPATH": str(tree), "RANKD_HOME": f"{folder}/home", "PYTHONWARNINGS": "ignore"}
        (Path(folder) / "home").mkdir()
        command = [sys.executable, "-m", "benchmarks.power_cuts", "--steps", *options.steps, "--ways", *options.ways]
        done = subprocess.run(command, cwd=tree, env=environment)
        if (written := tree / RESULTS).exists() and options.steps == STEPS and options.ways == list(WAYS):
            shutil.copy(written, ROOT / RESULTS)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
