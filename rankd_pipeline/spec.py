"""What a pipeline's YAML says: the configuration of each step at each scale, its gates and its schedule."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rankd_pipeline.audit.schema import SourceInfo
from rankd_pipeline.drift.causes import Action, Cause
from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.gates import Gate
from rankd_pipeline.report.scorecard import TARGETS, Target

Scale = Literal["smoke", "laptop", "gpu"]
SCALES: tuple[Scale, ...] = ("smoke", "laptop", "gpu")
M = TypeVar("M", bound=BaseModel)
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CorpusStep(_Strict):
    """simulation: the function's own corpus configuration. source: an own Parquet or CSV instead (ingest.SourceConfig)."""

    simulation: dict[str, Any] = {}
    source: dict[str, Any] | None = None
    sources: tuple[SourceInfo, ...] = ()


class AuditStep(_Strict):
    """checks: settings of the audit (audit.AuditConfig)."""

    checks: dict[str, Any] = {}


class SslStep(_Strict):
    """fit: training settings. mask_share: range of the share of entries masked. Skipped at or above skip_labelled_share."""

    fit: dict[str, Any] = {}
    mask_share: tuple[Share, Share] = (0.3, 0.5)
    skip_labelled_share: float = 0.8
    enabled: bool = True


class LabelsStep(_Strict):
    """precedence: which provenance wins where several label a sample. annotations: an expert CSV under the home, or None.

    softness: how far the oracle's label spreads over answers that are nearly as good, in the unit of the function's
    quality (beam management: dB of RSRP); 0 keeps the bare class.
    """

    precedence: tuple[Literal["expert", "simulation_oracle", "classical_sweep"], ...] = (
        "expert",
        "simulation_oracle",
        "classical_sweep",
    )
    annotations: str | None = None
    softness: float = Field(default=0.0, ge=0)


class TeacherStep(_Strict):
    """network: the function's keywords. fit: training settings. loss: the function's keywords for its teacher loss."""

    network: dict[str, Any] = {}
    fit: dict[str, Any] = {}
    loss: dict[str, Any] = {}


class ScorecardStep(_Strict):
    """resamples: bootstrap resamples by drop. learned_baselines: fitted and printed beside the teacher.

    end_metric: the function's keywords of its end metric (channel estimation: decoding.DecodingConfig).
    """

    resamples: int = Field(default=2000, ge=100)
    end_metric: dict[str, Any] = {}
    learned_baselines: tuple[str, ...] = ()


class SoftLabelsStep(_Strict):
    batch: int = Field(default=2048, ge=1)


class StudentCandidate(_Strict):
    """One student network: the function's keywords, training settings, keywords of its loss."""

    network: dict[str, Any] = {}
    fit: dict[str, Any] = {}
    loss: dict[str, Any] = {}


class StudentStep(_Strict):
    """temperatures: swept on the first seed where there are several; alpha: weight of the teacher's part of a response loss.

    distillation: how the distilled arm learns from the teacher (distillation.distiller.DistillationConfig).

    candidates: named student networks, each with what differs from network, fit and loss. All of them are distilled and
    quantized; the latency race and their scores decide which one is deployed.
    """

    network: dict[str, Any] = {}
    fit: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    candidates: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], StudentCandidate] = {}
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0, 8.0)
    alpha: Share = 0.7
    distillation: dict[str, Any] = {}
    paired_seeds: int = Field(default=5, ge=2)

    def named(self) -> dict[str, StudentCandidate]:
        """The candidates with what they share merged in; the only one is called `student` where none is named."""
        shared = {"network": self.network, "fit": self.fit, "loss": self.loss}
        own = {name: item.model_dump() for name, item in self.candidates.items()} or {"student": {}}
        return {name: StudentCandidate(**deep_merge(shared, item)) for name, item in own.items()}


