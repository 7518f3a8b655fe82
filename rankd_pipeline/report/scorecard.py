"""The one object a run is summed up in: `rankd report FUNCTION --json`, and the same for a terminal.

It is assembled from the `metrics` of the steps, so this module is the one place that says which keys a step must write:

    step                    section      keys of its metrics (others are ignored, missing ones become null)
    calibration_scorecard   teacher      params, score, score_ci95, baseline {name, score}, calibration {metric, value, raw},
                                         gap_site, gap_band, verdict
    student                 student      params, score, score_ci95, retention, gain_retention, scratch_score, kd_gain, kd_p,
                                         dark_gain, temperature, verdict
    quantized_onnx          quantized    score, drop, bytes_fp32, bytes_int8
    latency_profile         latency      budget_us, runtime, p50_us, p99_us, p999_us, max_us, control_p999_us, verdict, cases,
                                         candidates
    deployment              deployment   version, alias, bundle

A step that was not reached is null as a whole. Rates are fractions 0..1, gains are positive when better, drops positive
when worse. Nothing here knows a RAN function: every function and head prints the same object.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from rankd_pipeline.evaluation.gates import Comparator, judge

if TYPE_CHECKING:
    from rich.console import Group

Json = dict[str, Any]

SECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher": (
        "calibration_scorecard",
        {
            "params": None,
            "score": None,
            "score_ci95": None,
            "baseline": {"name": None, "score": None},
            "calibration": {"metric": None, "value": None, "raw": None},
            "gap_site": None,
            "gap_band": None,
            "verdict": None,
        },
    ),
    "student": (
        "student",
        dict.fromkeys(
            ("params", "score", "score_ci95", "retention", "gain_retention", "scratch_score", "kd_gain", "kd_p", "dark_gain",
             "temperature", "verdict")
        ),
    ),
    "quantized": ("quantized_onnx", dict.fromkeys(("score", "drop", "bytes_fp32", "bytes_int8"))),
    "latency": (
        "latency_profile",
        dict.fromkeys(
            ("budget_us", "runtime", "p50_us", "p99_us", "p999_us", "max_us", "control_p999_us", "verdict", "cases", "candidates")
        ),
    ),
    "deployment": ("deployment", dict.fromkeys(("version", "alias", "bundle"))),
}  # fmt: skip
RATE_UNITS = ("share", "fraction", "rate", "probability", "1", "")


class Target(BaseModel):
    """A number that a run is held against beside its gates: ``value`` (a dotted path into the scorecard), less ``minus``,
    divided by ``over``. ``scores.MODEL@SPLIT.METRIC`` is a path, too: any score of any step's table.

    ``rates`` says that it only applies where the headline metric is a rate. ``aim`` is the stronger figure to strive for;
    missing it is said, too. ``proof`` is the path of a verdict: a target whose verdict is inconclusive is not met,
    whatever its number. ``host`` is the path of what the host does by itself, in the unit of ``value``: a miss where the host
    alone would have missed it proves nothing about the model and is inconclusive, with the host's figure shown.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    value: str
    minus: str | None = None
    over: str | None = None
    rates: bool = False
    proof: str | None = None
    host: str | None = None
    comparator: Comparator
    threshold: float
    aim: float | None = None
    unit: str = ""


TARGETS: tuple[Target, ...] = (
    Target(name="student score / teacher score", value="student.retention", comparator=">=", threshold=0.97, aim=0.99,
           rates=True),
    Target(name="teacher parameters / student parameters", value="teacher.params", over="student.params", comparator=">=",
           threshold=20, aim=100, unit="x"),
    Target(name="distillation gain, one-sided p over seeds", value="student.kd_p", comparator="<", threshold=0.05),
    Target(name="INT8 score drop", value="quantized.drop", comparator="<=", threshold=0.005, aim=0.002,
           rates=True),
    Target(name="paced p99.9 / budget", value="latency.p999_us", over="latency.budget_us", comparator="<=", threshold=0.2,
           aim=0.03, proof="latency.verdict", host="latency.control_p999_us"),
)  # fmt: skip
"""What holds for every function (targets: "student / teacher score", "KD gain", "INT8 PTQ drop", "p99.9 of the chosen backend")."""


