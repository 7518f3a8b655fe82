"""Channel prediction: the hidden part of a channel over time or frequency from what was received (WiFo, Tiny-WiFo)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema, LabelSpec
from rankd_pipeline.radio.waves import max_doppler_hz
from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, SHIFTS, ChannelCorpusConfig, field_config
from rankd_pipeline.ran_functions.channel_prediction.patches import (
    TASKS,
    coordinates,
    hidden_patches,
    network_inputs,
    random_kept,
    visible_patches,
    wanted_patches,
    with_hidden,
)
from rankd_pipeline.ran_functions.contract import (
    ESTIMATE_AND_HALF_WIDTH,
    Arrays,
    Baseline,
    Group,
    Metric,
    Predictor,
    RanFunction,
    Run,
)
from rankd_pipeline.ran_functions.drops import drop_columns
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec
from rankd_pipeline.spec import validated

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch

    from rankd_pipeline.distillation.heads import Head

BY_SET_AND_TASK = "db_of_cells(set,task)"


class ChannelPrediction(RanFunction):
    """A channel's hidden half from its visible one, for sets of any grid; the label is a part of the sample itself."""

    name = "channel_prediction"
    title = "Channel prediction"
    metric = Metric("nmse", "dB", higher_is_better=False, is_rate=False, aggregate=BY_SET_AND_TASK)
    secondary_metrics = (Metric("nmse_clean", "dB", higher_is_better=False, is_rate=False, aggregate=BY_SET_AND_TASK),)
    gap_baseline = "hold"
    self_labelled = True
    code_versions = {"simulate": "7", "labels": "20", "networks": "16", "baselines": "16", "metrics": "5"}

    def corpus_config(self, raw: Mapping[str, Any]) -> ChannelCorpusConfig:
        return validated(ChannelCorpusConfig, dict(raw), "steps.corpus.simulation")

    def signatures(self, cfg: ChannelCorpusConfig, budget_us: float) -> tuple[ModelSignature, ...]:
        """One file of one shape: it serves every set and task with as many visible and hidden patches as `deploy` names."""
        item, task = cfg.resolved[cfg.deploy.name], cfg.deploy.task
        seen, wanted = len(visible_patches(item.grid, task)), len(wanted_patches(item.grid, task))
        element, place = "instant_antenna_subcarrier_reim", "time_antenna_frequency"
        return (
            ModelSignature(
                name="channel_student",
                budget_us=budget_us,
                inputs=(
                    TensorSpec(name="visible_patches", axes=("visible_patch", element), shape=(seen, ELEMENTS), unit="1"),
                    TensorSpec(name="visible_at", axes=("visible_patch", place), shape=(seen, 3), unit="patch"),
                    TensorSpec(name="wanted_at", axes=("wanted_patch", place), shape=(wanted, 3), unit="patch"),
                ),
                outputs=(
                    TensorSpec(name="channel", axes=("wanted_patch", element), shape=(wanted, ELEMENTS), unit="1"),
                    TensorSpec(name="half_width", axes=("interval",), shape=(1,), unit="1"),
                ),
            ),
        )

    def head(self) -> "Head":
        from rankd_pipeline.ran_functions.channel_prediction.networks import MaskedHead

        return MaskedHead()

    # -- corpus ---------------------------------------------------------------------------------------------------
    def groups(self, cfg: ChannelCorpusConfig) -> tuple[Group, ...]:
        grids = {item.group: item for item in cfg.resolved.values()}
        return tuple(Group(name, {"csi": (item.tokens, ELEMENTS)}) for name, item in grids.items())

    def plan(self, cfg: ChannelCorpusConfig, seed: int) -> Sequence[Any]:
        from rankd_pipeline.ran_functions.channel_prediction.simulate import plan_shards

        return plan_shards(cfg, seed)

    def simulate(self, cfg: ChannelCorpusConfig, shard: Any) -> "tuple[pa.Table, pa.Table]":
        from rankd_pipeline.ran_functions.channel_prediction.simulate import simulate_shard

        return simulate_shard(cfg, shard)

    def schema(self, cfg: ChannelCorpusConfig) -> CorpusSchema:
        tokens = cfg.most_tokens
        axes = ("patch", "instant_antenna_subcarrier_reim")
        columns = (
            *drop_columns(),
            ColumnSpec(name="task", dtype="string", role="key", categories=TASKS),
            ColumnSpec(name="grid", dtype="int16", axes=("time_antenna_frequency",), shape=(3,), unit="patch",
                       valid_range=(1, 1024), role="context"),
            # Unit mean power over a set: +-30 dB of one entry around it is far outside any fading.
            ColumnSpec(name="csi", dtype="float32", axes=axes, shape=(tokens, ELEMENTS), unit="1", valid_range=(-32.0, 32.0),
                       mask="csi_mask", expected_missing=_padding(cfg), padded_by="group"),
            ColumnSpec(name="csi_mask", dtype="uint8", axes=axes, shape=(tokens, ELEMENTS), role="mask"),
        )  # fmt: skip
        return CorpusSchema(
            columns=columns, site_column="site", band_column="band_ghz", source_column="source", label=LabelSpec(classes=0),
            balance_columns=("task",),
        )  # fmt: skip

    # -- labels ---------------------------------------------------------------------------------------------------
    def delivered_labels(self, truth: "pa.Table") -> "pa.Table":
        return truth.select(["sample_id"]).slice(0, 0)

    def oracle_labels(self, truth: "pa.Table", softness: float = 0.0) -> "pa.Table":
        return truth.select(["sample_id"]).slice(0, 0)

    def own_labels(self, features: Arrays) -> np.ndarray:
        """The patches that the row's task hides, as received [n, M, E]."""
        return hidden_patches(features["csi"], features["grid"], features["task"])

    def without_labels(self, features: Arrays) -> Arrays:
        return _refilled(features, np.zeros_like(self.own_labels(features)), present=False)

    def with_labels(self, features: Arrays, label: np.ndarray) -> Arrays:
        return _refilled(features, label, present=True)

    # -- models ---------------------------------------------------------------------------------------------------
    @property
    def feature_columns(self) -> tuple[str, ...]:
        return ("csi", "grid", "task")

    def model_inputs(self, features: Arrays) -> dict[str, np.ndarray]:
        return network_inputs(features["csi"], features["grid"], features["task"])

    def training_inputs(self, features: Arrays) -> dict[str, np.ndarray]:
        return {"csi": np.asarray(features["csi"], np.float32), "grid": np.asarray(features["grid"], np.int16)}

    def views(
        self, batch: Any, *, mirror: bool = False, balanced: bool = False, random_mask: bool = True, **options: Any
    ) -> "list[dict[str, torch.Tensor]]":
        """Three views of a batch of one grid: future time hidden, upper frequencies hidden, random patches hidden.

        mirror: each sample by chance run backwards in time, seen from the panel's other side, or conjugated with its
        subcarriers in reverse; each is a channel that might as well have been (Doppler or angle change sign).
        balanced: samples weigh by the inverse of their power, so that the loss is twice the mean NMSE.
        random_mask: False leaves the third view out; its loss is several times that of the two tasks, and so is its noise.
        """
        import torch

        csi, grid = batch["csi"], tuple(int(size) for size in batch["grid"][0])
        if mirror:
            from rankd_pipeline.ran_functions.channel_prediction.alignment import mirrored

            csi = mirrored(csi[:, : math.prod(grid)], grid)
        at = torch.as_tensor(coordinates(grid), dtype=torch.float32, device=csi.device)
        csi, count = csi[:, : len(at)], len(csi)
        masks = []
        if random_mask:
            order = torch.rand(count, len(at), device=csi.device).argsort(dim=1)
            kept = random_kept(len(at))
            masks.append((order[:, :kept], order[:, kept:]))
        for task in TASKS:
            seen, wanted = (torch.as_tensor(part(grid, task), device=csi.device) for part in (visible_patches, wanted_patches))
            masks.append((seen.expand(count, -1), wanted.expand(count, -1)))

        def taken(index: torch.Tensor) -> torch.Tensor:
            return csi.gather(1, index.unsqueeze(-1).expand(-1, -1, csi.shape[-1]))

        found = [
            {"visible_patches": taken(seen), "visible_at": at[seen], "wanted_at": at[wanted], "label": taken(wanted),
             "has_label": batch["has_label"]}
            for seen, wanted in masks
        ]  # fmt: skip
        if balanced:
            for view in found:
                view["weight"] = 1.0 / view["label"].square().mean(dim=(1, 2), keepdim=True).clamp_min(1e-6)
        return found

    def teacher(self, cfg: ChannelCorpusConfig, network: Mapping[str, Any]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.channel_prediction.networks import masked_transformer

        return masked_transformer(**network)

    def student(self, cfg: ChannelCorpusConfig, network: Mapping[str, Any]) -> "torch.nn.Module":
        return self.teacher(cfg, network)

    def set_statistics(self, module: "torch.nn.Module", inputs: Arrays) -> None:
        """Nothing to learn: a set comes with unit mean power, and the networks scale no further."""

    def ssl_loss(self, module: "torch.nn.Module", batch: Any, mask_share: tuple[float, float]) -> Any:
        """The training loss itself: these networks are trained by masked modelling from the start."""
        import torch

        head = self.head()
        views = self.views({**batch, "has_label": torch.ones(len(batch["csi"]), device=batch["csi"].device)})
        names = ("visible_patches", "visible_at", "wanted_at")
        return sum(head.supervised_loss(module(**{name: view[name] for name in names}), view) for view in views) / len(views)

    def deployable(self, module: "torch.nn.Module", calibration: Mapping[str, float]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.channel_prediction.networks import Deployable

        return Deployable(module, calibration["radius"])

    def calls(self, features: Arrays, signature: ModelSignature, run: Run) -> dict[str, np.ndarray]:
        """Rows with as many visible and wanted patches as the file has room for, without padding."""
        return _served(self.model_inputs(features), *_room(signature))

    def deployed_predictor(self, run: Run, signature: ModelSignature) -> Predictor:
        """Rows of the file's shape; the others come back as NaN, and evaluation leaves them out for every model."""
        seen, wanted = _room(signature)

        def predict(features: Arrays) -> np.ndarray:
            inputs = self.model_inputs(features)
            fits = _fitting(inputs, seen, wanted)
            found = np.full((len(fits), 2, inputs["wanted_at"].shape[1], ELEMENTS), np.nan, np.float32)
            if fits.any():
                outputs = run(_served(inputs, seen, wanted))
                answers = np.zeros((int(fits.sum()), *found.shape[1:]), np.float32)
                answers[:, 0, :wanted] = outputs["channel"]
                answers[:, 1, :wanted] = outputs["half_width"][:, :, None]
                found[fits] = answers
            return found

        return predict

    def answer(self, cfg: ChannelCorpusConfig, budget_us: float) -> TensorSpec:
        """Estimate and half width of the interval of every wanted entry, as the predictor gives them."""
        channel = self.signatures(cfg, budget_us)[0].decision
        return TensorSpec(
            name="answer", axes=(ESTIMATE_AND_HALF_WIDTH, *channel.axes), shape=(2, *channel.shape), unit=channel.unit
        )

    # -- judgement ------------------------------------------------------------------------------------------------
    def baselines(self, cfg: ChannelCorpusConfig) -> tuple[Baseline, ...]:
        from rankd_pipeline.ran_functions.channel_prediction.baselines import all_baselines

        return all_baselines()

    @property
    def evaluation_columns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("drop_id", "site", "speed_kmh"), ("csi_clean",)

    def evaluate(
        self, models: Mapping[str, Predictor], features: Arrays, truth: Arrays, split: str, calibrated: frozenset[str]
    ) -> "pd.DataFrame":
        """Both tasks on every sample that all models answer, whatever the sample's own task."""
        from rankd_pipeline.evaluation.table import concat_tables
        from rankd_pipeline.ran_functions.channel_prediction.metrics import answered, evaluate_task

        tables = []
        for task in TASKS:
            asked = {**features, "task": np.full(len(features["grid"]), task)}
            predicted = {name: predict(asked) for name, predict in models.items()}
            keep = np.logical_and.reduce([answered(values) for values in predicted.values()])
            tables += [
                evaluate_task(name, values, features, truth, task, split, name in calibrated, keep)
                for name, values in predicted.items()
            ]
        return concat_tables(tables)

    # -- the field ------------------------------------------------------------------------------------------------
    shifts = SHIFTS

    def field_config(self, cfg: ChannelCorpusConfig, shifts: frozenset[str], rows: int) -> ChannelCorpusConfig:
        return field_config(cfg, shifts, rows)

    def field_group(self, cfg: ChannelCorpusConfig) -> str:
        return cfg.resolved[cfg.deploy.name].group

    def not_asked(self, cfg: ChannelCorpusConfig, columns: Arrays) -> tuple[np.ndarray, str]:
        """Rows of another grid or question than those of `deploy`, which the file has no shape for."""
        deployed = cfg.resolved[cfg.deploy.name]
        other_grid = (np.asarray(columns["grid"]) != deployed.grid).any(axis=1)
        how = f"columns 'grid' and 'task': the deployed model answers {deployed.group} patches and {cfg.deploy.task!r} only"
        return other_grid | (np.asarray(columns["task"]).astype(str) != cfg.deploy.task), how

    def field_context(self, cfg: ChannelCorpusConfig, features: Arrays, truth: Arrays) -> dict[str, np.ndarray]:
        """Doppler of the user's own speed, delay spread of its paths, SNR of the known channel."""
        ghz = np.asarray(features["band_ghz"], np.float64)
        return {
            "doppler_hz": max_doppler_hz(features["speed_kmh"], ghz),
            "delay_spread_ns": truth["delay_spread_ns"],
            "snr_db": np.full(len(ghz), cfg.snr_db),
        }

    def figures(self, models: Mapping[str, Predictor], features: Arrays, truth: Arrays) -> Iterator[tuple[str, bytes]]:
        from rankd_pipeline.ran_functions.channel_prediction.pictures import all_pictures

        return all_pictures(models, features)

    def network_figures(self, networks: "Mapping[str, torch.nn.Module]", features: Arrays) -> Iterator[tuple[str, bytes]]:
        from rankd_pipeline.ran_functions.channel_prediction.pictures import attention

        yield "attention_maps", attention(networks, features)

    def deadlines(self, cfg: ChannelCorpusConfig) -> dict[str, float]:
        """The coherence time of each set at its top speed, us: a prediction that takes longer is of no use."""
        return {name: 1e3 * item.coherence_ms for name, item in cfg.resolved.items()}


def _refilled(features: Arrays, hidden: np.ndarray, present: bool) -> dict[str, np.ndarray]:
    """Features with other hidden patches, which their mask says are `present` or not."""
    asked = features["grid"], features["task"]
    mask = with_hidden(features["csi_mask"], *asked, np.full(hidden.shape, present, features["csi_mask"].dtype))
    return {**features, "csi": with_hidden(features["csi"], *asked, hidden), "csi_mask": mask}


def _room(signature: ModelSignature) -> tuple[int, int]:
    """Visible and wanted patches of a deployed file."""
    return signature.inputs[0].shape[0], signature.inputs[2].shape[0]


def _served(inputs: Arrays, seen: int, wanted: int) -> dict[str, np.ndarray]:
    fits = _fitting(inputs, seen, wanted)
    sizes = {"visible_patches": seen, "visible_at": seen, "wanted_at": wanted}
    return {name: np.ascontiguousarray(inputs[name][fits, :size]) for name, size in sizes.items()}


def _fitting(inputs: Arrays, seen: int, wanted: int) -> np.ndarray:
    """Rows [n] with just so many visible and wanted patches."""
    counts = [(inputs[name][..., 0] >= 0).sum(axis=1) for name in ("visible_at", "wanted_at")]
    return (counts[0] == seen) & (counts[1] == wanted)


def _padding(cfg: ChannelCorpusConfig) -> float:
    """Share of the patches that are padding, as the sets are mixed."""
    most = cfg.most_tokens
    return 1.0 - sum(item.tokens for item in cfg.resolved.values()) / (most * len(cfg.sets))


FUNCTION = ChannelPrediction
