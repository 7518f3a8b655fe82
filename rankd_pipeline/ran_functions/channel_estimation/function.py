"""Channel estimation for PUSCH: from the LS estimates on the DMRS to the channel on the whole slot, and its error."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema, LabelSpec
from rankd_pipeline.errors import RankdError
from rankd_pipeline.radio.waves import max_doppler_hz
from rankd_pipeline.ran_functions.channel_estimation.config import SHIFTS, ChannelCorpusConfig, field_config
from rankd_pipeline.ran_functions.contract import ESTIMATE_AND_HALF_WIDTH, Arrays, Baseline, Metric, Predictor, RanFunction, Run
from rankd_pipeline.ran_functions.drops import drop_columns
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec
from rankd_pipeline.spec import validated

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch

    from rankd_pipeline.distillation.heads import Head

LS, NOISE, CHANNEL, VARIANCE = "ls", "noise_variance", "channel", "error_variance"
DMRS, SYMBOLS, PILOTS_A_BLOCK = (2, 11), 14, 3  # as radio/pusch.py has them, which imports Sionna
CELLS = "snr,ds,speed"


class ChannelEstimation(RanFunction):
    """The uplink channel of one user, layer and receive antenna over a slot; one call for each antenna.

    A model is made for one size of allocation (`resource_blocks`): its shapes are fixed, and its filter knows the band's edges.
    """

    name = "channel_estimation"
    title = "Channel estimation"
    metric = Metric("nmse", "dB", higher_is_better=False, is_rate=False, aggregate=f"cells_db({CELLS})")
    secondary_metrics = (
        # The SNR at which one block in ten is lost: where link adaptation works.
        Metric("block_error", "dB", higher_is_better=False, is_rate=False, aggregate="crossing(0.1,snr_db)"),
    )
    gap_baseline = "ls_linear"
    code_versions = {"simulate": "4", "labels": "7", "networks": "6", "baselines": "4", "metrics": "3"}

    def corpus_config(self, raw: Mapping[str, Any]) -> ChannelCorpusConfig:
        return validated(ChannelCorpusConfig, dict(raw), "steps.corpus.simulation")

    def signatures(self, cfg: ChannelCorpusConfig, budget_us: float) -> tuple[ModelSignature, ...]:
        pilots = PILOTS_A_BLOCK * cfg.resource_blocks
        return (
            ModelSignature(
                name="channel_student",
                budget_us=budget_us,
                inputs=(
                    TensorSpec(name=LS, axes=("re_im", "dmrs_symbol", "estimate"), shape=(2, len(DMRS), pilots), unit="1"),
                    TensorSpec(name=NOISE, axes=(), shape=(), unit="1"),
                ),
                outputs=(
                    TensorSpec(name=CHANNEL, axes=("re_im", "symbol", "subcarrier"), shape=(2, SYMBOLS, cfg.subcarriers), unit="1"),
                    TensorSpec(name=VARIANCE, axes=(), shape=(), unit="1"),
                ),
            ),
        )

    def head(self) -> "Head":
        from rankd_pipeline.distillation.heads import RegressionHead

        return RegressionHead(likelihood=True)

    # -- corpus ---------------------------------------------------------------------------------------------------
    def plan(self, cfg: ChannelCorpusConfig, seed: int) -> Sequence[Any]:
        from rankd_pipeline.ran_functions.channel_estimation.simulate import plan_shards

        return plan_shards(cfg, seed)

    def simulate(self, cfg: ChannelCorpusConfig, shard: Any) -> "tuple[pa.Table, pa.Table]":
        from rankd_pipeline.ran_functions.channel_estimation.simulate import simulate_shard

        tables = simulate_shard(cfg, shard)
        return tables.features, tables.truth

    def schema(self, cfg: ChannelCorpusConfig) -> CorpusSchema:
        axes, shape = ("re_im", "dmrs_symbol", "estimate"), (2, len(DMRS), PILOTS_A_BLOCK * cfg.resource_blocks)
        columns = (
            *drop_columns(),
            # Relative to the mean power of the user's channel, which no fade or noise of the covered SNR exceeds 20-fold.
            ColumnSpec(name=LS, dtype="float32", axes=axes, shape=shape, unit="1", valid_range=(-20.0, 20.0)),
            ColumnSpec(name=NOISE, dtype="float32", unit="1", valid_range=(1e-7, 10.0)),
        )  # fmt: skip
        return CorpusSchema(
            columns=columns, site_column="site", band_column="band_ghz", source_column="source", label=LabelSpec(classes=0),
            balance_columns=("site", "scenario"),
        )  # fmt: skip

    # -- labels ---------------------------------------------------------------------------------------------------
    def delivered_labels(self, truth: "pa.Table") -> "pa.Table":
        """The channel itself: only a simulator, or a laboratory with a cable, delivers it."""
        import pyarrow as pa

        return pa.table({"sample_id": truth["sample_id"], "label": truth[CHANNEL]})

    def oracle_labels(self, truth: "pa.Table", softness: float = 0.0) -> "pa.Table":
        return self.delivered_labels(truth)

    # -- models ---------------------------------------------------------------------------------------------------
    @property
    def feature_columns(self) -> tuple[str, ...]:
        return (LS, NOISE)

    def model_inputs(self, features: Arrays) -> dict[str, np.ndarray]:
        return {LS: np.asarray(features[LS], np.float32), NOISE: np.asarray(features[NOISE], np.float32)}

    def teacher(self, cfg: ChannelCorpusConfig, network: Mapping[str, Any]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.channel_estimation.networks import UNet

        return UNet(cfg, **network)

    def student(self, cfg: ChannelCorpusConfig, network: Mapping[str, Any]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.channel_estimation.networks import STUDENTS

        keywords = dict(network)
        kind = keywords.pop("kind", "filter_bank")
        if kind not in STUDENTS:
            raise RankdError(f"student network: kind {kind!r} is unknown; expected one of {', '.join(STUDENTS)}.")
        return STUDENTS[kind](cfg, **keywords)

    def set_statistics(self, module: "torch.nn.Module", inputs: Arrays) -> None:
        """Nothing to learn: each sample is scaled by its own power."""

    def ssl_loss(self, module: "torch.nn.Module", batch: Any, mask_share: tuple[float, float]) -> Any:
        from rankd_pipeline.ran_functions.channel_estimation.networks import masked_pilots_loss

        return masked_pilots_loss(module, batch[LS], batch[NOISE], *mask_share)  # type: ignore[arg-type]

    def augment(self, batch: Any, **options: Any) -> Any:
        from rankd_pipeline.ran_functions.channel_estimation.networks import symmetric

        return symmetric(batch, **options) if options else batch

    def deployable(self, module: "torch.nn.Module", calibration: Mapping[str, float]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.channel_estimation.networks import Deployable

        return Deployable(module, calibration["radius"])  # type: ignore[arg-type]

    def deployed_predictor(self, run: Run, signature: ModelSignature) -> Predictor:
        from rankd_pipeline.distillation.heads import GAUSSIAN_90

        def predict(features: Arrays) -> np.ndarray:
            outputs = run(self.model_inputs(features))
            half = GAUSSIAN_90 * np.sqrt(outputs[VARIANCE] / 2)[:, None, None, None]
            return np.stack([outputs[CHANNEL], np.broadcast_to(half, outputs[CHANNEL].shape)], axis=1).astype(np.float32)

        return predict

    def answer(self, cfg: ChannelCorpusConfig, budget_us: float) -> TensorSpec:
        """The estimate and the half width of its 90 % interval, as `deployed_predictor` returns them."""
        channel = self.signatures(cfg, budget_us)[0].decision
        return channel.model_copy(update={"axes": (ESTIMATE_AND_HALF_WIDTH, *channel.axes), "shape": (2, *channel.shape)})

    # -- judgement ------------------------------------------------------------------------------------------------
    def baselines(self, cfg: ChannelCorpusConfig) -> tuple[Baseline, ...]:
        from rankd_pipeline.ran_functions.channel_estimation import baselines

        return baselines.all_baselines(cfg)

    @property
    def evaluation_columns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("drop_id", "site", "band_ghz", "speed_kmh"), (
            CHANNEL, "slot_id", "antenna", "snr_db", "delay_spread_ns", "path_power", "path_delay_ns", "path_correlation",
        )  # fmt: skip

    def evaluate(
        self, models: Mapping[str, Predictor], features: Arrays, truth: Arrays, split: str, calibrated: frozenset[str]
    ) -> "pd.DataFrame":
        from rankd_pipeline.evaluation.table import concat_tables
        from rankd_pipeline.ran_functions.channel_estimation.metrics import evaluate_estimates

        meta = {"split": np.asarray(split), "snr_db": truth["snr_db"], "delay_spread_ns": truth["delay_spread_ns"]}
        meta.update({name: np.asarray(features[name]) for name in ("drop_id", "site", "band_ghz", "speed_kmh")})
        channel = np.asarray(truth[CHANNEL], np.float32)
        return concat_tables(
            evaluate_estimates(name, predict(features), channel, meta, name in calibrated) for name, predict in models.items()
        )

    def end_metric(
        self, cfg: ChannelCorpusConfig, models: Mapping[str, Predictor], features: Arrays, truth: Arrays, split: str,
        options: Mapping[str, Any], seed: int, on_progress: Callable[[int, int], None],
    ) -> "pd.DataFrame":  # fmt: skip
        """Blocks lost through Sionna's LDPC chain, see `decoding`."""
        from rankd_pipeline.ran_functions.channel_estimation.metrics import DecodingConfig, block_errors

        sent = validated(DecodingConfig, dict(options), "steps.calibration_scorecard.end_metric")
        return block_errors(models, features, truth, split, cfg, sent, seed, on_progress)

    def table_figures(self, table: "pd.DataFrame") -> Iterator[tuple[str, bytes]]:
        from rankd_pipeline.ran_functions.channel_estimation.pictures import all_pictures

        return all_pictures(table)

    # -- the field ------------------------------------------------------------------------------------------------
    shifts = SHIFTS

    def field_config(self, cfg: ChannelCorpusConfig, shifts: frozenset[str], rows: int) -> ChannelCorpusConfig:
        return field_config(cfg, shifts, rows)

    def field_context(self, cfg: ChannelCorpusConfig, features: Arrays, truth: Arrays) -> dict[str, np.ndarray]:
        ghz = np.asarray(features["band_ghz"], np.float64)
        return {
            "delay_spread_ns": truth["delay_spread_ns"],
            "doppler_hz": max_doppler_hz(features["speed_kmh"], ghz),
            "snr_db": truth["snr_db"],
        }

    # -- reports from a file ----------------------------------------------------------------------------------------
    def example_rows(self, cfg: ChannelCorpusConfig) -> str:
        names = _columns(PILOTS_A_BLOCK * cfg.resource_blocks)
        values = ["0.01", *(f"{np.cos(0.3 * i) / (1 + i % 3):.3f}" for i in range(len(names) - 1))]
        return ",".join(names) + "\n" + ",".join(values) + "\n"

    def read_reports(self, path: Path, signature: ModelSignature) -> dict[str, np.ndarray]:
        """One slot and antenna a row: `noise_variance`, then LS estimates `re_2_0` … `im_11_11` (part, symbol, estimate)."""
        names = _columns(signature.inputs[0].shape[-1])
        with path.open(newline="") as handle:
            reader = csv.DictReader(handle)
            absent = [name for name in names if name not in (reader.fieldnames or [])]
            if absent:
                raise RankdError(f"{path}: column {absent[0]!r} is missing; expected {names[0]}, {names[1]} … {names[-1]}.")
            rows = [[_number(row[name], path, line, name) for name in names] for line, row in enumerate(reader, 2)]
        if not rows:
            raise RankdError(f"{path}: it has a header but no slot; expected one slot and antenna a row.")
        values = np.asarray(rows, np.float32)
        return {LS: values[:, 1:].reshape(-1, *signature.inputs[0].shape), NOISE: values[:, 0].copy()}


def _columns(pilots: int) -> list[str]:
    return [NOISE, *(f"{part}_{symbol}_{i}" for part in ("re", "im") for symbol in DMRS for i in range(pilots))]


def _number(text: str | None, path: Path, row: int, column: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or (column == NOISE and value <= 0):
        wanted = "a positive number" if column == NOISE else "a number"
        raise RankdError(f"{path}, row {row}, column {column!r}: found {text!r}, expected {wanted}.")
    return value


FUNCTION = ChannelEstimation
