"""The slot loop: a policy chooses an MCS every slot, the link answers, and the answer comes back some slots later.

The channel does not depend on the policy; HARQ feedback does. Every policy meets the same channel, the same CQI reports
and the same draw of luck in every slot, so that a comparison is paired. Axis legend: N traces, T slots, M MCS indices.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.link_adaptation.tables import N_MCS

REPORT_FIELDS = ("cqi", "cqi_age_slots", "harq_ack", "harq_mask", "harq_mcs", "doppler_hz", "allocated_prb")
"""What the base station knows in a slot, one number a user; see `Traces` and `Rollout` for each."""
CLOSE = 2  # MCS steps around the choice whose predictions are kept: there lies what a decision hangs on
Report = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Traces:
    """N users for T slots.

    cqi_NT and cqi_age_slots_NT (slots since it was measured): the newest CQI report that has arrived.
    doppler_hz_N, allocated_prb_N: what the base station knows of the user. harq_delay_N: slots until an ACK is known.
    bler_NTM: the true error probability of every MCS. draw_NT: a block is lost where its BLER exceeds the draw (0 to 1).
    step_slot_N: where the mean SNR jumps, -1 where it does not.
    """

    cqi_NT: np.ndarray
    cqi_age_slots_NT: np.ndarray
    doppler_hz_N: np.ndarray
    allocated_prb_N: np.ndarray
    harq_delay_N: np.ndarray
    bler_NTM: np.ndarray
    draw_NT: np.ndarray
    step_slot_N: np.ndarray

    def repeated(self, times: int) -> "Traces":
        """The same users `times` times, one block after the other: candidates run side by side as users of their own."""
        return Traces(**{name: np.concatenate([values] * times) for name, values in vars(self).items()})


@dataclass(frozen=True)
class Choice:
    """MCS of each user [N], and the BLER that the policy expects of every MCS [N, M], if it says."""

    mcs: np.ndarray
    bler: np.ndarray | None = None


class Policy(ABC):
    """A link adaptation method. `start` comes before the first slot; only a genie may look into the traces."""

    @abstractmethod
    def start(self, traces: Traces) -> None:
        """Forget everything: these users are new."""

    @abstractmethod
    def choose(self, report: Report) -> Choice:
        """The MCS of the coming transmissions, from what arrived in this slot."""

    def aiming_at(self, target: float | np.ndarray) -> "Policy":
        """The same method with another BLER target, of all users or of each [N]. Raises: RankdError where it has none."""
        raise RankdError(f"link_adaptation: {type(self).__name__} has no BLER target.")

    def __call__(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the policy says in every slot of logged windows [n, L, M], each window from a fresh start, in shadow mode:
        the BLER that it expects of every MCS."""
        said = []
        self.start(_logged(features))
        for slot in range(features["cqi"].shape[1]):
            report = {name: values if values.ndim == 1 else values[:, slot] for name, values in _fields(features).items()}
            choice = self.choose(report)
            said.append(self.expected(choice) if choice.bler is None else choice.bler)
        return np.stack(said, axis=1)

    def expected(self, choice: Choice) -> np.ndarray:
        """The BLER [N, M] that a policy which predicts none acts by; by default all or nothing: what it would not send is lost."""
        return (np.arange(N_MCS) > np.asarray(choice.mcs)[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Rollout:
    """What came of it: mcs_NT int8, ack_NT bool, the HARQ feedback as it arrived, and what the policy expected.

    harq_mask_NT is 1 where feedback arrived in that slot, harq_ack_NT what it said, harq_mcs_NT which MCS it is about
    (both 0 without feedback). expected_NTC: predicted BLER of the MCS from CLOSE below to CLOSE above the choice (NaN
    beyond the table), None for a policy that predicts nothing.
    """

    mcs_NT: np.ndarray
    ack_NT: np.ndarray
    harq_ack_NT: np.ndarray
    harq_mask_NT: np.ndarray
    harq_mcs_NT: np.ndarray
    expected_NTC: np.ndarray | None


def roll_out(traces: Traces, policy: Policy) -> Rollout:
    """Run `policy` over all traces at once, slot by slot."""
    n, slots = traces.cqi_NT.shape
    rows = np.arange(n)
    mcs, ack, harq_ack, harq_mask, harq_mcs = (np.zeros((slots, n), np.int8) for _ in range(5))
    expected = None
    cqi, age = np.ascontiguousarray(traces.cqi_NT.T), np.ascontiguousarray(traces.cqi_age_slots_NT.T)
    draw = np.ascontiguousarray(traces.draw_NT.T)
    policy.start(traces)
    for slot in range(slots):
        sent = slot - traces.harq_delay_N
        known = sent >= 0
        harq_mask[slot] = known
        harq_ack[slot] = np.where(known, ack[np.maximum(sent, 0), rows], 0)
        harq_mcs[slot] = np.where(known, mcs[np.maximum(sent, 0), rows], 0)
        report = {
            "cqi": cqi[slot], "cqi_age_slots": age[slot], "harq_ack": harq_ack[slot], "harq_mask": harq_mask[slot],
            "harq_mcs": harq_mcs[slot], "doppler_hz": traces.doppler_hz_N, "allocated_prb": traces.allocated_prb_N,
        }  # fmt: skip
        choice = policy.choose(report)
        mcs[slot] = choice.mcs
        ack[slot] = traces.bler_NTM[rows, slot, choice.mcs] <= draw[slot]
        if choice.bler is not None:
            if expected is None:
                expected = np.full((slots, n, 2 * CLOSE + 1), np.nan, np.float32)
            expected[slot] = around(choice.bler, choice.mcs)
    return Rollout(mcs.T, ack.T.astype(bool), harq_ack.T, harq_mask.T, harq_mcs.T,
                   None if expected is None else expected.swapaxes(0, 1))  # fmt: skip


def around(values_NM: np.ndarray, mcs: np.ndarray) -> np.ndarray:
    """values_NM at the MCS from CLOSE below to CLOSE above `mcs` [N]: [N, 2*CLOSE+1], NaN beyond the table."""
    index = mcs[:, None].astype(np.int64) + np.arange(-CLOSE, CLOSE + 1)
    picked = np.take_along_axis(values_NM, np.clip(index, 0, N_MCS - 1), axis=1).astype(np.float32)
    return np.where((index >= 0) & (index < N_MCS), picked, np.nan)


def _fields(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(features[name]) for name in REPORT_FIELDS}


def _logged(features: Mapping[str, np.ndarray]) -> Traces:
    """Windows as traces of their own; without truth (a genie brings its own column) no block is ever lost."""
    shape = features["cqi"].shape
    return Traces(
        cqi_NT=features["cqi"], cqi_age_slots_NT=features["cqi_age_slots"], doppler_hz_N=features["doppler_hz"],
        allocated_prb_N=features["allocated_prb"], harq_delay_N=features["harq_delay_slots"],
        bler_NTM=features.get("bler", np.zeros((*shape, N_MCS), np.float16)), draw_NT=np.ones(shape, np.float32),
        step_slot_N=np.full(len(features["cqi"]), -1),
    )  # fmt: skip


def traces_of(features: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> tuple[Traces, np.ndarray]:
    """The traces whose windows are the rows of `features` and `truth`, and the first row [N] of each.

    Raises: RankdError where a trace lacks a window.
    """
    order = np.lexsort((features["time_s"], features["drop_id"]))
    drops, first, count = np.unique(features["drop_id"][order], return_index=True, return_counts=True)
    if len(drops) and count.min() != count.max():
        short = drops[count.argmin()]
        raise RankdError(
            f"drop_id {short}: it has {count.min()} windows, others have {count.max()}; a closed loop needs whole traces, so give "
            "every trace the same number of windows."
        )
    rows = order[first]

    def whole(values: np.ndarray) -> np.ndarray:
        ordered = values[order]
        return ordered.reshape(len(drops), -1, *ordered.shape[2:])

    traces = Traces(
        cqi_NT=whole(features["cqi"]), cqi_age_slots_NT=whole(features["cqi_age_slots"]), doppler_hz_N=features["doppler_hz"][rows],
        allocated_prb_N=features["allocated_prb"][rows], harq_delay_N=features["harq_delay_slots"][rows].astype(np.int64),
        bler_NTM=whole(truth["bler"]), draw_NT=whole(truth["draw"]), step_slot_N=truth["step_slot"][rows],
    )  # fmt: skip
    return traces, rows
