"""When a student learns by itself and when from its teacher: the AL-PL schedule (Tiny-WiFo, arXiv:2511.04015, III-C).

Autonomous learning (AL) epochs train on the task alone and never run the teacher; passive learning (PL) epochs add the
distillation loss. The paper says that the move to PL follows "the student's autonomous learning progress" and nothing
more; the rule here is one reading. The phase of an epoch is a pure function of the validation losses before it, so a fit
that is killed and resumed takes the same turns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Phase = Literal["AL", "PL"]


class ScheduleConfig(BaseModel):
    """mode: plateau (AL-PL), periodic (fixed lengths), always (PL in every epoch), never (no distillation).

    plateau: AL turns to PL once the best validation loss improved by less than `stall` (relative) for `stall_epochs`
    validations in a row, or AL has lasted `most_autonomous` epochs; never before `least_autonomous`. PL lasts `passive`
    epochs. periodic: AL lasts `most_autonomous` epochs. Warm-up and the last `closing_share` of the epochs are AL.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["plateau", "periodic", "always", "never"] = "plateau"
    stall: float = Field(default=0.01, ge=0, lt=1)
    stall_epochs: int = Field(default=2, ge=1)
    least_autonomous: int = Field(default=2, ge=1)
    most_autonomous: int = Field(default=8, ge=1)
    passive: int = Field(default=2, ge=1)
    warmup: int = Field(default=1, ge=0, description="epochs")
    closing_share: float = Field(default=0.1, ge=0, lt=1)


@dataclass(frozen=True)
class Turn:
    """One epoch's phase, why, and how many passive phases have begun up to it (1 in the first one)."""

    epoch: int
    phase: Phase
    reason: str
    passive_phase: int


def turns(validations: Sequence[float | None], epochs: int, cfg: ScheduleConfig) -> list[Turn]:
    """The phases of epochs 1 … len(validations) + 1.

    Args:
        validations: the student's own validation loss of each epoch so far; None where it was not validated.
        epochs: of the whole fit; the closing epochs are counted from its end.
    """
    found: list[Turn] = []
    state = _State()
    closing = epochs - math.floor(cfg.closing_share * epochs)
    for epoch in range(1, len(validations) + 2):
        if epoch > 1:
            state.close(validations[epoch - 2], cfg)
        phase, reason = _phase(epoch, closing, state, cfg)
        begins = phase == "PL" and (not found or found[-1].phase == "AL")
        number = (found[-1].passive_phase if found else 0) + int(begins)
        found.append(Turn(epoch, phase, reason, number))
        state.enter(phase)
    return found


def _phase(epoch: int, closing: int, state: "_State", cfg: ScheduleConfig) -> tuple[Phase, str]:
    if cfg.mode in ("always", "never"):
        return ("PL" if cfg.mode == "always" else "AL"), cfg.mode
    if epoch > closing:
        return "AL", "closing epochs"
    if epoch <= cfg.warmup:
        return "AL", "warm-up"
    if state.phase == "PL":
        return ("PL", "passive phase goes on") if state.lasted < cfg.passive else ("AL", "passive phase is over")
    if state.lasted >= cfg.most_autonomous:
        return "PL", f"{state.lasted} autonomous epochs"
    stalled = cfg.mode == "plateau" and state.stalled >= cfg.stall_epochs
    if stalled and state.lasted >= cfg.least_autonomous:
        return "PL", f"less than {cfg.stall:.0%} better for {state.stalled} validations"
    return "AL", "autonomous phase goes on"


class _State:
    """What the machine remembers between epochs."""

    def __init__(self) -> None:
        self.phase: Phase = "AL"
        self.lasted = 0
        self.stalled = 0
        self.best = math.inf

    def close(self, validation: float | None, cfg: ScheduleConfig) -> None:
        """The end of an epoch: has the student got on?"""
        if validation is None:
            return
        gained = math.isinf(self.best) or validation < self.best * (1.0 - cfg.stall)
        self.stalled = 0 if gained else self.stalled + 1
        self.best = min(self.best, validation)

    def enter(self, phase: Phase) -> None:
        if phase != self.phase:
            self.phase, self.lasted, self.stalled = phase, 0, 0
        self.lasted += 1
