"""How well is drift seen, named and left alone? Seeded windows of every shift, and clean windows from fresh seeds.

`python -m benchmarks.drift detection` plays windows of the field with the serving bundle (or `--bundle`), judges each against
references of its own, and writes `benchmarks/results/drift_detection.md` with exact binomial bounds. What is done is kept
in `--work`, so a killed run goes on.
"""

import argparse
import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankd_pipeline.drift.causes import DEFAULT_ACTIONS
from rankd_pipeline.drift.evidence import Evidence
from rankd_pipeline.drift.judge import Rules, judge
from rankd_pipeline.drift.statistics import exact_bounds
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.store.ledger import open_ledger
from rankd_pipeline.telemetry.contract import CONTEXT, error_column, telemetry_schema
from rankd_pipeline.telemetry.field import hour_columns, known_shifts
from rankd_pipeline.telemetry.windows import HOUR_S
from rankd_pipeline.training.parallel import map_processes

RESULTS = Path(__file__).parent / "results"
START_S = 1_780_000_000.0 // HOUR_S * HOUR_S
CLEAN = "none"


# -- one window, in a worker ----------------------------------------------------------------------------------------------
def window_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Play one window and judge it against the reference of its group; an earlier answer is read back."""
    path = Path(job["work"]) / f"{job['group']}-{job['shift']}-{job['number']}.json"
    if path.exists():
        return json.loads(path.read_text())
    config = load_pipeline(job["pipeline"]).at("laptop", variant=job["variant"])
    function = load_function(config.function)
    cfg = function.corpus_config(config.steps.corpus.simulation)
    step, budget_us = config.steps.drift_report, config.steps.latency_profile.budget_us
    rules = Rules(step.alpha, step.min_psi, step.min_labelled, budget_us, {**DEFAULT_ACTIONS, **step.causes})
    reference = _reference(job, function, cfg, budget_us)
    evidence = Evidence(function, cfg, None)
    evidence.learn_classical(reference)
    shifts = [] if job["shift"] == CLEAN else [job["shift"]]
    columns = _hours(job, function, cfg, budget_us, shifts, [1000 + job["number"]])
    window = evidence.rows(columns)
    verdict = judge(evidence.rows(reference), window, telemetry_schema(function, cfg, budget_us), rules, seed=job["number"])
    truth = function.head().row_scores(columns["output"], columns["all_labels"])
    quality = verdict.quality
    found = {
        "group": job["group"], "shift": job["shift"], "number": job["number"], "drifted": verdict.drifted, "action": verdict.action,
        "causes": [cause.cause for cause in verdict.causes], "detail": [cause.detail for cause in verdict.causes],
        "score_all": float(truth.mean()), "score": quality.score, "gain": quality.gain, "expected": quality.expected,
        "expected_ci95": quality.expected_ci95, "p999_us": verdict.p999_us,
    }  # fmt: skip
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.replace(path)
    return found


def _reference(job: Mapping[str, Any], function: Any, cfg: Any, budget_us: float) -> dict[str, np.ndarray]:
    """Five calm hours of the group's own seed, simulated once."""
    path = Path(job["work"]) / f"reference-{job['group']}.npz"
    if not path.exists():
        columns = _hours(job, function, cfg, budget_us, [], range(5))
        temporary = path.with_name(f"{os.getpid()}.tmp.npz")
        np.savez(temporary, **{name: values.astype(str) if values.dtype == object else values for name, values in columns.items()})
        temporary.replace(path)
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name].astype(object) if found[name].dtype.kind == "U" else found[name] for name in found.files}


def _hours(
    job: Mapping[str, Any], function: Any, cfg: Any, budget_us: float, shifts: list[str], hours: Sequence[int]
) -> dict[str, np.ndarray]:
    """Columns of some hours of the field, and every row's label in `all_labels`."""
    parts = []
    for hour in hours:
        play = {
            "bundle": job["bundle"], "shifts": shifts, "rows": job["rows"], "labelled_share": job["labelled"], "model": "benchmark",
            "seed": job["group"] * 1_000_003 + hour, "start_s": START_S + hour * HOUR_S, "budget_us": budget_us,
        }  # fmt: skip
        columns = hour_columns(function, cfg, play)
        for quantity in CONTEXT:
            for name in (quantity.name, error_column(quantity.name)):
                columns.setdefault(name, np.full(job["rows"], np.nan, np.float32))
        parts.append({**columns, "all_labels": columns["label"]})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# -- all of them ------------------------------------------------------------------------------------------------------------