class TargetResult(BaseModel):
    """A target with the number reached; "not reached" where a step was not reached or the number does not apply."""

    name: str
    value: float | None
    comparator: Comparator
    threshold: float
    aim: float | None
    unit: str
    verdict: Literal["met", "MISS", "INCONCLUSIVE", "not reached"]
    aim_met: bool | None
    host: float | None


def scorecard_json(
    function: str,
    scale: str,
    metric: Mapping[str, Any],
    steps: Mapping[str, Mapping[str, Any] | None],
    seconds: Mapping[str, float | None],
) -> Json:
    """Assemble the object.

    Args:
        metric: ``name``, ``unit``, ``higher_is_better`` of the headline metric.
        steps: metrics of each step by step name (see the module's table); absent or None where not reached.
        seconds: wall time of each step as it was made, s, in the order of the chain; None where not reached.
    """
    card: Json = {
        "function": function,
        "scale": scale,
        "metric": {key: metric[key] for key in ("name", "unit", "higher_is_better")},
    }
    for section, (step, shape) in SECTIONS.items():
        found = steps.get(step)
        card[section] = None if found is None else _pick(shape, found)
    card["seconds"] = {step: _plain(value) for step, value in seconds.items()}
    return card


def check_targets(
    card: Mapping[str, Any], targets: Sequence[Target] = TARGETS, scores: Mapping[str, Mapping[str, float]] | None = None
) -> list[TargetResult]:
    """Hold a scorecard against its targets; a value that is null is "not reached", which is no success.

    scores: ``MODEL@SPLIT`` -> metric -> value, from the tables of the steps.
    """
    found = {**card, "scores": scores or {}}
    return [_check(found, target) for target in targets if not target.rates or is_rate(card["metric"])]


def scorecard_text(
    card: Mapping[str, Any],
    gates: Sequence[Mapping[str, Any]] = (),
    targets: Sequence[TargetResult] = (),
    notes: Sequence[str] = (),
) -> "Group":
    """The scorecard for a terminal; a missed gate or target is printed as MISS with the number and what was wanted.

    ``gates`` are GateResults as JSON, in the order of the chain.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(f"{card['function']} at {card['scale']} scale", style="bold")]
    figures = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for section, name, value in rows_of(card):
        figures.add_row(Text(section, style="cyan"), Text(name), Text(value))
    parts.append(figures)
    if gates:
        parts += [Text("gates", style="bold"), _gate_table(gates)]
    if targets:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for target in targets:
            table.add_row(_badge(target.verdict), Text(target.name), Text(target_text(target)))
        parts += [Text(targets_heading(card).lower(), style="bold"), table]
    parts += [Text(note) for note in notes]
    return Group(*parts)


def rows_of(card: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(section, name, value) as a person reads them; the same lines for terminal and page. The section is named once."""
    metric = card["metric"]
    out: list[tuple[str, str, str]] = []
    writers = {"teacher": _teacher_rows, "student": _student_rows, "quantized": _quantized_rows, "latency": _latency_rows,
               "deployment": _deployment_rows}  # fmt: skip
    for section, write in writers.items():
        part = card[section]
        rows = [("", "not reached")] if part is None else [(name, text) for name, text in write(part, metric) if text]
        out += [(section if i == 0 else "", name, text) for i, (name, text) in enumerate(rows)]
    spent = [value for value in card["seconds"].values() if value is not None]
    if spent:
        out.append(("seconds", "all steps", f"{sum(spent):,.0f} s as they were made"))
    return out


def score_text(value: float | None, metric: Mapping[str, Any], ci95: Sequence[float] | None = None) -> str:
    """A score in its unit: rates in per cent, with the interval where there is one; empty for null."""
    if value is None:
        return ""
    scale, unit, digits = (100.0, " %", 1) if is_rate(metric) else (1.0, f" {metric['unit']}", 2)
    interval = f"  [{ci95[0] * scale:.{digits}f}, {ci95[1] * scale:.{digits}f}]" if ci95 else ""
    return f"{value * scale:.{digits}f}{unit}{interval}"


