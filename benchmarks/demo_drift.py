"""The whole loop in one go, unattended: a champion, its field, a shift, detection, re-distillation, promotion, and the scores.

`make demo-drift` runs it in a home of its own. The real daemon does the work: this script plays the field (`rankd field`),
switches the sensors on as the UI does, waits, and measures. It writes `demo.png` and `demo.json` into the home.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankd_pipeline.cli.field import following_hour
from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.evaluation.table import concat_tables
from rankd_pipeline.progress import read_progress
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.report.figures import ACCENT, BAD, GOOD, new_figure, png
from rankd_pipeline.runtime.bundle import load_bundle
from rankd_pipeline.settings import Settings, prepare_environment
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.runner import open_store
from rankd_pipeline.steps.watch import current_report
from rankd_pipeline.store.ledger import Entry, open_ledger
from rankd_pipeline.telemetry.field import Play, play, simulated

REPOSITORY = {"repositoryName": "__repository__", "repositoryLocationName": "rankd_pipeline.definitions"}
SWITCH = """
mutation Switch($selector: SensorSelector!) {
  startSensor(sensorSelector: $selector) { __typename ... on PythonError { message } }
}"""
CALM_HOURS, AFTER_HOURS = 6, 3
MEASURE_SEED = 20_261_126


class Demo:
    """One loop: what is played, what was seen when."""

    def __init__(self, options: argparse.Namespace, current: Settings) -> None:
        self.options, self.current = options, current
        self.config = load_pipeline(options.pipeline)
        self.pipeline = self.config.pipeline
        self.ledger = open_ledger(current, self.pipeline)
        self.began = time.monotonic()
        self.seen: dict[str, float] = {}
        self.seed = 0

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def rankd(self, *arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "rankd_pipeline.cli", *arguments], check=True)

    def field(self, hours: int, rows: int, *shifts: str) -> list[Path]:
        """Play the next hours (every call simulates other users) beside the telemetry folder; `deliver` puts them there."""
        self.seed += 1
        bundle, options = self.ledger.bundle, self.options
        assert bundle is not None
        steps = self.config.at(variant=options.variant).steps
        start_s = following_hour(self.current.telemetry_dir(self.pipeline), None)
        wanted = Play(bundle, frozenset(shifts), hours, rows, options.labelled, self.seed, start_s)
        function, budget_us = load_function(self.config.function), steps.latency_profile.budget_us
        return play(function, steps.corpus.simulation, budget_us, wanted, self.current.home / "played", self.current.workers)

    def deliver(self, files: Sequence[Path]) -> None:
        """What a collector does at the end of some hours: all of their files come at once."""
        folder = self.current.telemetry_dir(self.pipeline)
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            path.rename(folder / path.name)

    def report(self) -> dict[str, Any] | None:
        found = current_report(self.pipeline, open_store(self.current), self.current)
        return json.loads(found.file("drift.json").read_text()) if found is not None else None

    def wait(self, what: str, done: Callable[[], Any], seconds: float) -> Any:
        """Poll until `done` says something true; the daemon's steps are told as they come."""
        end, step = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            running = read_progress(self.current.progress_dir, self.pipeline)
            if running and running[-1]["step"] != step:
                step = running[-1]["step"]
                self.say(f"  {step} runs")
            found = done()
            if found:
                self.seen[what] = time.monotonic()
                self.say(what)
                return found
            time.sleep(1.0)
        raise SystemExit(
            f"demo: gave up after {seconds:.0f} s waiting for: {what} (the daemon's log: {self.current.home / 'ui.log'})"
        )


