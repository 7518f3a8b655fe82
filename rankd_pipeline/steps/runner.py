"""Runs one step of a chain: recipe, cache, lock, gates read again, body, publish. Every door (CLI, UI, daemon) uses it."""

import errno
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any

from rankd_pipeline.errors import ArtifactDamaged, GateStopped, RankdError
from rankd_pipeline.progress import Progress, progress_of
from rankd_pipeline.ran_functions.contract import RanFunction
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.report.scorecard import gate_text
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineSpec
from rankd_pipeline.steps.chain import INFO, SITE_INPUTS, STEPS, StepInfo
from rankd_pipeline.store.artifact import Artifact, Draft, Recipe, Store


@dataclass
class StepContext:
    """What a step's body gets: its configuration, its inputs, and where to put what it makes."""

    spec: PipelineSpec
    info: StepInfo
    function: RanFunction
    inputs: Mapping[str, Artifact]
    draft: Draft
    store: Store
    progress: Progress
    workers: int
    home: Path
    note: Callable[[str], None] = field(default=lambda text: None)
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        return getattr(self.spec.steps, self.info.name)

    @property
    def corpus_config(self) -> Any:
        return self.function.corpus_config(self.spec.steps.corpus.simulation)

    @property
    def out(self) -> Path:
        return self.draft.out

    @property
    def scratch(self) -> Path:
        return self.draft.scratch

    @property
    def metrics(self) -> dict[str, Any]:
        return self.draft.metrics

    @property
    def observed(self) -> dict[str, Any]:
        return self.draft.observed

    def skip(self, reason: str) -> None:
        """Publish an artifact that only says why the step did not apply."""
        self.draft.skipped = reason

    def write_json(self, name: str, value: Any, volatile: bool = False) -> None:
        (self.out / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        if volatile:
            self.draft.volatile.add(name)


def open_store(current: Settings) -> Store:
    """The artifact store of these settings."""
    return Store(current.store_uri, cache=current.home / "cache")


@cache
def host_id() -> str:
    """CPU model and core count: a latency measured elsewhere is another measurement."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return f"{model or platform.machine()} x{os.cpu_count()}"


def code_version(info: StepInfo, function: str) -> str:
    """The version of a step's code together with those of the function's modules that shape it."""
    versions = load_function(function).code_versions
    return "+".join([info.code_version, *(f"{facet}={versions.get(facet, '0')}" for facet in info.facets)])


def recipe_of(step: str, spec: PipelineSpec, inputs: Mapping[str, Artifact], given: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of `step` under `spec` with these inputs; `given` is what a field step is given beside them, as JSON."""
    info = INFO[step]
    site = {"site": _site_config(spec)} if spec.site is not None and step == "corpus" else {}
    return Recipe(
        pipeline=spec.pipeline,
        step=step,
        code_version=code_version(info, spec.function),
        config={**spec.config_of(step, info.reads), **site, **({"given": dict(given)} if given else {})},
        scale=spec.scale,
        seed=spec.seed,
        variant=spec.variant,
        inputs={name: artifact.version for name, artifact in inputs.items()},
        libraries={name: distribution_version(name) for name in info.libraries},
        host=host_id() if info.on_host else None,
    )


def _site_config(spec: PipelineSpec) -> dict[str, Any]:
    """What shapes the site data of a corpus: which windows, and how their sessions are shared out."""
    assert spec.site is not None
    telemetry = spec.steps.telemetry
    shares = {"judge": telemetry.judge_share, "val": telemetry.val_share, "site": telemetry.site_share}
    owner = {"owner": telemetry.owner, "may_leave": telemetry.may_leave}
    return {"windows": [list(window) for window in spec.site.windows], "shares": shares, **owner}


Known = dict[str, Artifact | None]
"""What was found already in one walk up the chain, by name: many steps share an input."""


def resolve(step: str, spec: PipelineSpec, store: Store, known: Known | None = None) -> Artifact | None:
    """The stored artifact of `step` under `spec`, found by recipe from the corpus on; None if any of it is missing."""
    known = {} if known is None else known
    inputs = {name: _input(name, spec, store, known) for name in input_names(step, spec)}
    found = {name: artifact for name, artifact in inputs.items() if artifact is not None}
    if len(found) < len(inputs):
        return None
    return store.get(spec.pipeline, step, recipe_of(step, spec, found).digest)


def input_names(step: str, spec: PipelineSpec) -> tuple[str, ...]:
    """What `step` reads under `spec`: its inputs, and those that a re-distillation adds."""
    names = INFO[step].inputs
    if spec.site is None:
        return names
    return (*names, *(name for name in SITE_INPUTS.get(step, ()) if spec.site.start or not name.startswith("last_")))


def _input(name: str, spec: PipelineSpec, store: Store, known: Known) -> Artifact | None:
    """`_looked_up`, once a walk."""
    if name not in known:
        known[name] = _looked_up(name, spec, store, known)
    return known[name]


def _looked_up(name: str, spec: PipelineSpec, store: Store, known: Known) -> Artifact | None:
    """The artifact that `name` stands for.

    base_corpus is the corpus as it is without site data, telemetry the artifact that a re-distillation names, and
    last_teacher and last_student are those that the deployment which it starts from was made of.
    """
    if spec.site is None or not (name in ("base_corpus", "telemetry") or name.startswith("last_")):
        return resolve(name, spec, store, known)
    if name == "base_corpus":
        return resolve("corpus", spec.model_copy(update={"site": None}), store)
    if name == "telemetry":
        return store.get(spec.pipeline, "telemetry", spec.site.telemetry)
    start = store.get(spec.pipeline, "deployment", spec.site.start)
    entry = start.manifest["inputs"].get(name.removeprefix("last_")) if start is not None else None
    return store.get(spec.pipeline, entry["step"], entry["recipe"]) if entry is not None else None


def inputs_of(step: str, spec: PipelineSpec, store: Store) -> dict[str, Artifact]:
    """The input artifacts of `step`.

    Raises: RankdError naming the first one that has not been made.
    """
    inputs: dict[str, Artifact] = {}
    known: Known = {}
    for name in input_names(step, spec):
        artifact = _input(name, spec, store, known)
        if artifact is None:
            raise RankdError(
                f"{spec.pipeline}/{step}: its input {name} has not been made at scale {spec.scale}, seed {spec.seed}, variant "
                f"{spec.variant}; materialize {spec.pipeline}/{name} first or run `rankd run {spec.pipeline} --scale {spec.scale}`."
            )
        inputs[name] = artifact
    return inputs


def require_passed(artifact: Artifact, enforced: bool) -> None:
    """Refuse to build on an artifact whose gate did not pass: a check in the UI guards only its own run.

    Raises: GateStopped with the verdict, the figures and what to do next.
    """
    verdict = artifact.metrics.get("verdict")
    # A latency that this host cannot decide goes on, stamped; everything else must pass.
    allowed = ("pass", "inconclusive") if artifact.step == "latency_profile" else ("pass",)
    if not enforced or verdict in allowed:
        return
    lines = [
        f"{gate['name']}: {gate_text(gate)}: {gate['verdict']}. Next: {gate['next_step']}"
        for gate in artifact.metrics.get("gates", [])
        if gate["verdict"] != "pass"
    ] or [str(artifact.metrics.get("reason", "see its report"))]
    raise GateStopped(f"{artifact.pipeline}/{artifact.step}: verdict {verdict}. " + " | ".join(lines))


def run_step(
    step: str,
    spec: PipelineSpec,
    store: Store,
    current: Settings,
    run_id: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Artifact:
    """Make `step` or take it from the store.

    run_id is the orchestrator's, kept in observed.json. note gets sentences for the log. The step's own module is
    imported only if there is work to do, so a cached chain needs neither torch nor Sionna.
    """
    artifact = run_with_inputs(step, spec, inputs_of(step, spec, store), store, current, run_id, note)
    if run_id is not None:
        store.note_use(artifact, run_id)
    return artifact


def run_with_inputs(
    step: str,
    spec: PipelineSpec,
    inputs: Mapping[str, Artifact],
    store: Store,
    current: Settings,
    run_id: str | None = None,
    note: Callable[[str], None] = lambda text: None,
    given: Mapping[str, Any] | None = None,
) -> Artifact:
    """`run_step` over given input artifacts."""
    info = INFO[step]
    recipe = recipe_of(step, spec, inputs, given)
    with store.lock(f"{spec.pipeline}-{step}-{recipe.digest}", wait=note):
        cached = store.get(spec.pipeline, step, recipe.digest)
        if cached is not None:
            cached.verify()
            return cached
        for name in info.needs_pass:
            require_passed(inputs[name], spec.enforced)
        for artifact in inputs.values():
            artifact.verify()
        draft = store.draft(recipe)
        with progress_of(current.progress_dir, spec.pipeline, step) as progress, _readable_failures(step, store):
            context = StepContext(
                spec, info, load_function(spec.function), inputs, draft, store, progress, current.workers, current.home, note,
                given or {},
            )  # fmt: skip
            started = time.monotonic()
            getattr(import_module(f"rankd_pipeline.steps.{step}"), step)(context)
            draft.observed.update(seconds=round(time.monotonic() - started, 3), finished=time.time(), run_id=run_id, host=host_id())
            return store.publish(draft, inputs)


@contextmanager
def _readable_failures(step: str, store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RankdError(
                f"{step}: the disk that holds {store.uri} is full; nothing was published. Free space (`rankd gc` lists what may "
                "go) and run again: the step goes on from its last checkpoint."
            ) from None
        raise


@dataclass(frozen=True)
class Planned:
    """One row of `rankd plan`: whether the step would run, why, and about how long it took last time (s)."""

    step: str
    runs: bool
    reason: str
    seconds: float | None


def plan(spec: PipelineSpec, store: Store) -> list[Planned]:
    """What a run under `spec` would do, without doing any of it."""
    rows: list[Planned] = []
    done: dict[str, Artifact] = {}
    for step, info in STEPS.items():
        previous = [item for item in store.artifacts(spec.pipeline, step) if item.manifest["recipe"]["scale"] == spec.scale]
        seconds = max((float(item.observed.get("seconds", 0.0)) for item in previous), default=None)
        blocked = [name for name in info.inputs if name not in done]
        if blocked:
            rows.append(Planned(step, True, f"its input {blocked[0]} would be made anew", seconds))
            continue
        recipe = recipe_of(step, spec, {name: done[name] for name in info.inputs})
        try:
            artifact = store.get(spec.pipeline, step, recipe.digest)
        except ArtifactDamaged as error:
            rows.append(Planned(step, True, str(error), seconds))
            continue
        if artifact is not None:
            done[step] = artifact
            rows.append(Planned(step, False, artifact.skipped or "stored", artifact.observed.get("seconds")))
        else:
            rows.append(Planned(step, True, _why(recipe, previous), seconds))
    return rows


def _why(recipe: Recipe, previous: list[Artifact]) -> str:
    """The smallest difference between a recipe and those that the store holds for the step."""
    if not previous:
        return f"never made at scale {recipe.scale}"
    differences = [_difference(recipe.as_json(), item.manifest["recipe"]) for item in previous]
    return "changed: " + ", ".join(min(differences, key=len))


def _difference(new: Any, old: Any, at: str = "") -> list[str]:
    if isinstance(new, dict) and isinstance(old, dict):
        keys = dict.fromkeys([*new, *old])
        return [line for key in keys for line in _difference(new.get(key), old.get(key), f"{at}.{key}" if at else str(key))]
    return [] if new == old else [at]
