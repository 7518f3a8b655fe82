"""The contract between a RAN function (what is learned) and the steps (what is done to it).

A function brings domain code; a step knows no function by name. Light on purpose: nothing here imports torch.
Shapes: n samples, C classes or outputs. A *features* or *truth* dict maps column names to arrays with n as first axis.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rankd_pipeline.errors import RankdError
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch
    from pydantic import BaseModel

    from rankd_pipeline.audit.schema import CorpusSchema
    from rankd_pipeline.distillation.heads import Head
    from rankd_pipeline.drift.causes import Cause

ESTIMATE_AND_HALF_WIDTH = "estimate_half_width"
"""The first axis of an answer that comes with the half width of its interval."""
Arrays = Mapping[str, np.ndarray]
Predictor = Callable[[Arrays], np.ndarray]
"""features -> scores [n, C] (any scale; larger is better), or the head's `predictive` outputs where the caller says so.

A function that is judged in closed loop may return an object from `network_predictor` that can also be stepped."""
Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""A deployed model (an ONNX session, a bundle): tensors of its signature in, named outputs out, batch first."""


@dataclass(frozen=True)
class Metric:
    """The headline metric: its name in the evaluation table, unit, and direction."""

    name: str
    unit: str
    higher_is_better: bool
    is_rate: bool
    """True for a share of samples: only then a ratio student / teacher (retention) makes sense."""
    aggregate: str = "mean"
    """How rows of the evaluation table become the score (see evaluation/bootstrap.py), e.g. `cells_db(snr)`."""

    def difference(self, share: float, score: float) -> float:
        """What `share` (0.01: one per cent) of `score` is in the metric's unit: points of a rate, dB of the power behind dB."""
        if self.is_rate:
            return share
        return 10.0 * math.log10(1.0 + share) if self.unit == "dB" else share * abs(score)


@dataclass(frozen=True)
class Baseline:
    """A method the networks are compared with.

    learned baselines are printed beside the teacher; non-learned ones set the gate. fit gets train and validation
    columns (with label) and returns the predictor; needs_truth names truth columns that hold the baseline's own
    measurements (a sweep that was made in the field, say).
    """

    name: str
    learned: bool
    fit: Callable[[Arrays, Arrays, int], Predictor]
    needs_truth: tuple[str, ...] = ()
    gate: bool = True
    """False for a reference, printed with the others: it spends more measurements than the networks, or is a part of them."""


@dataclass(frozen=True)
class Group:
    """One block of the corpus with one shape. Functions with one shape have the single group `main`."""

    name: str
    shape: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shift:
    """A way in which a field can change: what happens, in a sentence, and the cause that a drift report should name."""

    what: str
    cause: "Cause"