class QuantizeStep(_Strict):
    """int8_optional: INT8 that misses its gates is left out and the candidate goes on in FP32 (default: it leaves the race)."""

    int8_optional: bool = False
    calibration_samples: int = Field(default=512, ge=8)
    parity_samples: int = Field(default=2000, ge=8)


class LatencyStep(_Strict):
    """budget_us: the function's time budget. race: settings of the latency harness (runtime.latency.LatencyConfig).

    limit_us: of several student candidates the best one whose p99.9 is proven within this is deployed (default: the budget).
    generated_c: C source takes part in the race and in the parity checks. It wins for small MLPs; a transformer's compiles for
    minutes and loses to the runtimes.
    """

    budget_us: float = Field(gt=0)
    limit_us: float | None = Field(default=None, gt=0)
    race: dict[str, Any] = {}
    generated_c: bool = True


class DeploymentStep(_Strict):
    registered_model: str = ""


class TelemetryStep(_Strict):
    """How telemetry is taken in and cut into windows (telemetry/windows.py), and who owns it.

    keep_hours: how far back an artifact reaches. future_s: rows from further ahead are from a wrong clock.
    Where telemetry joins a corpus as site data: judge_share of the labelled sessions is held back to judge the challenger
    by, val_share validates, and the rest trains with a weight of site_share of all training rows.
    """

    window_hours: float = Field(default=1.0, gt=0)
    min_rows: int = Field(default=1000, ge=1)
    max_hours: float = Field(default=24.0, gt=0)
    keep_hours: float = Field(default=48.0, gt=0)
    future_s: float = Field(default=3600.0, ge=0)
    owner: str = "operator"
    may_leave: bool = False
    judge_share: Share = 0.4
    val_share: Share = 0.15
    site_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3


class DriftStep(_Strict):
    """What counts as drift (drift/judge.py).

    reference_windows: how many windows of a champion's service show what is normal. alpha: chance of any false alarm in a
    window. min_psi: effect below which a significant shift is no drift. causes: what a cause asks for, where it is not
    the default (drift.causes.DEFAULT_ACTIONS).
    """

    reference_windows: int = Field(default=5, ge=1)
    alpha: float = Field(default=0.001, gt=0, lt=0.5)
    min_psi: float = Field(default=0.2, ge=0)
    min_labelled: int = Field(default=100, ge=2)
    causes: dict[Cause, Action] = {}


class ShadowStep(_Strict):
    """When a challenger takes over (evaluation/challenge.py).

    min_gain: it must be better by more than this on the labelled rows that were held back, in the unit of the function's
    score. alpha: chance of promoting one that is not, over all looks at one champion. max_forgetting: what share of the
    champion's score it may lose on the general test set: points of a rate, and of decibels the share of the power (0.01 is
    0.043 dB).
    """

    alpha: float = Field(default=0.01, gt=0, lt=0.5)
    min_gain: float = Field(default=0.005, ge=0)
    max_forgetting: float = Field(default=0.01, ge=0)
    min_labelled: int = Field(default=100, ge=2)
    min_sessions: int = Field(default=20, ge=2)


class StepConfigs(_Strict):
    corpus: CorpusStep = CorpusStep()
    audit_report: AuditStep = AuditStep()
    ssl_weights: SslStep = SslStep()
    oracle_labels: LabelsStep = LabelsStep()
    teacher: TeacherStep = TeacherStep()
    calibration_scorecard: ScorecardStep = ScorecardStep()
    soft_labels: SoftLabelsStep = SoftLabelsStep()
    student: StudentStep = StudentStep()
    quantized_onnx: QuantizeStep = QuantizeStep()
    latency_profile: LatencyStep
    deployment: DeploymentStep = DeploymentStep()
    telemetry: TelemetryStep = TelemetryStep()
    drift_report: DriftStep = DriftStep()
    shadow_run: ShadowStep = ShadowStep()


