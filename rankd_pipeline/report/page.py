"""The pages of a run: report, model card and audit, each one self-contained HTML file that needs nothing else to open.

Pictures are inlined; a content policy in the page forbids everything else; all text is escaped.
"""

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rankd_pipeline.report.figures import caption, readable
from rankd_pipeline.report.scorecard import (
    TargetResult,
    gain_text,
    gate_badge,
    number_text,
    rows_of,
    score_text,
    target_text,
    targets_heading,
)

Json = Mapping[str, Any]
_KIND = {"PASS": "good", "met": "good", "OK": "good", "MISS": "bad", "FAIL": "bad"}


def render_report(
    scorecard: Json,
    figures: Mapping[str, bytes],
    tables: Mapping[str, pd.DataFrame],
    notes: Sequence[str],
    gates: Sequence[Json] = (),
    targets: Sequence[TargetResult] = (),
) -> str:
    """The page of one run.

    Args:
        scorecard: from :func:`rankd_pipeline.report.scorecard.scorecard_json`.
        figures: PNG bytes by name; the name decides the caption, any other name is its own caption.
        tables: frames by title, shown in order.
        notes: sentences the reader must not miss (smoke stamp, what stopped the chain, "KD not useful"), on top.
        gates: GateResults as JSON, in the order of the chain.
        targets: as :func:`rankd_pipeline.report.scorecard.check_targets` found them.
    """
    return _render(
        "report.html",
        title=f"{readable(scorecard['function']).capitalize()}, {scorecard['scale']} scale",
        subtitle="From teacher to deployment: scores with 95 % intervals resampled by drop, latency as paced on this host.",
        **_judged(scorecard, figures, tables, notes, gates, targets),
    )


def render_model_card(
    scorecard: Json,
    identity: Mapping[str, str],
    signature: Json,
    callers: Mapping[str, str],
    figures: Mapping[str, bytes],
    tables: Mapping[str, pd.DataFrame],
    notes: Sequence[str],
    gates: Sequence[Json] = (),
    targets: Sequence[TargetResult] = (),
) -> str:
    """The card that travels in a bundle.

    Args:
        identity: what the model is, as name -> text (pipeline, version, scale, seed, file, sha256, licence, ...).
        signature: ``ModelSignature.model_dump()``: ``inputs`` and ``outputs`` with name, axes, shape, unit, dtype.
        callers: language -> source of the ten-line caller.
        tables: the lineage and whatever else the reader should see, by title.
    """
    tensors = pd.DataFrame(
        [
            {"": way, "tensor": t["name"], "axes": " x ".join(t["axes"]) or "scalar", "shape": _shape(t["shape"]),
             "unit": t["unit"], "dtype": t["dtype"]}
            for way, group in (("in", signature["inputs"]), ("out", signature["outputs"]))
            for t in group
        ]
    )  # fmt: skip
    return _render(
        "model_card.html",
        title=f"Model card: {readable(scorecard['function'])}",
        subtitle=f"{signature['name']}, budget {signature['budget_us']:g} us a call, {scorecard['scale']} scale",
        identity={name: str(value) for name, value in identity.items()},
        tensors=_table("What goes in and what comes out", tensors),
        callers=callers,
        **_judged(scorecard, figures, tables, notes, gates, targets),
    )


def render_audit(report_json: Json) -> str:
    """The corpus' health card as a page, from ``AuditReport.to_json()``."""
    words = {"ok": "OK", "warn": "WARN", "fail": "FAIL"}
    report = report_json
    tables = {
        "Splits": pd.DataFrame([{"split": name, **counts} for name, counts in report["splits"].items()]),
        "Sources": pd.DataFrame(report["sources"]),
        "Coverage": pd.DataFrame(
            [{"column": column, "value": value, "rows": rows} for column, counts in report["coverage"].items()
             for value, rows in counts.items()]
        ),
        "Columns": pd.DataFrame(report["columns"]),
    }  # fmt: skip
    return _render(
        "audit.html",
        title="Corpus health card",
        subtitle=f"{report['rows']:,} rows in {report['units']:,} drops. Verdict: {report['verdict']}.",
        card=[
            {"word": words[row["status"]], "kind": _KIND.get(words[row["status"]], ""), "name": row["check"],
             "text": row["sentence"]}
            for row in report["card"]
        ],
        findings=[
            {**finding, "word": words[finding["severity"]], "kind": _KIND.get(words[finding["severity"]], ""),
             "fault": readable(finding["fault"]), "value": _measured(finding["value"], finding["unit"]),
             "threshold": _measured(finding["threshold"], finding["unit"])}
            for finding in report["findings"]
        ],
        tables=[_table(title, frame) for title, frame in tables.items() if len(frame)],
    )  # fmt: skip


def _judged(
    card: Json,
    figures: Mapping[str, bytes],
    tables: Mapping[str, pd.DataFrame],
    notes: Sequence[str],
    gates: Sequence[Json],
    targets: Sequence[TargetResult],
) -> dict[str, Any]:
    """What the report and the model card share."""
    return {
        "tiles": _tiles(card),
        "rows": [(section, readable(name), value) for section, name, value in rows_of(card)],
        "gates": [_gate(gate) for gate in gates],
        "targets_heading": targets_heading(card),
        "targets": [{"word": t.verdict, "kind": _KIND.get(t.verdict, ""), "name": t.name, "text": target_text(t)} for t in targets],
        "figures": [{"caption": caption(name), "data": base64.b64encode(data).decode("ascii")} for name, data in figures.items()],
        "tables": [_table(title, frame) for title, frame in tables.items()],
        "notes": list(notes),
    }


