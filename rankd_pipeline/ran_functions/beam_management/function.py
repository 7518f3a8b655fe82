"""Beam management (TR 38.843 BM-Case 1 and 2): from the L1-RSRP of a few wide beams to the best narrow beam."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema, LabelSpec
from rankd_pipeline.errors import RankdError
from rankd_pipeline.radio.waves import max_doppler_hz
from rankd_pipeline.ran_functions.beam_management.config import (
    SHIFTS,
    BeamCorpusConfig,
    field_config,
    transmit_power_per_re_dbm,
)
from rankd_pipeline.ran_functions.contract import Arrays, Baseline, Metric, Predictor, RanFunction
from rankd_pipeline.ran_functions.drops import drop_columns
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec
from rankd_pipeline.spec import validated

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch

    from rankd_pipeline.distillation.heads import Head

RSRP, MASK, TRUTH = "l1_rsrp_dbm", "l1_rsrp_mask", "rsrp_set_a_dbm"
# TS 38.133 Table 10.1.16.1-1: what an L1-RSRP report can say, with a margin for what is measured before reporting.
RSRP_RANGE_DBM = (-156.0, -31.0)


class BeamManagement(RanFunction):
    """Which of the narrow beams (Set A) is best, given reports on the wide SSB beams (Set B)."""

    name = "beam_management"
    title = "Beam management"
    metric = Metric("top1", "fraction", higher_is_better=True, is_rate=True)
    secondary_metrics = (
        Metric("top4", "fraction", higher_is_better=True, is_rate=True),
        Metric("within_1db", "fraction", higher_is_better=True, is_rate=True),
        Metric("l1_rsrp_loss_db", "dB", higher_is_better=False, is_rate=False),
    )
    gap_baseline = "best_of_set_b"
    code_versions = {"simulate": "7", "labels": "8", "networks": "4", "baselines": "4", "metrics": "2"}

    def corpus_config(self, raw: Mapping[str, Any]) -> BeamCorpusConfig:
        return validated(BeamCorpusConfig, dict(raw), "steps.corpus.simulation")

    def signatures(self, cfg: BeamCorpusConfig, budget_us: float) -> tuple[ModelSignature, ...]:
        axes, shape = ("ssb_instant", "ssb_beam"), (cfg.history, cfg.n_set_b)
        return (
            ModelSignature(
                name="beam_student",
                budget_us=budget_us,
                inputs=(
                    TensorSpec(name=RSRP, axes=axes, shape=shape, unit="dBm"),
                    TensorSpec(name=MASK, axes=axes, shape=shape, unit="1", dtype="uint8"),
                ),
                outputs=(TensorSpec(name="beam_probability", axes=("narrow_beam",), shape=(cfg.n_set_a,), unit="probability"),),
                masks={RSRP: MASK},
            ),
        )

    def head(self) -> "Head":
        from rankd_pipeline.distillation.heads import ClassificationHead

        return ClassificationHead()

    # -- corpus ---------------------------------------------------------------------------------------------------
    def plan(self, cfg: BeamCorpusConfig, seed: int) -> Sequence[Any]:
        from rankd_pipeline.ran_functions.beam_management.simulate import plan_shards

        return plan_shards(cfg, seed)

    def simulate(self, cfg: BeamCorpusConfig, shard: Any) -> "tuple[pa.Table, pa.Table]":
        from rankd_pipeline.ran_functions.beam_management.simulate import simulate_shard

        tables = simulate_shard(cfg, shard)
        return tables.features, tables.truth

    def schema(self, cfg: BeamCorpusConfig) -> CorpusSchema:
        axes, shape = ("ssb_instant", "ssb_beam"), (cfg.history, cfg.n_set_b)
        unreported = 1.0 - cfg.beams_in_report / cfg.n_set_b
        columns = (
            *drop_columns(),
            ColumnSpec(name=RSRP, dtype="float32", axes=axes, shape=shape, unit="dBm", valid_range=RSRP_RANGE_DBM, mask=MASK,
                       expected_missing=unreported),
            ColumnSpec(name=MASK, dtype="uint8", axes=axes, shape=shape, role="mask"),
        )  # fmt: skip
        return CorpusSchema(
            columns=columns, site_column="site", band_column="band_ghz", source_column="source",
            label=LabelSpec(classes=cfg.n_set_a), balance_columns=("site", "scenario"),
        )  # fmt: skip

    # -- labels ---------------------------------------------------------------------------------------------------
    def delivered_labels(self, truth: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        return pa.table({"sample_id": truth["sample_id"], "label": truth["sweep_beam"].cast(pa.int32())})

    def oracle_labels(self, truth: "pa.Table", softness: float = 0.0) -> "pa.Table":
        """The genie's beam; with softness (dB), beams close to it in noise-free RSRP share the label: softmax(RSRP / softness)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from rankd_pipeline.store.tensors import column_array, tensor_array

        known = truth.filter(pc.field("best_beam") >= 0)
        columns = {"sample_id": known["sample_id"], "label": known["best_beam"].cast(pa.int32())}
        if softness > 0:
            rsrp = column_array(known[TRUTH])
            weight = np.exp((rsrp - rsrp.max(axis=1, keepdims=True)) / softness)
            columns["target"] = tensor_array((weight / weight.sum(axis=1, keepdims=True)).astype(np.float16))
        return pa.table(columns)

    # -- models ---------------------------------------------------------------------------------------------------
    @property
    def feature_columns(self) -> tuple[str, ...]:
        return (RSRP, MASK)

    def model_inputs(self, features: Arrays) -> dict[str, np.ndarray]:
        return {RSRP: np.asarray(features[RSRP], np.float32), MASK: np.asarray(features[MASK], np.uint8)}

    def teacher(self, cfg: BeamCorpusConfig, network: Mapping[str, Any]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.beam_management.networks import BeamTransformer

        return BeamTransformer(
            set_b_rows=cfg.set_b.rows, set_b_cols=cfg.set_b.cols, set_a_rows=cfg.array.rows, set_a_cols=cfg.array.cols,
            history=cfg.history, **network,
        )  # fmt: skip

    def student(self, cfg: BeamCorpusConfig, network: Mapping[str, Any]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.beam_management.networks import BeamMLP

        return BeamMLP(
            set_b_rows=cfg.set_b.rows, set_b_cols=cfg.set_b.cols, set_a_rows=cfg.array.rows, set_a_cols=cfg.array.cols,
            history=cfg.history, **network,
        )  # fmt: skip

    def set_statistics(self, module: "torch.nn.Module", inputs: Arrays) -> None:
        module.get_submodule("normalizer").learn(inputs[RSRP], inputs[MASK])  # type: ignore[operator]

    def ssl_loss(self, module: "torch.nn.Module", batch: Any, mask_share: tuple[float, float]) -> Any:
        from rankd_pipeline.ran_functions.beam_management.networks import masked_modelling_loss

        return masked_modelling_loss(module, batch[RSRP], batch[MASK], *mask_share)  # type: ignore[arg-type]

    def deployable(self, module: "torch.nn.Module", calibration: Mapping[str, float]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.beam_management.networks import Deployable

        return Deployable(module, calibration["temperature"])

    # -- judgement ------------------------------------------------------------------------------------------------
    def baselines(self, cfg: BeamCorpusConfig) -> tuple[Baseline, ...]:
        from rankd_pipeline.ran_functions.beam_management import baselines

        return baselines.all_baselines(cfg)

    @property
    def evaluation_columns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("drop_id", "site", "band_ghz", "split"), (TRUTH, "los", "indoor", "hierarchical_beam", "dedicated_beam")

    def evaluate(
        self, models: Mapping[str, Predictor], features: Arrays, truth: Arrays, split: str, calibrated: frozenset[str]
    ) -> "pd.DataFrame":
        from rankd_pipeline.evaluation.table import concat_tables
        from rankd_pipeline.ran_functions.beam_management.metrics import evaluate_scores

        meta = {"split": np.asarray(split), "los": truth["los"], "indoor": truth["indoor"]}
        meta.update({name: np.asarray(features[name]) for name in ("drop_id", "site", "band_ghz")})
        return concat_tables(
            evaluate_scores(name, predict(features), {"rsrp_dbm": truth[TRUTH]}, meta, name in calibrated)
            for name, predict in models.items()
        )

    # -- the field ------------------------------------------------------------------------------------------------
    shifts = SHIFTS

    def field_config(self, cfg: BeamCorpusConfig, shifts: frozenset[str], rows: int) -> BeamCorpusConfig:
        return field_config(cfg, shifts, rows)

    def field_context(self, cfg: BeamCorpusConfig, features: Arrays, truth: Arrays) -> dict[str, np.ndarray]:
        from rankd_pipeline.radio.reports import noise_per_re_dbm

        ghz = np.asarray(features["band_ghz"], np.float64)
        bands = {float(np.float32(band.ghz)): band for band in cfg.bands}
        power_dbm, noise_dbm = np.zeros_like(ghz), np.zeros_like(ghz)
        for value in np.unique(ghz):
            band = bands[float(value)]
            at = ghz == value
            power_dbm[at] = transmit_power_per_re_dbm(cfg, band)
            noise_dbm[at] = noise_per_re_dbm(band.scs_khz, band.noise_figure_db)
        return {
            "delay_spread_ns": truth["delay_spread_ns"],
            "doppler_hz": max_doppler_hz(features["speed_kmh"], ghz),
            "k_factor_db": np.where(truth["los"], truth["k_factor_db"], np.nan),
            "angle_spread_deg": truth["asd_deg"],
            "snr_db": power_dbm - truth["coupling_loss_db"] - noise_dbm,
        }

    def latency_cases(self, inputs: Arrays) -> dict[str, dict[str, np.ndarray]]:
        """All beams reported, four reported, none: a mask may not change the time, and the race shows it."""
        rsrp, mask = inputs[RSRP], inputs[MASK]
        strongest = np.argsort(np.where(mask > 0, rsrp, -np.inf), axis=-1)[..., -4:]
        four = np.zeros_like(mask)
        np.put_along_axis(four, strongest, 1, axis=-1)
        return {
            "as in the corpus": {RSRP: rsrp, MASK: mask},
            "four beams reported": {RSRP: np.where(four > 0, rsrp, 0).astype(np.float32), MASK: four & mask},
            "nothing reported": {RSRP: np.zeros_like(rsrp), MASK: np.zeros_like(mask)},
        }

    # -- reports from a file ----------------------------------------------------------------------------------------
    def example_rows(self, cfg: BeamCorpusConfig) -> str:
        names = _report_columns(cfg.history, cfg.n_set_b)
        return ",".join(names) + "\n" + ",".join(str(-90 - (3 * i) % 17) for i in range(len(names))) + "\n"

    def read_reports(self, path: Path, signature: ModelSignature) -> dict[str, np.ndarray]:
        """One report a row, one column a beam (`ssb_0_dbm` …, or `ssb_0_t0_dbm` … with history); empty = not reported."""
        instants, beams = signature.inputs[0].shape
        names = _report_columns(instants, beams)
        with path.open(newline="") as handle:
            reader = csv.DictReader(handle)
            absent = [name for name in names if name not in (reader.fieldnames or [])]
            if absent:
                raise RankdError(f"{path}: column {absent[0]!r} is missing; expected {names[0]} … {names[-1]}.")
            rows = [[_report_value(row[name], path, number, name) for name in names] for number, row in enumerate(reader, 2)]
        if not rows:
            raise RankdError(f"{path}: it has a header but no report; expected one report a row.")
        values = np.asarray(rows, np.float32).reshape(-1, instants, beams)
        mask = np.isfinite(values)
        return {RSRP: np.where(mask, values, 0.0).astype(np.float32), MASK: mask.astype(np.uint8)}


def _report_columns(instants: int, beams: int) -> list[str]:
    """Columns of a CSV of reports, oldest instant first."""
    if instants == 1:
        return [f"ssb_{beam}_dbm" for beam in range(beams)]
    return [f"ssb_{beam}_t{instant}_dbm" for instant in range(instants) for beam in range(beams)]


def _report_value(text: str | None, path: Path, row: int, column: str) -> float:
    if text is None or not text.strip():
        return float("nan")
    try:
        value = float(text)
    except ValueError:
        raise RankdError(f"{path}, row {row}, column {column!r}: found {text!r}, expected a number in dBm or nothing.") from None
    low, high = RSRP_RANGE_DBM
    if not low <= value <= high:
        raise RankdError(f"{path}, row {row}, column {column!r}: {value:g} dBm is outside {low:g} to {high:g} dBm; check its unit.")
    return value


FUNCTION = BeamManagement
