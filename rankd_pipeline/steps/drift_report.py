"""Field step: the drift report: every window judged against what is normal, with causes, quality and plots over time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rankd_pipeline.drift.causes import DEFAULT_ACTIONS, Action, Cause
from rankd_pipeline.drift.judge import Judgement, Quality, Rows, Rules, judge, quality_of
from rankd_pipeline.drift.plots import drift_figures
from rankd_pipeline.ran_functions.contract import Predictor
from rankd_pipeline.runtime.bundle import load_bundle
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.store.artifact import Artifact
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
    """What all windows share: the model under watch, the classical method, the reference rows."""

    def __init__(self, ctx: StepContext, schema: TelemetrySchema) -> None:
        self.ctx, self.schema, self.head = ctx, schema, ctx.function.head()
        champion = ctx.inputs.get("deployment")
        self.model = champion.recipe if champion is not None else None
        self.rules = rules_of(ctx)
        spans = [(start, end) for start, end in ctx.given["reference"] or []]
        columns = columns_of_files(ctx.inputs["reference"], schema, spans) if spans else None
        self.spans = spans if spans and self._same_files(ctx.inputs["reference"], spans) else []
        self.baseline: Predictor | None = None
        if columns is not None:
            self.learn_baseline(columns)
        self.reference = self._as_now(columns, champion) if columns is not None else None

    def _same_files(self, reference: Artifact, spans: Sequence[tuple[float, float]]) -> bool:
        """Whether the reference's windows are also in the telemetry that is judged (they are then not judged)."""
        return any(window.start_s == start for window in windows_of(self.ctx.inputs["telemetry"]) for start, _ in spans)

    def _as_now(self, columns: dict[str, np.ndarray], champion: Artifact | None) -> Rows:
        """The reference rows as the champion would decide them now, whoever decided them then."""
        if champion is None:
            return self.rows(columns)
        predictor = load_bundle(champion.file("bundle"))
        output = self.ctx.function.deployed_predictor(predictor, predictor.signature)(columns)
        model = np.full(len(output), champion.recipe, dtype=object)
        return self.rows({**columns, "output": output, "confidence": self.head.confidence(output), "model": model})

    def learn_baseline(self, columns: Mapping[str, np.ndarray]) -> None:
        """The classical method that is best on these labelled rows, from what a base station has anyway."""
        labelled = columns["has_label"]
        if not labelled.any():
            return
        data = {name: values[labelled] for name, values in columns.items()}
        rivals = [
            item.fit(data, data, derive_seed(self.ctx.spec.seed, "baseline", item.name) % 2**32)
            for item in self.ctx.function.baselines(self.ctx.corpus_config)
            if not item.learned and item.gate and not item.needs_truth
        ]
        if rivals:
            self.baseline = max(rivals, key=lambda rival: float(self.head.row_scores(rival(data), data["label"]).mean()))

    def rows(self, columns: dict[str, np.ndarray]) -> Rows:
        """Columns with what their decisions were worth."""
        n, labelled = len(columns["time_s"]), columns["has_label"]
        score, baseline = np.full(n, np.nan), np.full(n, np.nan)
        if labelled.any():
            score[labelled] = self.head.row_scores(columns["output"][labelled], columns["label"][labelled])
            if self.baseline is not None:
                data = {name: values[labelled] for name, values in columns.items()}
                baseline[labelled] = self.head.row_scores(self.baseline(data), data["label"])
        own = columns["model"] == self.model if self.model is not None else np.ones(n, bool)
        return Rows(columns, np.asarray(own, bool), score, baseline, self.head.expected_scores(columns["output"]))


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
    if field.baseline is None:
        field.learn_baseline(columns)
    rows = field.rows(columns)
    if field.reference is None or any(start <= window.start_s < end for start, end in field.spans):
        state = "reference" if field.reference is not None else "no reference"
        why = "shows what is normal" if field.reference is not None else NO_REFERENCE
        return {**entry, "state": state, "why": why, **_outcome(quality_of(rows, field.rules), rows, field.rules)}
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
        if window["state"] != "judged" or window["action"] != "redistil":
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
