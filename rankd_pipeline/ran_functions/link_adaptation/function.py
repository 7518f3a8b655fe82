"""Link adaptation (MAC scheduler): from CQI and HARQ history to the BLER of every MCS, and so to the MCS of the next slot."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema
from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.contract import Arrays, Baseline, Metric, Predictor, RanFunction, Run
from rankd_pipeline.ran_functions.drops import drop_columns
from rankd_pipeline.ran_functions.link_adaptation.config import BLER_TARGET, SHIFTS, SLOT_US, LinkCorpusConfig, field_config
from rankd_pipeline.ran_functions.link_adaptation.rollout import REPORT_FIELDS, Policy, roll_out, traces_of
from rankd_pipeline.ran_functions.link_adaptation.tables import N_CQI, N_MCS
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec
from rankd_pipeline.spec import validated

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch

    from rankd_pipeline.distillation.heads import Head

UNITS = {"cqi": "CQI index", "cqi_age_slots": "slots", "harq_mcs": "MCS index", "doppler_hz": "Hz", "allocated_prb": "PRB"}
# Columns of a CSV of slots with the range of each; harq is text.
CSV_COLUMNS: dict[str, tuple[float, float]] = {
    "cqi": (0, N_CQI - 1), "cqi_age_slots": (0, 255), "harq": (0, 0), "harq_mcs": (0, N_MCS - 1), "doppler_hz": (0, 5e3),
    "allocated_prb": (1, 275), "bler_target": (1e-4, 0.9),
}  # fmt: skip
META = ("drop_id", "site", "band_ghz", "doppler_hz")
DEFAULT_NETWORK = {"kind": "gru"}
TUNING_SEED = 17
"""Luck of the blocks while a decision rule is tuned; the tests have draws of their own."""
CALLS = 8
"""Slots of a window that stand for all of them where calls of the deployed model are wanted."""


class LinkAdaptation(RanFunction):
    """Which MCS to send with, a BLER target given, when the newest CQI is some slots old and HARQ feedback tells the rest."""

    name = "link_adaptation"
    title = "Link adaptation"
    metric = Metric("goodput", "bit/s/Hz", higher_is_better=True, is_rate=False)
    secondary_metrics = (
        Metric("goodput_p5", "bit/s/Hz", higher_is_better=True, is_rate=False, aggregate="quantile(0.05)"),
        Metric("goodput_share", "fraction", higher_is_better=True, is_rate=True),
        Metric("bler", "fraction", higher_is_better=False, is_rate=True),
        Metric("nack_bursts", "1/s", higher_is_better=False, is_rate=False),
        Metric("settling_slots", "slots", higher_is_better=False, is_rate=False),
    )
    gap_baseline = "olla"
    code_versions = {"simulate": "16", "labels": "11", "networks": "2", "baselines": "6", "metrics": "6"}

    def corpus_config(self, raw: Mapping[str, Any]) -> LinkCorpusConfig:
        return validated(LinkCorpusConfig, dict(raw), "steps.corpus.simulation")

    def signatures(self, cfg: LinkCorpusConfig, budget_us: float) -> tuple[ModelSignature, ...]:
        return (self.student_signature(cfg, DEFAULT_NETWORK, budget_us),)

    def student_signature(self, cfg: LinkCorpusConfig, network: Mapping[str, Any], budget_us: float) -> ModelSignature:
        """One call a slot; the size of the carried state is the network's."""
        state = self.student(cfg, network).state_size + 1  # and the price of a lost block
        fields = [TensorSpec(name=name, axes=(), shape=(), unit=UNITS.get(name, "1")) for name in REPORT_FIELDS]
        return ModelSignature(
            name="link_student",
            budget_us=budget_us,
            inputs=(
                *fields,
                TensorSpec(name="bler_target", axes=(), shape=(), unit="probability"),
                TensorSpec(name="state", axes=("memory",), shape=(state,), unit="1"),
            ),
            outputs=(
                TensorSpec(name="mcs_utility", axes=("mcs",), shape=(N_MCS,), unit="utility"),
                TensorSpec(name="bler", axes=("mcs",), shape=(N_MCS,), unit="probability"),
                TensorSpec(name="next_state", axes=("memory",), shape=(state,), unit="1"),
            ),
            masks={"harq_ack": "harq_mask", "harq_mcs": "harq_mask"},
            state={"state": "next_state"},
            slot_us=SLOT_US,
        )

    def head(self) -> "Head":
        from rankd_pipeline.ran_functions.link_adaptation.head import BlerHead

        return BlerHead()

    # -- corpus ---------------------------------------------------------------------------------------------------
    def plan(self, cfg: LinkCorpusConfig, seed: int) -> Sequence[Any]:
        from rankd_pipeline.ran_functions.link_adaptation.simulate import plan_shards

        return plan_shards(cfg, seed)

    def simulate(self, cfg: LinkCorpusConfig, shard: Any) -> "tuple[pa.Table, pa.Table]":
        from rankd_pipeline.ran_functions.link_adaptation.simulate import simulate_shard

        return simulate_shard(cfg, shard)

    def schema(self, cfg: LinkCorpusConfig) -> CorpusSchema:
        axes, shape = ("slot",), (cfg.window_slots,)
        late = cfg.feedback.harq_delay_slots[1] / cfg.window_slots
        columns = (
            *drop_columns(highest_ghz=7.125),
            ColumnSpec(name="policy", dtype="string", role="key"),
            ColumnSpec(name="harq_delay_slots", dtype="uint8", unit="slots", valid_range=(0, 64), role="context"),
            ColumnSpec(name="doppler_hz", dtype="float32", unit="Hz", valid_range=(0.0, 5e3)),
            ColumnSpec(name="allocated_prb", dtype="int16", unit="PRB", valid_range=(1, 275)),
            ColumnSpec(name="cqi", dtype="uint8", axes=axes, shape=shape, unit="CQI index", valid_range=(0, N_CQI - 1)),
            ColumnSpec(name="cqi_age_slots", dtype="uint8", axes=axes, shape=shape, unit="slots", valid_range=(0, 255)),
            ColumnSpec(name="harq_ack", dtype="uint8", axes=axes, shape=shape, valid_range=(0, 1), mask="harq_mask",
                       expected_missing=late),
            ColumnSpec(name="harq_mask", dtype="uint8", axes=axes, shape=shape, role="mask"),
            ColumnSpec(name="harq_mcs", dtype="uint8", axes=axes, shape=shape, unit="MCS index", valid_range=(0, N_MCS - 1),
                       mask="harq_mask", expected_missing=late),
        )  # fmt: skip
        return CorpusSchema(
            columns=columns, site_column="site", band_column="band_ghz", source_column="source",
            balance_columns=("site", "scenario"),
        )  # fmt: skip

    # -- labels ---------------------------------------------------------------------------------------------------
    def delivered_labels(self, truth: "pa.Table") -> "pa.Table":
        """What HARQ says of every MCS: an ACK frees those below it, a NACK damns those above; 0.5 where neither tells."""
        import pyarrow as pa

        from rankd_pipeline.store.tensors import column_array, tensor_array

        mcs, ack = column_array(truth["sent_mcs"])[..., None], column_array(truth["sent_ack"])[..., None] > 0
        index = np.arange(N_MCS)
        label = np.where(ack & (index <= mcs), 0.0, np.where(~ack & (index >= mcs), 1.0, 0.5))
        return pa.table({"sample_id": truth["sample_id"], "label": tensor_array(label.astype(np.float16))})

    def oracle_labels(self, truth: "pa.Table", softness: float = 0.0) -> "pa.Table":
        """The true BLER of every MCS in every slot [L, M]. softness has no meaning here: the label is a probability already."""
        import pyarrow as pa

        if softness > 0:
            raise RankdError("steps.oracle_labels.softness: link adaptation's labels are probabilities; leave it at 0.")
        return pa.table({"sample_id": truth["sample_id"], "label": truth["bler"]})

    # -- models ---------------------------------------------------------------------------------------------------
    @property
    def feature_columns(self) -> tuple[str, ...]:
        return REPORT_FIELDS

    def model_inputs(self, features: Arrays) -> dict[str, np.ndarray]:
        """Windows [n, L] of what arrives in each slot, doppler_hz and allocated_prb [n]; the networks read them in order."""
        return {name: np.asarray(features[name], np.float32) for name in REPORT_FIELDS}

    def teacher(self, cfg: LinkCorpusConfig, network: Mapping[str, Any]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.link_adaptation.networks import LinkRecurrent

        return LinkRecurrent(**network)

    def student(self, cfg: LinkCorpusConfig, network: Mapping[str, Any]) -> Any:
        from rankd_pipeline.ran_functions.link_adaptation.networks import LinkGRU, LinkMLP

        keywords = dict(network)
        kind = keywords.pop("kind", "gru")
        kinds = {"gru": LinkGRU, "mlp": LinkMLP}
        if kind not in kinds:
            raise RankdError(f"steps.student.network: kind {kind!r} is unknown; expected one of {', '.join(kinds)}.")
        return kinds[kind](**keywords)

    def set_statistics(self, module: "torch.nn.Module", inputs: Arrays) -> None:
        import torch

        module.get_submodule("normalizer").learn({name: torch.from_numpy(inputs[name]) for name in REPORT_FIELDS})  # type: ignore[operator]

    def ssl_loss(self, module: "torch.nn.Module", batch: Any, mask_share: tuple[float, float]) -> Any:
        from rankd_pipeline.ran_functions.link_adaptation.networks import forecast_loss

        return forecast_loss(module, {name: batch[name] for name in REPORT_FIELDS}, mask_share)  # type: ignore[arg-type]

    def deployable(self, module: "torch.nn.Module", calibration: Mapping[str, float]) -> "torch.nn.Module":
        from rankd_pipeline.ran_functions.link_adaptation.networks import Deployable

        return Deployable(module, calibration)  # type: ignore[arg-type]

    def fit_calibration(self, module: "torch.nn.Module", features: Arrays, labels: np.ndarray) -> dict[str, float]:
        """Temperature of the BLER, and the operating points of the decision rule (see `operating`)."""
        from rankd_pipeline.distillation.heads import outputs_of
        from rankd_pipeline.ran_functions.link_adaptation.baselines import validation_traces
        from rankd_pipeline.ran_functions.link_adaptation.operating import operating_points

        head, outputs = self.head(), outputs_of(module, self.model_inputs(features))
        calibration = head.fit_calibration(outputs, labels)
        traces = validation_traces({**features, "label": labels}, TUNING_SEED)
        predicted, true = head.predictive(outputs, calibration).reshape(-1, N_MCS), labels.reshape(-1, N_MCS)
        points = operating_points(module, calibration["temperature"], traces, predicted, true)  # type: ignore[arg-type]
        return {**calibration, **points}

    def network_predictor(self, module: "torch.nn.Module", calibration: Mapping[str, float]) -> Predictor:
        """A policy for the slot loop; as a plain predictor it replays logged windows (see `rollout.Policy`)."""
        from rankd_pipeline.ran_functions.link_adaptation.networks import Deployable, stepper
        from rankd_pipeline.ran_functions.link_adaptation.policies import Learned

        deployable = Deployable(module, calibration)  # type: ignore[arg-type]
        return Learned(stepper(deployable), deployable.network.state_size + 1, BLER_TARGET)

    def deployed_predictor(self, run: Run, signature: ModelSignature) -> Predictor:
        from rankd_pipeline.ran_functions.link_adaptation.policies import Learned

        state = next(spec for spec in signature.inputs if spec.name == "state")
        return Learned(run, state.elements, BLER_TARGET)

    def answer(self, cfg: LinkCorpusConfig, budget_us: float) -> TensorSpec:
        """A sample is a window, and what is said of it is the BLER of every MCS in every slot."""
        return TensorSpec(name="bler", axes=("slot", "mcs"), shape=(cfg.window_slots, N_MCS), unit="probability")

    def calls(self, features: Arrays, signature: ModelSignature, run: Run) -> dict[str, np.ndarray]:
        """Slots spread over the windows, with the state that the slots before have left, and every kind of BLER target."""
        from rankd_pipeline.ran_functions.link_adaptation.networks import TARGETS

        windows = self.model_inputs(features)
        n, slots = windows["cqi"].shape
        targets = np.resize(np.asarray(TARGETS, np.float32), n)
        state = np.zeros((n, next(spec.elements for spec in signature.inputs if spec.name == "state")), np.float32)
        kept = set(np.linspace(0, slots - 1, CALLS).astype(int).tolist())
        made = []
        for slot in range(slots):
            report = {name: values if values.ndim == 1 else values[:, slot] for name, values in windows.items()}
            call = {**report, "bler_target": targets, "state": state}
            if slot in kept:
                made.append(call)
            state = run(call)["next_state"]
        return {name: np.concatenate([call[name] for call in made]) for name in signature.input_names}

    # -- judgement ------------------------------------------------------------------------------------------------
    def baselines(self, cfg: LinkCorpusConfig) -> tuple[Baseline, ...]:
        from rankd_pipeline.ran_functions.link_adaptation import baselines

        return baselines.all_baselines(cfg)

    @property
    def evaluation_columns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("drop_id", "time_s", "site", "band_ghz", "harq_delay_slots"), ("bler", "draw", "step_slot")

    def evaluate(
        self, models: Mapping[str, Predictor], features: Arrays, truth: Arrays, split: str, calibrated: frozenset[str]
    ) -> "pd.DataFrame":
        """Every model in its own closed loop over the same traces (see `metrics`)."""
        from rankd_pipeline.evaluation.table import concat_tables
        from rankd_pipeline.ran_functions.link_adaptation.metrics import evaluate_rollout

        traces, rows = traces_of(features, truth)
        meta = {name: np.asarray(features[name])[rows] for name in META}
        return concat_tables(
            evaluate_rollout(name, split, traces, roll_out(traces, _policy(name, model)), meta, name in calibrated)
            for name, model in models.items()
        )

    def figures(self, models: Mapping[str, Predictor], features: Arrays, truth: Arrays) -> Iterator[tuple[str, bytes]]:
        """Goodput over users, Doppler and report age; BLER over time and target; bursts; what follows a jump of the SNR."""
        from rankd_pipeline.ran_functions.link_adaptation import pictures

        traces, _ = traces_of(features, truth)
        rollouts = {name: roll_out(traces, _policy(name, model)) for name, model in models.items() if name != "teacher_raw"}
        yield from pictures.rollout_pictures(traces, rollouts)
        first, rival = next(iter(models)), self.gap_baseline
        yield "goodput_gain", pictures.gain_picture(traces, rollouts[first], rollouts[rival], (first, rival))
        yield "other_targets", pictures.target_picture(traces, {name: _policy(name, models[name]) for name in (first, rival)})

    # -- the field ------------------------------------------------------------------------------------------------
    shifts = SHIFTS

    def field_config(self, cfg: LinkCorpusConfig, shifts: frozenset[str], rows: int) -> LinkCorpusConfig:
        return field_config(cfg, shifts, rows)

    def field_context(self, cfg: LinkCorpusConfig, features: Arrays, truth: Arrays) -> dict[str, np.ndarray]:
        """The SINR of a window, as a base station gathers it from CQI and HARQ over time; Doppler is among the features."""
        return {"snr_db": 10.0 * np.log10((10.0 ** (np.asarray(truth["sinr_db"], np.float64) / 10.0)).mean(axis=1))}

    def latency_cases(self, inputs: Arrays) -> dict[str, dict[str, np.ndarray]]:
        """Slots with and without HARQ feedback: a mask may not change the time, and the race shows it."""
        silent = {name: np.zeros_like(inputs[name]) for name in ("harq_ack", "harq_mask", "harq_mcs")}
        return {"feedback as it comes": dict(inputs), "no feedback": {**inputs, **silent}}

    # -- slots from a file ------------------------------------------------------------------------------------------
    def example_rows(self, cfg: LinkCorpusConfig) -> str:
        slots = ("9,6,,,40,24,0.1", "9,7,ACK,13,40,24,0.1", "8,6,NACK,14,40,24,0.1")
        return "\n".join([",".join(CSV_COLUMNS), *slots]) + "\n"

    def read_reports(self, path: Path, signature: ModelSignature) -> dict[str, np.ndarray]:
        """One user's slots in order, one a row: CQI and its age, HARQ (ACK, NACK or nothing) and the MCS it is about, Doppler,
        PRBs, BLER target."""
        with path.open(newline="") as handle:
            reader = csv.DictReader(handle)
            absent = [name for name in CSV_COLUMNS if name not in (reader.fieldnames or [])]
            if absent:
                raise RankdError(f"{path}: column {absent[0]!r} is missing; expected {', '.join(CSV_COLUMNS)}.")
            rows = [_slot(row, f"{path}, row {number}") for number, row in enumerate(reader, 2)]
        if not rows:
            raise RankdError(f"{path}: it has a header but no slot; expected one slot a row.")
        return {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}


def _slot(row: Mapping[str, str | None], where: str) -> dict[str, float]:
    """The tensors of one slot from a row of text. Raises: RankdError naming the column."""
    said = (row["harq"] or "").strip().upper()
    if said not in ("", "ACK", "NACK"):
        raise RankdError(f"{where}, column 'harq': found {row['harq']!r}, expected ACK, NACK or nothing.")
    values = {}
    for name, (low, high) in CSV_COLUMNS.items():
        if name == "harq":
            continue
        text = (row[name] or "").strip()
        if name == "harq_mcs" and not said:
            text = "0"
        try:
            values[name] = float(text)
        except ValueError:
            raise RankdError(f"{where}, column {name!r}: found {row[name]!r}, expected a number.") from None
        if not low <= values[name] <= high:
            raise RankdError(f"{where}, column {name!r}: {values[name]:g} is outside {low:g} to {high:g}.")
    return {**values, "harq_ack": float(said == "ACK"), "harq_mask": float(said != "")}


def _policy(name: str, model: Predictor) -> Policy:
    if not isinstance(model, Policy):
        raise RankdError(f"link_adaptation: model {name!r} cannot be stepped slot by slot; expected a rollout.Policy.")
    return model


FUNCTION = LinkAdaptation
