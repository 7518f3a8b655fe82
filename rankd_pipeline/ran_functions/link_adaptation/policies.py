"""Link adaptation as base stations do it today: CQI table, inner loop, outer loop; and the genie that none of them is.

Every policy is vectorised over users (axis N); SINR and offsets in dB.
"""

from collections.abc import Sequence

import numpy as np

from rankd_pipeline.ran_functions.contract import Run
from rankd_pipeline.ran_functions.link_adaptation.rollout import REPORT_FIELDS, Choice, Policy, Report, Traces
from rankd_pipeline.ran_functions.link_adaptation.tables import CQI_TO_MCS, EFFICIENCY, SINR_DB, LinkTables

OFFSET_LIMITS_DB = (-20.0, 20.0)


class CqiTable(Policy):
    """The MCS of the same modulation and code rate as the reported CQI."""

    def start(self, traces: Traces) -> None:
        """Nothing to remember."""

    def choose(self, report: Report) -> Choice:
        return Choice(CQI_TO_MCS[report["cqi"]])


class OuterLoop(Policy):
    """The highest MCS whose BLER, at the reported SINR less an offset, meets the target; HARQ moves the offset.

    A NACK raises the offset by delta_up_db, an ACK lowers it by delta_up_db * target / (1 - target), so that it comes to
    rest where the BLER is the target (Pedersen et al. 2005; Sampath et al. 1997; `OuterLoopLinkAdaptation` of Sionna).
    With delta_up_db 0 it is the inner loop alone (ILLA). All settings are numbers or arrays [N].
    """

    def __init__(
        self, tables: LinkTables, target: float | np.ndarray, delta_up_db: float | np.ndarray, offset_db: float | np.ndarray = 0.0
    ) -> None:
        self.tables = tables
        self.target, self.up, self.first = np.asarray(target), np.asarray(delta_up_db), np.asarray(offset_db)
        self.down = self.up * self.target / (1.0 - self.target)
        # One target for all users: the choice is a table look-up over allocation and SINR.
        self.lookup_AS = highest_mcs(tables.bler_AMS, float(target)) if self.target.ndim == 0 else None

    def start(self, traces: Traces) -> None:
        n = len(traces.cqi_NT)
        self.offset = np.broadcast_to(self.first, (n,)).astype(np.float64)
        self.allocation = self.tables.allocation_index(traces.allocated_prb_N)

    def choose(self, report: Report) -> Choice:
        moved = self.offset + np.where(report["harq_ack"] > 0, -self.down, self.up)
        self.offset = np.clip(np.where(report["harq_mask"] > 0, moved, self.offset), *OFFSET_LIMITS_DB)
        self.sinr_db = self.tables.cqi_sinr_db_Q[report["cqi"]] - self.offset
        return Choice(self.pick(self.sinr_db))

    def aiming_at(self, target: float | np.ndarray) -> "OuterLoop":
        return OuterLoop(self.tables, target, self.up, self.first)

    def expected(self, choice: Choice) -> np.ndarray:
        """The tables at the reported SINR less the offset."""
        return self.tables.bler_at(self.sinr_db, self.allocation)

    def pick(self, sinr_db: np.ndarray) -> np.ndarray:
        """Highest MCS [N] that meets the target at this SINR, 0 if none does."""
        if self.lookup_AS is None:
            meets = self.tables.bler_at(sinr_db, self.allocation) <= self.target[:, None]
            return np.where(meets, np.arange(meets.shape[1]), 0).max(axis=1)
        at = np.rint((sinr_db - SINR_DB[0]) / (SINR_DB[1] - SINR_DB[0])).astype(np.int64)
        return self.lookup_AS[self.allocation, np.clip(at, 0, len(SINR_DB) - 1)]


class OuterLoopByDoppler(OuterLoop):
    """The outer loop with a step of its own for each class of Doppler: what a careful engineer would configure.

    Args:
        edges_hz: rising borders between the classes.
        steps_db: delta_up_db of each class, one more than borders.
    """

    def __init__(
        self,
        tables: LinkTables,
        target: float | np.ndarray,
        edges_hz: tuple[float, ...],
        steps_db: np.ndarray,
        offset_db: float | np.ndarray,
    ) -> None:
        super().__init__(tables, target, 0.0, offset_db)
        self.edges, self.steps = edges_hz, np.asarray(steps_db)

    def aiming_at(self, target: float | np.ndarray) -> "OuterLoopByDoppler":
        return OuterLoopByDoppler(self.tables, target, self.edges, self.steps, self.first)

    def start(self, traces: Traces) -> None:
        super().start(traces)
        self.up = self.steps[np.searchsorted(self.edges, traces.doppler_hz_N)]
        self.down = self.up * self.target / (1.0 - self.target)


class Genie(Policy):
    """Knows the BLER that every MCS will have in this very slot, and takes the one of highest expected goodput."""

    def start(self, traces: Traces) -> None:
        self.best_TN = np.argmax(EFFICIENCY * (1.0 - traces.bler_NTM.astype(np.float32)), axis=-1).T
        self.slot = -1

    def choose(self, report: Report) -> Choice:
        self.slot += 1
        return Choice(self.best_TN[self.slot])


class Learned(Policy):
    """A deployed model, called once a slot for all users: it chooses by its utility, and carries its own state.

    run: tensors of the signature in, named outputs out. state_size: values that it carries for a user. target: of all
    users, or of each [N].
    """

    def __init__(self, run: Run, state_size: int, target: float | np.ndarray) -> None:
        self.run, self.state_size, self.target = run, state_size, target

    def aiming_at(self, target: float | np.ndarray) -> "Learned":
        return Learned(self.run, self.state_size, target)

    def start(self, traces: Traces) -> None:
        n = len(traces.cqi_NT)
        self.state = np.zeros((n, self.state_size), np.float32)
        self.wanted = np.broadcast_to(np.asarray(self.target, np.float32), (n,)).copy()

    def choose(self, report: Report) -> Choice:
        inputs = {name: np.asarray(report[name], np.float32) for name in REPORT_FIELDS}
        said = self.run({**inputs, "bler_target": self.wanted, "state": self.state})
        self.state = said["next_state"]
        return Choice(said["mcs_utility"].argmax(axis=1), said["bler"])


class Logged(Policy):
    """The mixed policies that wrote a corpus: for each user one of several, some of which try around their choice.

    parts: policies, each with the users [N] (bool) that it serves. jitter_NT: MCS steps added to the choice.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray, Policy]], jitter_NT: np.ndarray) -> None:
        self.parts, self.jitter_TN = [part for part in parts if part[0].any()], jitter_NT.T

    def start(self, traces: Traces) -> None:
        for _, policy in self.parts:
            policy.start(traces)
        self.slot = -1

    def choose(self, report: Report) -> Choice:
        self.slot += 1
        mcs = np.zeros(self.jitter_TN.shape[1], np.int64)
        for served, policy in self.parts:
            mcs = np.where(served, policy.choose(report).mcs, mcs)
        return Choice(np.clip(mcs + self.jitter_TN[self.slot], 0, len(EFFICIENCY) - 1))


def highest_mcs(bler_AMS: np.ndarray, target: float) -> np.ndarray:
    """Highest MCS whose BLER meets `target` [A, S], 0 where none does."""
    return np.where(bler_AMS <= target, np.arange(bler_AMS.shape[1])[:, None], 0).max(axis=1)