def _tiles(card: Json) -> list[dict[str, str]]:
    """The few numbers that a person looks for first; what was not reached is a dash."""
    metric, name = card["metric"], readable(card["metric"]["name"])
    teacher, student, quantized, latency, deployment = (
        card[section] or {} for section in ("teacher", "student", "quantized", "latency", "deployment")
    )
    baseline = teacher.get("baseline") or {}
    params, small = teacher.get("params"), student.get("params")
    ratio = f"{params / small:.0f}x fewer parameters" if params and small else ""
    p999, budget = latency.get("p999_us"), latency.get("budget_us")
    verdict = latency.get("verdict")
    tail = f"paced p99.9, budget {budget:g} us" if budget else "paced p99.9"
    return [
        {"name": f"Teacher {name}", "value": score_text(teacher.get("score"), metric) or "–",
         "note": f"baseline {score_text(baseline.get('score'), metric)}" if baseline.get("score") is not None else ""},
        {"name": f"Student {name}", "value": score_text(student.get("score"), metric) or "–", "note": ratio},
        {"name": "Gain of distilling", "value": gain_text(student.get("kd_gain"), metric) or "–",
         "note": str(student.get("verdict") or "")},
        {"name": "INT8 drop", "value": gain_text(quantized.get("drop"), metric) or "–",
         "note": "" if not quantized else f"{number_text(quantized.get('bytes_int8'))} bytes"},
        {"name": f"Latency, {latency.get('runtime') or 'not reached'}", "value": "–" if p999 is None else f"{p999:.3g} us",
         "note": f"{tail}: {'unproven on this host' if verdict == 'inconclusive' else verdict}" if latency else ""},
        {"name": "Deployed", "value": str(deployment.get("version") or "–"), "note": str(deployment.get("alias") or "no alias")},
    ]  # fmt: skip


def _gate(gate: Json) -> dict[str, Any]:
    word = gate_badge(gate["verdict"])
    ci95 = gate.get("ci95")
    resolved = [f"{term} = {found}" for term, found in gate.get("resolved", {}).items() if term != found]
    return {
        "badge": word,
        "kind": _KIND.get(word, ""),
        "name": gate["name"],
        "terms": "; ".join([readable(gate["metric"]), *resolved]),
        "value": f"{gate['value']:.4g}",
        "interval": f"{ci95[0]:.4g} to {ci95[1]:.4g}" if ci95 else "too few drops for an interval",
        "wanted": f"{gate['comparator']} {gate['threshold']:g} {gate['unit']}",
        "picture": _interval_picture(gate["value"], ci95, gate["threshold"], word) if ci95 else "",
        "next_step": gate["next_step"] if gate["verdict"] != "pass" else "",
    }


def _interval_picture(value: float, ci95: Sequence[float], threshold: float, word: str) -> Markup:
    """The interval as a bar with its value, and the threshold as a line, on one scale; inline SVG."""
    low, high = min(ci95[0], threshold), max(ci95[1], threshold)
    pad = 0.12 * (high - low) or 1.0

    def x(v: float) -> float:
        return round(180 * (v - low + pad) / (high - low + 2 * pad), 1)

    colour = {"good": "#1a7f4b", "bad": "#b42318"}.get(_KIND.get(word, ""), "#9a6700")
    width = max(x(ci95[1]) - x(ci95[0]), 1.5)
    return Markup(
        '<svg class="interval" width="180" height="16" role="img" aria-label="interval against threshold">'
        '<line x1="0" x2="180" y1="8" y2="8" stroke="#dde3e8"/>'
        f'<rect x="{x(ci95[0])}" y="5" width="{width:.1f}" height="6" rx="2" fill="{colour}" opacity=".45"/>'
        f'<circle cx="{x(value)}" cy="8" r="3.2" fill="{colour}"/>'
        f'<line x1="{x(threshold)}" x2="{x(threshold)}" y1="0" y2="16" stroke="#1f2933" stroke-width="1.5"/></svg>'
    )


def _table(title: str, frame: pd.DataFrame) -> dict[str, Any]:
    """A frame as texts; columns of numbers are set right. Missing is a dash."""
    numeric = [_is_number(frame.iloc[:, i]) for i in range(frame.shape[1])]
    records = frame.astype(object).to_numpy().tolist()
    return {
        "title": title,
        "columns": [
            {"name": readable(str(name), unit=True), "number": number} for name, number in zip(frame.columns, numeric, strict=True)
        ],
        "rows": [[_cell(value) for value in record] for record in records],
    }


def _is_number(column: pd.Series) -> bool:
    """Numbers, or numbers with gaps (None turns a column into objects)."""
    present = [v for v in column.tolist() if v is not None]
    return bool(present) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in present)


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return number_text(value)


def _measured(value: float, unit: str) -> str:
    """A finding's value in its unit; shares in per cent."""
    return f"{value * 100:.3g} %" if unit == "share" else f"{number_text(value)} {unit}"


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, ("n", *shape))) + "]"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("rankd_pipeline.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)