class RanFunction(ABC):
    """One RAN function. Subclasses live in `ran_functions/<name>/function.py` and import heavy packages inside methods."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[Metric]
    secondary_metrics: ClassVar[tuple[Metric, ...]] = ()
    self_labelled: ClassVar[bool] = False
    """True where the label is a part of the sample itself that a task hides (masked modelling): nothing is stored twice."""
    gap_baseline: ClassVar[str]
    """The baseline that generalisation is measured against: what it loses on a held-out site is the site's doing."""
    code_versions: ClassVar[Mapping[str, str]]
    """Version of each facet module (simulate, labels, networks, baselines, metrics); part of the recipes they shape."""

    # -- what is delivered ----------------------------------------------------------------------------------------
    @abstractmethod
    def corpus_config(self, raw: Mapping[str, Any]) -> "BaseModel":
        """The corpus configuration of this function. Raises: RankdError naming the key."""

    @abstractmethod
    def signatures(self, cfg: Any, budget_us: float) -> tuple[ModelSignature, ...]:
        """The deployed models (most functions: one), each with budget, named tensors, masks, carried state."""

    def student_signature(self, cfg: Any, network: Mapping[str, Any], budget_us: float) -> ModelSignature:
        """The signature of the student that `network` describes; the default is the same for every network.

        Student candidates may differ in their carried state (a GRU's is its hidden units), in nothing else.
        """
        return self.signatures(cfg, budget_us)[0]

    @abstractmethod
    def head(self) -> "Head":
        """What follows from the kind of output: losses, calibration, distillation (see distillation/heads.py)."""

    # -- corpus ---------------------------------------------------------------------------------------------------
    def groups(self, cfg: Any) -> tuple[Group, ...]:
        """Blocks of like shape."""
        return (Group("main", {}),)

    @abstractmethod
    def plan(self, cfg: Any, seed: int) -> Sequence[Any]:
        """Independent shards of the simulation; each carries its own seed."""

    @abstractmethod
    def simulate(self, cfg: Any, shard: Any) -> "tuple[pa.Table, pa.Table]":
        """(features, truth) of one shard: same shard, same bytes, in any process."""

    @abstractmethod
    def schema(self, cfg: Any) -> "CorpusSchema":
        """Columns, units, physical ranges of the features: what the audit and the import check against."""

    # -- labels ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def delivered_labels(self, truth: "pa.Table") -> "pa.Table":
        """(sample_id, label): what the field delivers for labelled samples, e.g. a measured full sweep.

        A label is a class, or a fixed-shape tensor of real numbers (a channel, the BLER of each MCS).
        """

    @abstractmethod
    def oracle_labels(self, truth: "pa.Table", softness: float = 0.0) -> "pa.Table":
        """(sample_id, label[, target]): the simulator's own answer.

        With softness > 0 the column `target` [C] is a distribution over classes that are nearly as good as the label.
        """

    def own_labels(self, features: Arrays) -> np.ndarray:
        """The label [n, ...] of each row of a self-labelled function."""
        raise RankdError(f"{self.name} is not self-labelled: its labels are stored, and oracle_labels has them.")

    def without_labels(self, features: Arrays) -> Arrays:
        """Features as the deployed model is given them: of a self-labelled function, with each row's own label masked."""
        return features

    def with_labels(self, features: Arrays, label: np.ndarray) -> Arrays:
        """The inverse: features whose own labels, masked in what the model was given, are known again."""
        return features

    # -- models ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def model_inputs(self, features: Arrays) -> dict[str, np.ndarray]:
        """The tensors of the signature, from feature columns: all a network may see."""

    @property
    @abstractmethod
    def feature_columns(self) -> tuple[str, ...]:
        """Feature columns that `model_inputs` reads."""

    @abstractmethod
    def teacher(self, cfg: Any, network: Mapping[str, Any]) -> "torch.nn.Module":
        """The large network, untrained; forward(**model inputs) -> [n, C] before calibration."""

    @abstractmethod
    def student(self, cfg: Any, network: Mapping[str, Any]) -> "torch.nn.Module":
        """The small network, untrained, same forward as the teacher's."""

    @abstractmethod
    def set_statistics(self, module: "torch.nn.Module", inputs: Arrays) -> None:
        """Fix input scaling from training inputs; it is stored with the weights and exported with the graph."""

    @abstractmethod
    def ssl_loss(self, module: "torch.nn.Module", batch: Any, mask_share: tuple[float, float]) -> Any:
        """Self-supervised loss of a batch (masked modelling)."""

    def training_inputs(self, features: Arrays) -> dict[str, np.ndarray]:
        """What a training batch is drawn from, where views need more than the model inputs (a whole channel to mask)."""
        return self.model_inputs(features)

    def augment(self, batch: Any, **options: Any) -> Any:
        """A training batch as seen this time; the default changes nothing."""
        return batch

    def views(self, batch: Any, **options: Any) -> Sequence[Any]:
        """The ways in which a training batch is seen at once, each with model inputs and labels; the loss is their mean.

        Draws from torch's global generator, which is seeded by the step: teacher and student share what is drawn.
        """
        return (self.augment(batch, **options),)

    @abstractmethod
    def deployable(self, module: "torch.nn.Module", calibration: Mapping[str, float]) -> "torch.nn.Module":
        """The graph that is exported: reports as the standard delivers them in, calibrated outputs out."""

    def fit_calibration(self, module: "torch.nn.Module", features: Arrays, labels: np.ndarray) -> dict[str, float]:
        """What makes a network honest, fitted on labelled validation samples; by default the head's, from its outputs.

        features holds the feature columns and those that `evaluate` reads: a function that is judged in closed loop may
        tune its operating point there.
        """
        from rankd_pipeline.distillation.heads import outputs_of

        return self.head().fit_calibration(outputs_of(module, self.model_inputs(features)), labels)

    def network_predictor(self, module: "torch.nn.Module", calibration: Mapping[str, float]) -> Predictor:
        """A network with its calibration, as a predictor over feature columns."""
        from rankd_pipeline.distillation.heads import outputs_of

        head = self.head()
        return lambda features: head.predictive(outputs_of(module, self.model_inputs(features)), calibration)

    def deployed_predictor(self, run: Run, signature: ModelSignature) -> Predictor:
        """The very file (on onnxruntime, or as its bundle), as a predictor over feature columns."""
        return lambda features: run(self.model_inputs(features))[signature.decision.name]

    def answer(self, cfg: Any, budget_us: float) -> TensorSpec:
        """What a deployed predictor says of one sample, and telemetry carries; by default the decision of its signature."""
        return self.signatures(cfg, budget_us)[0].decision

    def calls(self, features: Arrays, signature: ModelSignature, run: Run) -> dict[str, np.ndarray]:
        """What the deployed model is called with in the field, one row a call: all tensors of its signature.

        The default is one call a sample. A function whose samples are histories steps through them with `run`, so that
        the carried state is a real one.
        """
        return self.model_inputs(features)

    # -- judgement ------------------------------------------------------------------------------------------------
    @abstractmethod
    def baselines(self, cfg: Any) -> tuple[Baseline, ...]:
        """Every baseline, non-learned ones first."""

    @property
    @abstractmethod
    def evaluation_columns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(feature columns, truth columns) that `evaluate` reads beside the inputs."""

    @abstractmethod
    def evaluate(
        self, models: Mapping[str, Predictor], features: Arrays, truth: Arrays, split: str, calibrated: frozenset[str]
    ) -> "pd.DataFrame":
        """The long table (model, split, unit, cell, metric, value, n) of all models on one split.

        calibrated names the models whose outputs are the head's `predictive` ones: probabilities, or estimates with
        intervals (they get calibration rows: `ece_bin_*`, or `covered`). A function that is judged in closed loop rolls
        out here instead of predicting sample by sample.
        """

    def end_metric(
        self, cfg: Any, models: Mapping[str, Predictor], features: Arrays, truth: Arrays, split: str, options: Mapping[str, Any],
        seed: int, on_progress: Callable[[int, int], None],
    ) -> "pd.DataFrame | None":  # fmt: skip
        """Rows of the metric that the estimates serve in the end (blocks lost in a decoder), or None where `evaluate` says it all.

        Dear to compute, so only the scorecard and the deployment ask, and for a baseline only once: the same models on the
        same samples, options and seed give the same rows.
        """
        return None

    # -- the field ------------------------------------------------------------------------------------------------
    shifts: ClassVar[Mapping[str, Shift]] = {}
    """Ways in which this function's field can change, by name; `rankd field` plays them."""

    def field_config(self, cfg: Any, shifts: frozenset[str], rows: int) -> Any:
        """The corpus configuration of the field that a deployed model works in: `rows` labelled training rows of it.

        Without a shift it is the network as it was when the model was deployed. Raises: RankdError if there is none.
        """
        raise RankdError(f"{self.name}: it has no field to play (field_config in its function.py)")

    def field_group(self, cfg: Any) -> str:
        """The group of the corpus whose shape the deployed model's calls have."""
        return self.groups(cfg)[0].name

    def not_asked(self, cfg: Any, columns: Arrays) -> tuple[np.ndarray, str]:
        """Rows [n] of telemetry that the deployed model cannot have decided, by their features, and how one sees that."""
        return np.zeros(len(columns["time_s"]), bool), ""

    def field_context(self, cfg: Any, features: Arrays, truth: Arrays) -> dict[str, np.ndarray]:
        """True values [n] of the quantities of `telemetry.contract.CONTEXT` that a base station can estimate."""
        return {}

    def latency_cases(self, inputs: Arrays) -> dict[str, dict[str, np.ndarray]]:
        """Named input sets for the latency race; the worst one counts."""
        return {"typical": dict(inputs)}

    def deadlines(self, cfg: Any) -> dict[str, float]:
        """Named times (us) after which an answer comes too late, shown beside the latency; none by default."""
        return {}

    def network_figures(self, networks: "Mapping[str, torch.nn.Module]", features: Arrays) -> Iterator[tuple[str, bytes]]:
        """Pictures of the inside of networks (teacher and student, say) on a few rows, as (name, PNG)."""
        return iter(())

    def figures(self, models: Mapping[str, Predictor], features: Arrays, truth: Arrays) -> Iterator[tuple[str, bytes]]:
        """Extra pictures for the report as (caption, PNG)."""
        return iter(())

    def table_figures(self, table: "pd.DataFrame") -> Iterator[tuple[str, bytes]]:
        """Pictures drawn from the evaluation table of a judging step, as (name, PNG)."""
        return iter(())

    def example_rows(self, cfg: Any) -> "str | None":
        """A few lines of CSV that `rankd predict` accepts, or None."""
        return None

    def read_reports(self, path: Path, signature: ModelSignature) -> dict[str, np.ndarray]:
        """Model inputs from a user's CSV of reports. Raises: RankdError naming row and column."""
        raise RankdError(f"{self.name} has no CSV form of its reports; call the bundle from Python, as its model card shows.")