def run(options: argparse.Namespace, current: Settings) -> None:
    demo = Demo(options, current)
    if demo.ledger.champion() is None:
        demo.say(f"a champion first: rankd run {demo.pipeline} --variant {options.variant} (only the first time)")
        demo.rankd("run", demo.pipeline, "--variant", options.variant)
    champion = demo.ledger.champion()
    assert champion is not None
    demo.say(f"v{champion.version} serves; its field is calm")
    with daemon(demo):
        demo.deliver(demo.field(CALM_HOURS, options.rows // 3))
        demo.wait("the calm field is judged", lambda: _judged(demo.report()), 300)
        demo.say(f"the field shifts: {options.shift}; {options.hours} hours of it are played")
        files = demo.field(options.hours, options.rows, options.shift)
        shifted = time.monotonic()
        demo.deliver(files)
        demo.say("their telemetry arrives: from here on the clock runs")
        drift = demo.wait("detected", lambda: _drifted(demo.report()), 300)
        demo.say(f"window {drift['key']}: {drift['why']}")
        last = len(demo.ledger.entries())
        decided = demo.wait("decided", lambda: _decided(demo, last), 3600)
        demo.say(f"v{decided.version}: {decided.event}, {decided.reason}")
        took = time.monotonic() - shifted
        demo.deliver(demo.field(AFTER_HOURS, options.rows, options.shift))
        demo.wait("the new champion is judged", lambda: _all_judged(demo.report(), CALM_HOURS + options.hours + AFTER_HOURS), 300)
    outcome = measure(demo, champion)
    outcome |= {
        "seconds_from_shift_to_decision": took, "detected_after_s": demo.seen["detected"] - shifted, "event": decided.event,
        "reason": decided.reason, "load_average": os.getloadavg()[2],
    }  # fmt: skip
    outcome["labelled_rows"] = {name: mean for name, (_, _, mean) in phases(demo).items()}
    (current.home / "demo.json").write_text(json.dumps(outcome, indent=1) + "\n")
    (current.home / "demo.png").write_bytes(picture(demo, decided.event))
    demo.say(f"from shift to decision: {took:.0f} s (detected after {outcome['detected_after_s']:.0f} s)")
    for name in ("before", "during", "after", "lost", "gain"):
        demo.say(f"{name}: {outcome[name]['value']:.4f} [{outcome[name]['ci95'][0]:.4f}, {outcome[name]['ci95'][1]:.4f}]")
    demo.say(f"on the labelled rows of the field: {outcome['labelled_rows']}")
    demo.say(f"regained: {outcome['regained']:.0%} of what the shift had cost; plot: {current.home / 'demo.png'}")


# -- the daemon ---------------------------------------------------------------------------------------------------------------
class daemon:
    """`rankd ui` with both sensors switched on; ended in order."""

    def __init__(self, demo: Demo) -> None:
        self.demo = demo
        self.port, self.mlflow_port = _free_port(), _free_port()

    def __enter__(self) -> "daemon":
        log = self.demo.current.home / "ui.log"
        command = [
            sys.executable,
            "-m",
            "rankd_pipeline.cli",
            "ui",
            "--port",
            str(self.port),
            "--mlflow-port",
            str(self.mlflow_port),
        ]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)
        self.demo.wait("the daemon is up", lambda: "Ctrl-C stops both" in log.read_text(errors="replace"), 240)
        for name in ("telemetry", "drift"):
            selector = {**REPOSITORY, "sensorName": f"{self.demo.pipeline}_{name}"}
            answer = self.graphql(SWITCH, selector=selector)["startSensor"]
            assert answer["__typename"] == "Sensor", answer
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["data"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# -- what is waited for ---------------------------------------------------------------------------------------------------------
def _judged(report: Mapping[str, Any] | None) -> bool:
    return report is not None and any(window["state"] == "judged" for window in report["windows"])


def _drifted(report: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    windows = report["windows"] if report is not None else []
    return next((window for window in windows if window.get("action") == "redistill"), None)


def _decided(demo: Demo, known: int) -> Entry | None:
    return next((entry for entry in demo.ledger.entries()[known:] if entry.event in ("champion", "refused")), None)


def _all_judged(report: Mapping[str, Any] | None, windows: int) -> bool:
    """Whether all windows are in the report, and the last ones were held against what is normal now."""
    found = report["windows"] if report is not None else []
    return len(found) >= windows and all(window["state"] == "judged" for window in found[-AFTER_HOURS:])


# -- the scores -------------------------------------------------------------------------------------------------------------------
def measure(demo: Demo, first: Entry) -> dict[str, Any]:
    """Score of the old champion before and during the shift and of the present one after it, by the simulator's truth.

    Fresh users, the same for old and new champion during the shift; 95 % intervals by session.
    """
    function = load_function(demo.config.function)
    spec = demo.config.at(variant=demo.options.variant)
    cfg = function.corpus_config(spec.steps.corpus.simulation)
    bundles = {"old": demo.ledger.states / "bundles" / f"v{first.version:04d}-{first.recipe}", "new": demo.ledger.bundle}
    predictors = {}
    for name, path in bundles.items():
        assert path is not None
        bundle = load_bundle(path)
        predictors[name] = function.deployed_predictor(bundle, bundle.signature)
    tables = []
    for split, shifts in (("calm", frozenset()), ("shifted", frozenset({demo.options.shift}))):
        features, truth, _, _ = simulated(function, cfg, shifts, demo.options.measure_rows, MEASURE_SEED)
        tables.append(function.evaluate(predictors, features, truth, split, frozenset(predictors)))
    table, metric = concat_tables(tables), function.metric

    def score(*terms: str, minus: tuple[str, ...] = ()) -> dict[str, Any]:
        found = estimate(table, list(terms), list(minus), metric=metric.name, aggregate=metric.aggregate,
                         higher_is_better=metric.higher_is_better)  # fmt: skip
        return {"value": found.value, "ci95": found.ci95}

    before, during, after = score("old@calm"), score("old@shifted"), score("new@shifted")
    lost, gain = score("old@calm", minus=("old@shifted",)), score("new@shifted", minus=("old@shifted",))
    return {
        "shift": demo.options.shift, "metric": metric.name, "before": before, "during": during, "after": after,
        "lost": lost, "gain": gain, "calm_after": score("new@calm"),
        "regained": gain["value"] / lost["value"] if lost["value"] else float("nan"),
    }  # fmt: skip


def phases(demo: Demo) -> dict[str, tuple[int, int, float]]:
    """(first window, end, mean score of the labelled rows) before the shift, during it, and after the decision."""
    report = demo.report()
    assert report is not None
    ends = [0, CALM_HOURS, len(report["windows"]) - AFTER_HOURS, len(report["windows"])]
    found = {}
    for name, start, end in zip(("before", "during", "after"), ends, ends[1:], strict=False):
        quality = [window["quality"] for window in report["windows"][start:end]]
        weights = [item["labelled"] for item in quality]
        found[name] = (start, end, float(np.average([item["score"] for item in quality], weights=weights)))
    return found


def picture(demo: Demo, event: str) -> bytes:
    """Score of each window on its labelled rows: before, during and after."""
    report = demo.report()
    assert report is not None
    figure, axes = new_figure()
    figure.set_size_inches(7.0, 3.2)
    windows = [window for window in report["windows"] if window.get("quality", {}).get("score") is not None]
    at = np.arange(len(windows))
    value = np.array([window["quality"]["score"] for window in windows])
    ends = np.array([window["quality"]["score_ci95"] for window in windows])
    axes.errorbar(
        at, value, np.abs(ends.T - value), color=ACCENT, fmt="o-", markersize=4, linewidth=1.0, label="champion, labelled rows"
    )
    classical = [window["quality"]["baseline"] for window in windows]
    axes.plot(at, classical, color=GOOD, linestyle="--", linewidth=1.0, label="classical method")
    after = "new champion" if event == "champion" else "challenger refused"
    for where, text, colour in ((CALM_HOURS, f"shift: {demo.options.shift}", BAD), (len(windows) - AFTER_HOURS, after, GOOD)):
        axes.axvline(where - 0.5, color=colour, linewidth=1.0)
        axes.annotate(
            text, (where - 0.5, axes.get_ylim()[1]), xytext=(3, -10), textcoords="offset points", fontsize=7, color=colour
        )  # fmt: skip
    for name, (start, end, mean) in phases(demo).items():
        axes.hlines(mean, start - 0.5, end - 0.5, color=GOOD if name == "after" else ACCENT, linewidth=3.0, alpha=0.35)
        axes.annotate(f"{mean:.3f}", (start - 0.5, mean), xytext=(3, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("hour of the field")
    axes.set_ylabel(load_function(demo.config.function).metric.name)
    axes.legend(loc="lower right")
    return png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="beam_management")
    parser.add_argument("--variant", default="n78")
    parser.add_argument("--shift", default="band_28")
    parser.add_argument("--hours", type=int, default=10, help="hours after the shift whose telemetry arrives at once")
    parser.add_argument("--rows", type=int, default=5000, help="decisions an hour after the shift; a third of it before")
    parser.add_argument("--labelled", type=float, default=0.4)
    parser.add_argument("--measure-rows", type=int, default=12_000)
    options = parser.parse_args()
    current = prepare_environment()
    os.environ["PYTHONWARNINGS"] = "ignore"
    current.home.mkdir(parents=True, exist_ok=True)
    Path(current.home / "README").write_text("A home of its own for `make demo-drift`; delete it to start over.\n")
    run(options, current)


if __name__ == "__main__":
    main()