def gain_text(value: float | None, metric: Mapping[str, Any]) -> str:
    """A difference of scores, signed: points for rates."""
    if value is None:
        return ""
    return f"{value * 100:+.2f} points" if is_rate(metric) else f"{value:+.2f} {metric['unit']}"


def is_rate(metric: Mapping[str, Any]) -> bool:
    """Whether the metric is a share of samples, from its unit."""
    return metric["unit"] in RATE_UNITS


def number_text(value: Any) -> str:
    """A number as tables show it: integers with separators, floats to four significant digits, null as a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


def gate_text(gate: Mapping[str, Any]) -> str:
    """``0.081 [0.064, 0.097], wanted >= 0.05 fraction``."""
    interval = f" [{gate['ci95'][0]:.4g}, {gate['ci95'][1]:.4g}]" if gate.get("ci95") else " [no interval]"
    return f"{gate['value']:.4g}{interval}, wanted {gate['comparator']} {gate['threshold']:g} {gate['unit']}"


def gate_badge(verdict: str) -> str:
    """The word a verdict is shown as: a missed gate is a MISS."""
    return {"pass": "PASS", "fail": "MISS", "inconclusive": "INCONCLUSIVE"}.get(verdict, verdict)


def targets_heading(card: Mapping[str, Any]) -> str:
    """Smoke runs are held against the same numbers, but nobody promised them."""
    return "Targets, which are set for laptop scale" if card["scale"] == "smoke" else "Targets"


def target_text(target: TargetResult) -> str:
    """``0.981, wanted >= 0.97, aim 0.99 missed``."""
    value = "–" if target.value is None else f"{target.value:.4g}"
    unit = target.unit and f" {target.unit}"
    text = f"{value}{unit}, wanted {target.comparator} {target.threshold:g}{unit}"
    if target.aim_met is not None:
        text += f", aim {target.aim:g} {'met' if target.aim_met else 'missed'}"
    if target.host is not None and target.verdict == "INCONCLUSIVE":
        text += f"; the host alone: {target.host:.4g}{unit}"
    return text


def _teacher_rows(part: Json, metric: Mapping[str, Any]) -> list[tuple[str, str]]:
    calibration, baseline = part["calibration"], part["baseline"]
    margin = None
    if part["score"] is not None and baseline["score"] is not None:
        margin = (part["score"] - baseline["score"]) * (1 if metric["higher_is_better"] else -1)
    raw = "" if calibration["raw"] is None else f"  (before calibration {calibration['raw']:.4f})"
    return [
        (metric["name"], score_text(part["score"], metric, part["score_ci95"])),
        (f"best baseline: {baseline['name']}", score_text(baseline["score"], metric)),
        ("better by", gain_text(margin, metric)),
        (str(calibration["metric"]), "" if calibration["value"] is None else f"{calibration['value']:.4f}{raw}"),
        ("gap to held-out site", gain_text(part["gap_site"], metric)),
        ("gap to held-out band", gain_text(part["gap_band"], metric)),
        ("parameters", number_text(part["params"])),
        ("verdict", part["verdict"] or ""),
    ]


def _student_rows(part: Json, metric: Mapping[str, Any]) -> list[tuple[str, str]]:
    p = "" if part["kd_p"] is None else f"  (one-sided p = {part['kd_p']:.3g})"
    temperature = part["temperature"]
    return [
        (metric["name"], score_text(part["score"], metric, part["score_ci95"])),
        ("of the teacher's score", "" if part["retention"] is None else f"{part['retention'] * 100:.1f} %"),
        ("of the teacher's gain", "" if part["gain_retention"] is None else f"{part['gain_retention'] * 100:.1f} %"),
        ("from scratch", score_text(part["scratch_score"], metric)),
        ("gain of distilling", gain_text(part["kd_gain"], metric) + p if part["kd_gain"] is not None else ""),
        ("gain over hard labels", gain_text(part["dark_gain"], metric)),
        ("temperature", "" if temperature is None else f"{temperature:g}"),
        ("parameters", number_text(part["params"])),
        ("verdict", part["verdict"] or ""),
    ]


def _quantized_rows(part: Json, metric: Mapping[str, Any]) -> list[tuple[str, str]]:
    sizes = f"{number_text(part['bytes_fp32'])} bytes FP32, {number_text(part['bytes_int8'])} bytes INT8"
    drop = "" if part["drop"] is None else gain_text(part["drop"], metric) + " (positive is worse)"
    return [("in INT8", score_text(part["score"], metric)), ("drop", drop), ("size", sizes)]


def _latency_rows(part: Json, _: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures = {"p50": part["p50_us"], "p99": part["p99_us"], "p99.9": part["p999_us"], "max": part["max_us"]}
    tail = ", ".join(f"{name} {value:.2f}" for name, value in figures.items() if value is not None)
    control = part["control_p999_us"]
    return [
        ("runtime", str(part["runtime"] or "")),
        ("paced, us", tail),
        ("budget", "" if part["budget_us"] is None else f"{part['budget_us']:g} us"),
        ("host's own p99.9", "" if control is None else f"{control:.2f} us (control of fixed work)"),
        ("verdict", "latency unproven on this host" if part["verdict"] == "inconclusive" else part["verdict"] or ""),
    ]


def _deployment_rows(part: Json, _: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("version", str(part["version"] if part["version"] is not None else "not registered")),
        ("alias", str(part["alias"] or "none")),
        ("bundle", str(part["bundle"] or "")),
    ]


def _gate_table(gates: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text  # not plain strings: rich would read "[no interval]" as markup

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for gate in gates:
        table.add_row(_badge(gate_badge(gate["verdict"])), Text(gate["name"]), Text(gate_text(gate)))
        if gate["verdict"] != "pass":
            table.add_row("", "", Text(f"next: {gate['next_step']}"))
    return table


def _badge(word: str) -> Any:
    from rich.text import Text

    return Text(word, style={"PASS": "green", "met": "green", "MISS": "bold red"}.get(word, "yellow"))


def _check(card: Mapping[str, Any], target: Target) -> TargetResult:
    value, over = _number(card, target.value), 1.0 if target.over is None else _number(card, target.over)
    less = 0.0 if target.minus is None else _number(card, target.minus)
    ratio = (value - less) / over if value is not None and less is not None and over else None
    host = None if target.host is None else _number(card, target.host)
    host = host / over if host is not None and over else None
    verdict: Literal["met", "MISS", "INCONCLUSIVE", "not reached"] = "not reached"
    aim_met = None
    if ratio is not None and target.proof is not None and _at(card, target.proof) == "inconclusive":
        verdict = "INCONCLUSIVE"
    elif ratio is not None:
        met, host_met = (x is None or judge((x, x), target.comparator, target.threshold) == "pass" for x in (ratio, host))
        verdict = "met" if met else "MISS" if host_met else "INCONCLUSIVE"
        if target.aim is not None:
            aim_met = judge((ratio, ratio), target.comparator, target.aim) == "pass"
    shown = target.model_dump(include={"name", "comparator", "threshold", "aim", "unit"})
    return TargetResult(value=ratio, verdict=verdict, aim_met=aim_met, host=host, **shown)


def _number(card: Mapping[str, Any], path: str) -> float | None:
    value = _at(card, path)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _at(card: Mapping[str, Any], path: str) -> Any:
    value: Any = card
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _pick(shape: Mapping[str, Any], found: Mapping[str, Any]) -> Json:
    """The keys of ``shape`` from ``found``; nested objects keep their keys even where everything is null."""
    return {
        key: _pick(inner, found.get(key) or {}) if isinstance(inner, dict) else _plain(found.get(key))
        for key, inner in shape.items()
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: such a number is null; an empty interval is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value] or None
    return value
