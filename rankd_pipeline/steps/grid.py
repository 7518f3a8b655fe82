"""The grid of a pipeline's `ablation`: the student with one part after another taken away, over paired seeds, as tables.

Every training is a job of its own that is read back once it is done, so a grid that was stopped goes on where it was.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from rankd_pipeline.distillation.heads import parameter_count
from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.evaluation.paired import paired_gain
from rankd_pipeline.evaluation.table import concat_tables, read_table, write_table
from rankd_pipeline.progress import Progress
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.runtime.onnx_export import export_onnx, load_session
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import AblationColumn, PipelineSpec, StudentStep, deep_merge, validated
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.data import labelled_inputs, present_splits, training_columns
from rankd_pipeline.steps.runner import StepContext, code_version, run_step
from rankd_pipeline.steps.scoring import evaluate_splits, fitted_calibrations, network_predictor
from rankd_pipeline.steps.students import load_student, student_job, write_student_data
from rankd_pipeline.steps.teacher import WEIGHTS, load_teacher
from rankd_pipeline.store.artifact import Artifact, Draft, Recipe, Store
from rankd_pipeline.training.parallel import map_processes
from rankd_pipeline.training.seeds import derive_seed

Note = Callable[[str], None]
CODE_VERSION = "3"
"""Of this module; what trains and judges the students has that of the step."""
MADE = ("corpus", "audit_report", "ssl_weights", "oracle_labels", "teacher", "calibration_scorecard")
TIMED_CALLS = 300


def grid(spec: PipelineSpec, store: Store, current: Settings, note: Note) -> dict[str, Any]:
    """Train every arm of `ablation` on every seed, judge all on all splits, and write the tables.

    Returns {title, tables: [{title, rows}], seeds, path}. Numbers of an arm are means over its seeds with Student's t
    interval; `gain` is the reference's lead, paired over seeds (negative: the arm is better).
    """
    if not spec.ablation.arms:
        raise RankdError(f"ablate {spec.pipeline}: its YAML names no arms (ablation.arms).")
    made: dict[str, Artifact] = {}
    for step in MADE:
        note(f"ablate: {step}")
        made[step] = run_step(step, spec, store, current)
    recipe = Recipe(
        spec.pipeline, "ablate_grid", f"{CODE_VERSION}+student {code_version(STEPS['student'], spec.function)}",
        {"ablation": spec.ablation.model_dump(mode="json"), "student": spec.config_of("student", STEPS["student"].reads)},
        spec.scale, spec.seed, spec.variant, {name: item.version for name, item in made.items()}, {},
    )  # fmt: skip
    with store.lock(f"{spec.pipeline}-ablate_grid-{recipe.digest}", wait=note):
        artifact = store.get(spec.pipeline, "ablate_grid", recipe.digest)
        if artifact is None:
            draft = store.draft(recipe)
            _Grid(spec, made, draft, store, current, note).run()
            artifact = store.publish(draft, made)
    return {**json.loads(artifact.file("tables.json").read_text()), "path": str(artifact.path)}


@dataclass(frozen=True)
class Row:
    """One model of the tables: a score for each seed in each column (None: one model, an interval by drop instead)."""

    name: str
    scores: Mapping[str, Sequence[float]]
    ci95: Mapping[str, tuple[float, float] | None]


class _Grid:
    """One run of the grid."""

    def __init__(
        self, spec: PipelineSpec, made: dict[str, Artifact], draft: Draft, store: Store, current: Settings, note: Note
    ) -> None:
        self.spec, self.made, self.draft, self.note, self.workers = spec, made, draft, note, current.workers
        self.function = load_function(spec.function)
        self.metric = self.function.metric
        progress = Progress(None, "ablate_grid")
        self.ctx = StepContext(
            spec, STEPS["student"], self.function, made, draft, store, progress, current.workers, current.home, note
        )  # fmt: skip
        self.arms = {
            name: validated(
                StudentStep,
                deep_merge(deep_merge(spec.steps.student.model_dump(), spec.ablation.student), arm.student),
                f"pipeline {spec.pipeline}, ablation.arms.{name}",
            )
            for name, arm in spec.ablation.arms.items()
        }

    def run(self) -> None:
        """Write `tables.json`, `evaluation.parquet` (every arm and seed) and `trainings.json`."""
        parts = [read_table(self.made["calibration_scorecard"].file("evaluation.parquet"))]
        self._check_tables({str(model) for model in parts[0]["model"].unique()})
        trained = self._train()
        for name, jobs in trained.items():
            self.note(f"ablate: judging {name}")
            students = {f"{name}#{i}": load_student(self.function, job) for i, job in enumerate(jobs)}
            calibrations = fitted_calibrations(self.ctx, students)
            models = {key: network_predictor(self.ctx, student, calibrations[key]) for key, student in students.items()}
            parts.append(evaluate_splits(self.ctx, self.made["corpus"], models, present_splits(self.made["corpus"]), list(models)))
        table = concat_tables(parts)
        write_table(table, self.draft.out / "evaluation.parquet")
        rows = {name: self._row(table, name, [f"{name}#{i}" for i in range(len(jobs))]) for name, jobs in trained.items()}
        singles = [str(model) for model in table["model"].unique() if "#" not in str(model)]
        rows |= {name: self._row(table, name, [name]) for name in singles}
        tables = [self._scores(title, chosen, rows) for title, chosen in self.spec.ablation.tables.items()]
        tables += [self._against_reference(rows, trained), self._costs(trained)]
        about = (
            f"{self.spec.pipeline}, {self.spec.scale}: {self.metric.name} in {self.metric.unit}, {self.spec.ablation.seeds} seeds"
        )
        self._write("tables.json", {"title": about, "tables": tables, "seeds": self.spec.ablation.seeds}, volatile=True)
        kept = ("name", "arm", "seed", "validation_loss", "validation_score", "best_epoch", "distillation")
        self._write("trainings.json", {name: [{key: job[key] for key in kept} for job in jobs] for name, jobs in trained.items()})

    def _check_tables(self, scored: set[str]) -> None:
        """Before any training: every name in the tables is an arm or a model that the scorecard has judged."""
        known = [*self.arms, *sorted(scored)]
        for title, chosen in self.spec.ablation.tables.items():
            absent = [name for name in chosen if name not in known]
            if absent:
                raise RankdError(
                    f"ablation.tables.{title}: {absent[0]!r} is neither an arm nor a model of the scorecard ({', '.join(known)})."
                )

    def _write(self, name: str, value: Any, volatile: bool = False) -> None:
        (self.draft.out / name).write_text(json.dumps(value, indent=1) + "\n")  # columns in the order of the YAML
        if volatile:  # it holds times
            self.draft.volatile.add(name)

    def _train(self) -> dict[str, list[dict[str, Any]]]:
        corpus, labels = self.made["corpus"], self.made["oracle_labels"]
        data, out = self.draft.scratch / "data", self.draft.scratch / "students"
        out.mkdir(exist_ok=True)
        _, train = training_columns(self.function, corpus, labels)
        _, val, val_label = labelled_inputs(self.function, corpus, labels, "val")
        write_student_data(data, train, {**val, "label": val_label})
        # Seed by seed, so that a grid that is stopped early has compared all arms.
        order = [(name, seed) for seed in range(1, self.spec.ablation.seeds + 1) for name in self.arms]
        jobs = [self._job(name, seed, data, out) for name, seed in order]
        done = 0

        def on_done(index: int, result: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            self.note(f"ablate: {done} of {len(jobs)}: {result['name']}: validation score {result['validation_score']:.3f}")

        results = map_processes(student_job, jobs, self.workers, on_done)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.arms}
        for (name, _), job, result in zip(order, jobs, results, strict=True):
            found[name].append({**job, **result})
        return found

    def _job(self, name: str, seed: int, data: Path, out: Path) -> dict[str, Any]:
        step = self.arms[name]
        method = self.spec.ablation.arms[name].arm
        return {
            "name": f"{name}-seed{seed}", "function": self.spec.function, "corpus": self.spec.steps.corpus.simulation,
            "network": step.network, "fit": step.fit, "loss": step.loss, "arm": method, "temperature": step.temperatures[0],
            "alpha": step.alpha, "seed": derive_seed(self.spec.seed, "student", seed), "distillation": step.distillation,
            "teacher": str(self.made["teacher"].file(WEIGHTS)), "teacher_network": self.spec.steps.teacher.network,
            "data": str(data), "out": str(out),
        }  # fmt: skip

    def _row(self, table: pd.DataFrame, name: str, models: Sequence[str]) -> Row:
        scores: dict[str, list[float]] = {}
        ci95: dict[str, tuple[float, float] | None] = {}
        for title, column in self.spec.ablation.columns.items():
            found = [self._estimate(table, model, column, 0 if len(models) > 1 else 1000) for model in models]
            scores[title] = [item.value for item in found]
            ci95[title] = found[0].ci95 if len(models) == 1 else t_interval(scores[title])
        return Row(name, scores, ci95)

    def _estimate(self, table: pd.DataFrame, model: str, column: AblationColumn, resamples: int) -> Any:
        return estimate(
            table, f"{model}@{column.split}", metric=self.metric.name, aggregate=self.metric.aggregate, where=column.where,
            higher_is_better=self.metric.higher_is_better, seed=derive_seed(self.spec.seed, "ablate") % 2**32, resamples=resamples,
        )  # fmt: skip

    def _scores(self, title: str, chosen: Sequence[str], rows: Mapping[str, Row]) -> dict[str, Any]:
        found = [{"model": name, **{column: _text(rows[name], column) for column in self.spec.ablation.columns}} for name in chosen]
        return {"title": title, "rows": found}

    def _against_reference(self, rows: Mapping[str, Row], trained: Mapping[str, Any]) -> dict[str, Any]:
        """What each arm loses against the reference over all columns of a split, paired over seeds."""
        reference, sign = self.spec.ablation.reference, 1.0 if self.metric.higher_is_better else -1.0
        found = []
        for name in trained:
            if name == reference:
                continue
            row: dict[str, Any] = {"arm": name}
            for column in self.spec.ablation.columns:
                gain = paired_gain(*([sign * x for x in rows[arm].scores[column]] for arm in (reference, name)))
                row[column] = f"{gain.mean:+.2f} [{gain.ci95[0]:+.2f}, {gain.ci95[1]:+.2f}] p={gain.p_one_sided:.3f}"
            found.append(row)
        return {"title": f"Lead of {reference} over each arm ({self.metric.unit}, paired over seeds)", "rows": found}

    def _costs(self, trained: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Parameters, teacher passes and batch-1 inference time of each arm's network and of the teacher."""
        rows, timed = [], {}
        for name, jobs in [("teacher", []), *trained.items()]:
            module = load_student(self.function, jobs[0]) if jobs else load_teacher(self.ctx)
            params = parameter_count(module) if jobs else self.made["teacher"].metrics["params"]  # a loaded teacher is frozen
            if params not in timed:
                timed[params] = self._inference_us(module)
            record = jobs[0]["distillation"] if jobs else None
            rows.append({
                "model": name, "parameters": params, "teacher passes": "–" if record is None else record["teacher_passes"],
                "p50 (us)": round(timed[params][0], 1), "p99 (us)": round(timed[params][1], 1),
            })  # fmt: skip
        return {"title": "Parameters, teacher passes in training (seed 1), inference of one sample (onnxruntime FP32, one thread)",
                "rows": rows}  # fmt: skip

    def _inference_us(self, module: Any) -> tuple[float, float]:
        signature = self.function.signatures(self.ctx.corpus_config, self.spec.steps.latency_profile.budget_us)[0]
        path = self.draft.scratch / "timed.onnx"
        calibration = {"radius": 0.0, "temperature": 1.0}
        export_onnx(self.function.deployable(module, calibration).eval(), signature, path, {})
        session = load_session(path)
        rng = np.random.default_rng(0)
        call = {item.name: rng.standard_normal((1, *item.shape)).astype(item.dtype) for item in signature.inputs}
        spent = []
        for _ in range(TIMED_CALLS):
            started = time.perf_counter()
            session.run(None, call)
            spent.append((time.perf_counter() - started) * 1e6)
        return float(np.percentile(spent[20:], 50)), float(np.percentile(spent[20:], 99))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean over seeds."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _text(row: Row, column: str) -> str:
    interval = row.ci95[column]
    text = f"{np.mean(row.scores[column]):.2f}"
    return text if interval is None else f"{text} [{interval[0]:.2f}, {interval[1]:.2f}]"
