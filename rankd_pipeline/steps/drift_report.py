"""Field step: the drift report: every window judged against what is normal, with causes, quality and plots over time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rankd_pipeline.drift.causes import DEFAULT_ACTIONS, Action, Cause
from rankd_pipeline.drift.evidence import Evidence
from rankd_pipeline.drift.judge import Judgement, Quality, Rows, Rules, judge, quality_of
from rankd_pipeline.drift.plots import drift_figures
from rankd_pipeline.runtime.bundle import load_bundle
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.telemetry.contract import TelemetrySchema, telemetry_schema
from rankd_pipeline.telemetry.rows import columns_of_files, windows_of
from rankd_pipeline.telemetry.windows import Window
from rankd_pipeline.training.seeds import derive_seed

NO_REFERENCE = "what is normal is still being learned"


def drift_report(ctx: StepContext) -> None:
    """Write `drift.json` and figures; metrics carry the verdict on the newest window, which the drift sensor reads.

    ctx.given: {reference: spans [start_s, end_s) of the reference, or null, why: where it comes from}.
    """
    schema = telemetry_schema(ctx.function, ctx.corpus_config, ctx.spec.steps.latency_profile.budget_us)
    field = _Field(ctx, schema)
    windows = windows_of(ctx.inputs["telemetry"])
    judged: list[dict[str, Any]] = []
    for number, window in enumerate(windows):
        ctx.progress(number, len(windows), f"window {window.key}")
        judged.append(_window(ctx, field, window, number))
    document = {"windows": judged, "reference": ctx.given["reference"], "reference_is": ctx.given["why"] or NO_REFERENCE}
    ctx.write_json("drift.json", document)
    ctx.metrics.update(headline(judged), reference=document["reference_is"], windows=len(judged))
    (ctx.out / "figures").mkdir(exist_ok=True)
    budget_us, title = ctx.spec.steps.latency_profile.budget_us, ctx.function.metric.name
    for name, picture in drift_figures(judged, budget_us, title).items():
        (ctx.out / "figures" / f"{name}.png").write_bytes(picture)


class _Field:
    """What all windows share: the model under watch and the reference rows, as the champion would decide them now."""

    def __init__(self, ctx: StepContext, schema: TelemetrySchema) -> None:
        champion = ctx.inputs.get("deployment")
        self.schema, self.rules = schema, rules_of(ctx)
        self.whoever = Evidence(ctx.function, ctx.corpus_config, None, ctx.spec.seed)
        self.evidence = Evidence(ctx.function, ctx.corpus_config, champion.recipe if champion is not None else None, ctx.spec.seed)
        self.reference: Rows | None = None
        self.spans: list[tuple[float, float]] = [(start, end) for start, end in ctx.given["reference"] or []]
        if self.spans:
            columns = columns_of_files(ctx.inputs["reference"], schema, self.spans)
            self.learn_classical(columns)
            if champion is not None:
                columns = self.evidence.decided_by(load_bundle(champion.file("bundle")), columns)
            self.reference = self.evidence.rows(columns)

    def learn_classical(self, columns: Mapping[str, np.ndarray]) -> None:
        for evidence in (self.evidence, self.whoever):
            evidence.learn_classical(columns)

    def state_of(self, window: Window) -> tuple[str, str]:
        """Whether a window is judged, and why not: only what comes after the reference can have drifted from it."""
        if self.reference is None:
            return "no reference", NO_REFERENCE
        if any(start <= window.start_s < end for start, end in self.spans):
            return "reference", "shows what is normal"
        if window.start_s < min(start for start, _ in self.spans):
            return "earlier", "from before what is normal now"
        return "judged", ""


def rules_of(ctx: StepContext) -> Rules:
    """The pipeline's drift settings as the judge takes them."""
    config = ctx.spec.steps.drift_report
    actions: dict[Cause, Action] = {**DEFAULT_ACTIONS, **config.causes}
    return Rules(config.alpha, config.min_psi, config.min_labelled, ctx.spec.steps.latency_profile.budget_us, actions)


def _window(ctx: StepContext, field: _Field, window: Window, number: int) -> dict[str, Any]:
    """One window as `drift.json` holds it."""
    entry = {"key": window.key, "start_s": window.start_s, "end_s": window.end_s, "rows": window.rows, "labelled": window.labelled}
    if window.state != "ready":
        needed = ctx.spec.steps.telemetry.min_rows
        waits = "closed, not judged" if window.closed else "waits for more"
        return {**entry, "state": "too small", "why": f"too small: {window.rows} of {needed} rows; {waits}"}
    columns = columns_of_files(ctx.inputs["telemetry"], field.schema, [(window.start_s, window.end_s)])
    if not field.evidence.has_classical:
        field.learn_classical(columns)
    rows = field.evidence.rows(columns)
    state, why = field.state_of(window)
    if field.reference is None or state != "judged":
        # Not held against the champion, so it counts how good it was, whoever decided.
        outcome = _outcome(quality_of(field.whoever.rows(columns), field.rules), rows, field.rules)
        return {**entry, "state": state, "why": why, **outcome}
    verdict = judge(field.reference, rows, field.schema, field.rules, derive_seed(ctx.spec.seed, "drift", number) % 2**32)
    return {
        **entry,
        "state": "judged",
        "why": _sentence(verdict),
        **_outcome(verdict.quality, rows, field.rules),
        **_verdict(verdict),
    }


def _outcome(quality: Quality, rows: Rows, rules: Rules) -> dict[str, Any]:
    late = np.asarray(rows.columns["latency_us"])
    return {
        "quality": asdict(quality), "own_share": float(rows.own.mean()), "p999_us": float(np.quantile(late, 0.999)),
        "late_share": float((late > rules.budget_us).mean()),
    }  # fmt: skip


def _verdict(verdict: Judgement) -> dict[str, Any]:
    return {
        "drifted": verdict.drifted, "action": verdict.action, "causes": [asdict(cause) for cause in verdict.causes],
        "tests": [asdict(test) for test in verdict.tests],
    }  # fmt: skip


def _sentence(verdict: Judgement) -> str:
    if not verdict.causes:
        return "no drift"
    return "; ".join(f"{cause.cause} ({cause.action}): {cause.detail}" for cause in verdict.causes)


def headline(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the sensor and the UI want to know: the newest window that could be judged, and how long its drift has lasted.

    streak: the windows from the first of an unbroken row of drifted ones that ask for re-distillation, as [start_s, end_s].
    """
    newest = next((window for window in reversed(judged) if window["state"] != "too small"), None)
    if newest is None:
        last = judged[-1]
        return {"window": last["key"], "state": "too small", "why": last["why"], "drifted": False, "action": None}
    streak: list[list[float]] = []
    labelled = 0
    for window in reversed(judged):
        if window["state"] == "too small":
            continue
        if window["state"] != "judged" or window["action"] != "redistill":
            break
        streak.insert(0, [window["start_s"], window["end_s"]])
        labelled += window["labelled"]
    quality = newest["quality"]
    causes = newest.get("causes", [])
    return {
        "window": newest["key"], "state": newest["state"], "why": newest["why"], "drifted": newest.get("drifted", False),
        "action": newest.get("action"), "cause": causes[0]["cause"] if causes else None, "streak": streak,
        "streak_labelled": labelled, "p999_us": newest["p999_us"],
        **{name: quality[name] for name in ("score", "baseline", "gain", "expected", "labelled") if quality[name] is not None},
    }  # fmt: skip
