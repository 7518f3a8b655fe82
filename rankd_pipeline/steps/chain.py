"""The chain at a glance: every step, what it reads, its code version, and which facets of a function shape it.

Light on purpose: orchestration and the CLI read it without importing a step.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepInfo:
    """One row of the chain.

    inputs: step names whose artifacts it reads. facets: the function modules whose code version is part of the recipe.
    reads: keys of other steps' configuration that shape this one, and so are part of its recipe.
    libraries: distributions whose version shapes the result. needs_pass: inputs whose gate verdict is read again here.
    """

    name: str
    title: str
    inputs: tuple[str, ...]
    code_version: str
    facets: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    needs_pass: tuple[str, ...] = ()
    on_host: bool = False
    reads: tuple[str, ...] = ("corpus.simulation",)


CHAIN: tuple[StepInfo, ...] = (
    StepInfo("corpus", "Channels or own measurements, as features, delivered labels and truth", (), "12",
             ("simulate",), ("sionna-no-rt", "torch", "numpy"), reads=()),
    StepInfo("audit_report", "The corpus health card; a blocking check", ("corpus",), "19", (), ("numpy", "scikit-learn"),
             reads=("corpus.simulation", "corpus.sources")),
    StepInfo("ssl_weights", "Self-supervised weights from the unlabelled corpus", ("corpus", "audit_report"), "8",
             ("networks",), ("torch",), ("audit_report",), reads=("corpus.simulation", "teacher.network")),
    StepInfo("oracle_labels", "Labels with their provenance and an estimate of their noise", ("corpus", "audit_report"), "8",
             ("labels",), ("numpy",), ("audit_report",)),
    StepInfo("teacher", "The large network, trained offline", ("corpus", "ssl_weights", "oracle_labels"), "10",
             ("networks",), ("torch",)),
    StepInfo("calibration_scorecard", "Does the teacher deserve to teach? A gate",
             ("corpus", "oracle_labels", "teacher"), "18", ("networks", "baselines", "metrics"), ("torch", "scikit-learn"),
             reads=("corpus.simulation", "teacher.network", "student.network", "student.fit", "student.loss",
                    "student.candidates")),
    StepInfo("soft_labels", "The calibrated teacher over the full corpus", ("corpus", "teacher", "calibration_scorecard"), "12",
             ("networks",), ("torch",), ("calibration_scorecard",),
             reads=("corpus.simulation", "teacher.network", "student.distillation")),
    StepInfo("student", "The small network: distilled against its controls",
             ("corpus", "oracle_labels", "teacher", "soft_labels", "calibration_scorecard"), "20", ("networks", "metrics"),
             ("torch",), ("calibration_scorecard",), reads=("corpus.simulation", "teacher.network")),
    StepInfo("quantized_onnx", "FP32 and INT8 ONNX with lineage inside, and their C; a gate",
             ("corpus", "student", "calibration_scorecard"), "19", ("networks", "metrics"),
             ("torch", "onnx", "onnxruntime", "emx-onnx-cgen"),
             ("calibration_scorecard",),
             reads=("corpus.simulation", "student.network", "student.candidates", "latency_profile.budget_us",
                    "latency_profile.generated_c", "calibration_scorecard.resamples")),
    StepInfo("latency_profile", "The race across runtimes against the budget; a gate",
             ("corpus", "student", "quantized_onnx"), "23",
             (), ("onnxruntime",), ("quantized_onnx",), on_host=True),
    StepInfo("deployment", "The bundle, its model card and its registered version",
             ("corpus", "audit_report", "oracle_labels", "teacher", "calibration_scorecard", "soft_labels", "student",
              "quantized_onnx", "latency_profile"), "27",
             ("baselines", "metrics"), ("onnxruntime",), ("calibration_scorecard", "quantized_onnx", "latency_profile"),
             reads=("corpus.simulation", "latency_profile.budget_us", "calibration_scorecard.resamples",
                    "calibration_scorecard.end_metric")),
)  # fmt: skip

STEPS: dict[str, StepInfo] = {info.name: info for info in CHAIN}

FIELD: tuple[StepInfo, ...] = (
    StepInfo("telemetry", "What came back from the field: finished files, taken in and cut into windows", (), "5",
             (), ("pyarrow",), reads=("corpus.simulation", "latency_profile.budget_us")),
    StepInfo("drift_report", "Has the field moved, how good is the champion there, and why: one judgement a window", ("telemetry",),
             "17", ("baselines",), ("scipy", "scikit-learn", "onnxruntime"),
             reads=("corpus.simulation", "latency_profile.budget_us")),
    StepInfo("shadow_run", "Challenger beside champion: over the stored telemetry, and on the general test set",
             ("deployment", "champion", "corpus", "telemetry"), "14", ("metrics",), ("onnxruntime", "scipy", "scikit-learn"),
             reads=("corpus.simulation", "latency_profile.budget_us", "telemetry.judge_share", "telemetry.val_share")),
)  # fmt: skip
"""Steps outside the chain: what comes back from the field. What they read depends on it, so steps/watch.py runs them."""

INFO: dict[str, StepInfo] = {**STEPS, **{info.name: info for info in FIELD}}
GATED = ("audit_report", "calibration_scorecard", "quantized_onnx", "latency_profile", "deployment")

SITE_INPUTS: dict[str, tuple[str, ...]] = {
    "corpus": ("base_corpus", "telemetry"),
    "ssl_weights": ("last_teacher",),
    "teacher": ("last_teacher",),
    "student": ("last_student",),
}
"""What a re-distillation on telemetry adds to the inputs of a step: the corpus without site data and the telemetry that joins
it, and the networks of the deployment that it starts from."""