class Gates(_Strict):
    """The gates of each gated step; verdicts are computed at every scale and enforced above `smoke`."""

    calibration_scorecard: tuple[Gate, ...] = ()
    quantized_onnx: tuple[Gate, ...] = ()
    deployment: tuple[Gate, ...] = ()


class AblationArm(_Strict):
    """One way to train the student. arm: one of the head's. student: what differs from steps.student."""

    arm: str = "distilled"
    student: dict[str, Any] = {}


class AblationColumn(_Strict):
    """A column of the grid's tables: the headline metric on a split, on part of the cells."""

    split: str = "test"
    where: dict[str, str | list[str]] = {}


class Ablation(_Strict):
    """The grid of `rankd ablate`: arms over paired seeds. student: what differs from steps.student in all of them.

    tables: title -> arms and models of the scorecard, in order.
    """

    seeds: int = Field(default=5, ge=2)
    student: dict[str, Any] = {}
    reference: str = ""
    arms: dict[str, AblationArm] = {}
    columns: dict[str, AblationColumn] = {}
    tables: dict[str, tuple[str, ...]] = {}

    @model_validator(mode="after")
    def _reference_is_an_arm(self) -> "Ablation":
        if self.arms and self.reference not in self.arms:
            raise ValueError(f"reference {self.reference!r} is not one of the arms ({', '.join(self.arms)})")
        return self


class Schedule(_Strict):
    """Nightly re-distillation. cron: five fields; timezone: IANA name; enabled: switched on when the daemon starts."""

    cron: str = "0 2 * * *"
    timezone: str = "UTC"
    enabled: bool = False


class SensorSwitch(_Strict):
    """enabled: switched on when the daemon starts; it can be switched in the UI. interval_s: least time between its looks."""

    enabled: bool = False
    interval_s: int = Field(default=30, ge=5)


class DriftSensor(SensorSwitch):
    """cooldown_hours: after a re-distillation was started, none is started for so long. min_labelled: labelled rows that the
    drifted windows must have, or there is too little to learn from and to judge by."""

    cooldown_hours: float = Field(default=12.0, ge=0)
    min_labelled: int = Field(default=2000, ge=0)


class Sensors(_Strict):
    telemetry: SensorSwitch = SensorSwitch()
    drift: DriftSensor = DriftSensor()


class PipelineConfig(_Strict):
    """The `attributes` of a pipeline's defs.yaml.

    steps: the configuration at `laptop` scale. variants and scales: what differs, merged over it in that order, so that the
    sizes of a scale hold for every variant.
    targets: what a run is held against beside its gates, after those that hold for every function. ablation: the grid of
    `rankd ablate`; a scale may change parts of it under its own key `ablation`. redistill: what
    differs in steps when a champion is re-distilled on telemetry, merged last; the corpus stays what it is.
    """

    pipeline: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    function: str
    title: str = ""
    owners: tuple[str, ...] = ()
    steps: dict[str, Any]
    scales: dict[Scale, dict[str, Any]] = {}
    variants: dict[str, dict[str, Any]] = {}
    gates: Gates = Gates()
    targets: tuple[Target, ...] = ()
    ablation: Ablation = Ablation()
    schedule: Schedule = Schedule()
    sensors: Sensors = Sensors()
    redistill: dict[str, Any] = {}

    def at(self, scale: str = "laptop", seed: int = 0, variant: str = "default", site: "SiteData | None" = None) -> "PipelineSpec":
        """The effective configuration; with `site` that of a re-distillation.

        Raises: RankdError for an unknown scale or variant, or a value that does not validate (naming its key).
        """
        if scale not in SCALES:
            raise RankdError(f"scale {scale!r}: unknown; expected one of {', '.join(SCALES)}.")
        if variant != "default" and variant not in self.variants:
            known = ", ".join(["default", *self.variants])
            raise RankdError(f"variant {variant!r}: unknown in pipeline {self.pipeline}; expected one of {known}.")
        over = dict(self.scales.get(scale, {}))
        grid = deep_merge(self.ablation.model_dump(), over.pop("ablation", {}))
        merged = deep_merge(deep_merge(self.steps, self.variants.get(variant, {})), over)
        if "corpus" in self.redistill:
            raise RankdError(f"pipeline {self.pipeline}, redistill: it cannot change 'corpus'; site data join the corpus as it is.")
        if site is not None:
            merged = deep_merge(merged, self.redistill)
        steps = validated(StepConfigs, merged, f"pipeline {self.pipeline}, steps")
        return PipelineSpec(
            pipeline=self.pipeline, function=self.function, scale=scale, seed=seed, variant=variant, steps=steps, gates=self.gates,
            targets=(*TARGETS, *self.targets), ablation=validated(Ablation, grid, f"pipeline {self.pipeline}, ablation"), site=site,
        )  # fmt: skip