def detection(options: argparse.Namespace) -> None:
    """Play and judge every window, and write the tables."""
    config = load_pipeline(options.pipeline)
    function = load_function(config.function)
    bundle = options.bundle or open_ledger(settings(), config.pipeline).bundle
    if bundle is None:
        raise SystemExit(
            f"{config.pipeline}: nothing serves in {settings().home}; `rankd run {config.pipeline}` first, or give --bundle."
        )
    options.work.mkdir(parents=True, exist_ok=True)
    common = {
        "pipeline": options.pipeline, "variant": options.variant, "bundle": str(bundle), "rows": options.rows,
        "labelled": options.labelled, "work": str(options.work),
    }  # fmt: skip
    plan = [(CLEAN, options.clean), *((shift, options.windows) for shift in known_shifts(function))]
    jobs = [
        {**common, "group": number % options.references, "shift": shift, "number": at * 10_000 + number}
        for at, (shift, count) in enumerate(plan)
        for number in range(count)
    ]
    done = 0

    def told(_: int, __: Any) -> None:
        nonlocal done
        done += 1
        if done % 50 == 0:
            print(f"{done} of {len(jobs)} windows", flush=True)

    found = map_processes(window_job, jobs, settings().workers, told)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "drift_detection.md"
    path.write_text(detection_page(function, found, options, {**DEFAULT_ACTIONS, **config.at().steps.drift_report.causes}))
    print(path.read_text())


def detection_page(
    function: Any, found: Sequence[Mapping[str, Any]], options: argparse.Namespace, actions: Mapping[str, str]
) -> str:
    """The tables as Markdown."""
    clean = [item for item in found if item["shift"] == CLEAN]
    alarms = [item for item in clean if item["drifted"]]
    lines = [
        f"# Drift detection, {function.title}", "",
        f"`python -m benchmarks.drift detection`, {datetime.date.today()}, {platform.machine()}, "
        f"Python {platform.python_version()}. Windows of {options.rows} rows, {options.labelled:.0%} of the sessions labelled, "
        f"each judged against one of {options.references} references of five calm windows. Bounds are exact binomial, 95 %.", "",
        f"- Clean windows from fresh seeds: {len(clean)}; false alarms: **{_share(len(alarms), len(clean))}**"
        + (f" ({', '.join(sorted({item['causes'][0] for item in alarms}))})" if alarms else "") + ".",
        _cbpe("Clean windows", clean), "",
        "| shift | asks for | windows | detected within one window | right cause | right action | named otherwise |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for shift, about in known_shifts(function).items():
        rows = [item for item in found if item["shift"] == shift]
        if not rows:
            continue
        detected = sum(item["drifted"] for item in rows)
        named = sum(item["causes"][:1] == [about.cause] for item in rows)
        wanted = actions[about.cause]
        acted = sum(item["action"] == wanted for item in rows)
        others = sorted({", ".join(item["causes"]) or "nothing" for item in rows if item["causes"][:1] != [about.cause]})
        cells = [
            shift,
            wanted,
            str(len(rows)),
            *(_share(hits, len(rows)) for hits in (detected, named, acted)),
            "; ".join(others) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| windows | score on all rows | classical method below it | estimated without labels | interval holds the score |",
        "|---|---|---|---|---|",
    ]
    for shift in (CLEAN, *known_shifts(function)):
        rows = [item for item in found if item["shift"] == shift]
        if rows:
            lines.append(
                f"| {shift} | {_mean(rows, 'score_all')} | {_mean(rows, 'gain')} | {_mean(rows, 'expected')} | {_covered(rows)} |"
            )
    return "\n".join(lines) + "\n"


def _share(hits: int, trials: int) -> str:
    low, high = exact_bounds(hits, trials)
    return f"{hits} / {trials} [{low:.1%}, {high:.1%}]"


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [item[name] for item in rows if item[name] is not None]
    return f"{np.mean(values):.3f}" if values else "-"


def _covered(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [item for item in rows if item["expected_ci95"] is not None]
    return _share(sum(item["expected_ci95"][0] <= item["score_all"] <= item["expected_ci95"][1] for item in known), len(known))


def _cbpe(what: str, rows: Sequence[Mapping[str, Any]]) -> str:
    known = [item for item in rows if item["expected"] is not None]
    error = np.array([item["expected"] - item["score_all"] for item in known])
    return f"- {what}: the score estimated without labels (CBPE) is off by {error.mean():+.4f} on average, {error.std():.4f} r.m.s."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["detection"])
    parser.add_argument("--pipeline", default="beam_management")
    parser.add_argument("--variant", default="default")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--clean", type=int, default=500)
    parser.add_argument("--references", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--labelled", type=float, default=0.2)
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks/drift"))
    detection(parser.parse_args())


if __name__ == "__main__":
    main()