class SiteData(_Strict):
    """What a re-distillation adds to a chain, by content.

    telemetry: recipe of the artifact whose rows join the corpus. windows: which of them, [start_s, end_s). start: recipe of
    the deployment whose teacher and student are trained on; empty: from untrained networks.
    """

    telemetry: str
    windows: tuple[tuple[float, float], ...] = Field(min_length=1)
    start: str = ""


class PipelineSpec(_Strict):
    """One effective configuration: what the steps read."""

    pipeline: str
    function: str
    scale: str
    seed: int
    variant: str
    steps: StepConfigs
    gates: Gates
    targets: tuple[Target, ...] = TARGETS
    ablation: Ablation = Ablation()
    site: SiteData | None = None

    @property
    def students(self) -> dict[str, StudentCandidate]:
        """The student candidates by name."""
        return self.steps.student.named()

    @property
    def enforced(self) -> bool:
        """Gates stop the chain above smoke scale; at smoke they are computed and shown."""
        return self.scale != "smoke"

    def config_of(self, step: str, reads: Sequence[str] = ()) -> dict[str, Any]:
        """The configuration that enters a step's recipe, as JSON: its own, its gates, and the keys of others that it reads."""
        steps = self.steps.model_dump(mode="json")
        gates = [gate.model_dump(mode="json") for gate in getattr(self.gates, step, ())]
        others = {key: steps[key.split(".")[0]][key.split(".")[1]] for key in reads}
        return {**steps[step], "gates": gates, "function": self.function, "reads": others}


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings merge, everything else (lists too) replaces."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = deep_merge(merged[key], value) if both else value
    return merged


def validated(model: type[M], values: Any, where: str) -> M:
    """`values` as `model`, or one sentence that names the key, what was found and what was expected."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(_fields_at(model, first["loc"][:-1])) or "none"
            raise RankdError(f"{where}: unknown key {key!r}; expected one of: {known}.") from None
        found = "" if first["type"] == "missing" else f", found {first['input']!r}"
        raise RankdError(f"{where}: key {key!r}: {first['msg']}{found}.") from None


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)


def pipeline_files() -> dict[str, Path]:
    """Every pipeline's YAML in the package, by pipeline name."""
    root = Path(str(resources.files("rankd_pipeline"))) / "defs"
    return {path.parent.name: path for path in sorted(root.glob("*/defs.yaml"))}


def load_pipeline(name_or_path: str | Path) -> PipelineConfig:
    """A pipeline by name, or from any YAML file with the same `attributes`.

    Raises: RankdError if it is unknown, no YAML, or does not validate.
    """
    files = pipeline_files()
    path = files.get(str(name_or_path)) or Path(name_or_path)
    if not path.is_file():
        raise RankdError(f"{name_or_path}: no such pipeline; expected one of {', '.join(files)} or a path to a YAML file.")
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RankdError(f"{path}: not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(document, dict) or not isinstance(document.get("attributes"), dict):
        raise RankdError(f"{path}: expected a mapping with the keys 'type' and 'attributes'.")
    return validated(PipelineConfig, document["attributes"], str(path))
