"""Ways to distil that run the frozen teacher beside the student, epoch by epoch as their schedule says.

Where stored soft labels are enough (`response`), none of this is used. A method here owns whatever it trains beside the
student (it is dropped afterwards) and keeps its counters in buffers, so that a fit killed in the middle goes on to the
same bits and counts every pass of the teacher once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from rankd_pipeline.distillation.mcakd import Mcakd, McakdConfig
from rankd_pipeline.distillation.schedules import ScheduleConfig, Turn, turns
from rankd_pipeline.distillation.teacher_view import TeacherView, feature_widths

Views = Sequence[Mapping[str, Tensor]]


class DistillationConfig(BaseModel):
    """steps.student.distillation: how the distilled arm learns from the teacher.

    kind: response (stored soft labels), mcakd (attention, embedding, hidden states), output (the teacher's output, LMKD).
    weight: of the distillation loss beside the task's own; mcakd and output only. schedule: in which epochs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["response", "mcakd", "output"] = "response"
    weight: float = Field(default=0.1, gt=0)
    mcakd: McakdConfig = McakdConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @property
    def online(self) -> bool:
        """Whether the teacher runs beside the student, on what the student sees in that very step."""
        return self.kind != "response"


class Apprentice(nn.Module):
    """A student with the method it is distilled by: what one fit trains. `student` is what remains."""

    student: nn.Module
    passes: Tensor
    steps_in_phase: Tensor
    phase_seen: Tensor

    def __init__(self, student: nn.Module, view: TeacherView, inputs: Sequence[str], epochs: int, cfg: DistillationConfig) -> None:
        super().__init__()
        self.student, self.inputs, self.epochs, self.cfg = student, tuple(inputs), epochs, cfg
        self.view = view
        self.mcakd = Mcakd(view.feature_widths(), feature_widths(student), cfg.mcakd) if cfg.kind == "mcakd" else None
        for name in ("passes", "steps_in_phase", "phase_seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.turns: list[Turn] = []
        self.passes_in_all = 0

    def before_epoch(self, validations: Sequence[float | None]) -> None:
        """Take the turn that the validation losses so far call for."""
        self.turns = turns(validations, self.epochs, self.cfg.schedule)
        self.passes_in_all = int(self.passes)

    def losses(self, views: Views) -> list[tuple[Tensor, Tensor | None]]:
        """(student's output, distillation loss or None in an autonomous epoch) of each view of a batch."""
        turn = self.turns[-1]
        if turn.phase == "AL":
            return [(self.student(**{name: view[name] for name in self.inputs}), None) for view in views]
        reselect = self._reselect(turn)
        before = self.view.passes
        found: list[tuple[Tensor, Tensor | None]] = [
            self._passive(view, reselect and number == 0) for number, view in enumerate(views)
        ]
        self.passes += self.view.passes - before
        self.passes_in_all += self.view.passes - before
        return found

    def _passive(self, view: Mapping[str, Tensor], reselect: bool) -> tuple[Tensor, Tensor]:
        if self.mcakd is None:
            inputs = {name: view[name] for name in self.inputs}
            output, teacher = self.student(**inputs), self.view.run(**inputs)
            return output, self.cfg.weight * functional.mse_loss(output.float(), teacher.float())
        internals = self.student.internals(view)  # type: ignore[operator]
        return internals.output, self.cfg.weight * self.mcakd(self.view.internals(view), internals, reselect)

    def _reselect(self, turn: Turn) -> bool:
        """At the first step of a passive phase and every `reselect_every` steps in it."""
        if int(self.phase_seen) != turn.passive_phase:
            self.phase_seen.fill_(turn.passive_phase)
            self.steps_in_phase.zero_()
        step = int(self.steps_in_phase)
        self.steps_in_phase += 1
        return step % self.cfg.mcakd.selection.reselect_every == 0

    def record(self) -> dict[str, Any]:
        """What went on: the phase of each epoch with its reason, the teacher's passes in samples, the chosen dimensions.

        All passes count, also those behind the epoch whose weights (and buffers) a fit ends with.
        """
        return {
            "phases": [asdict(turn) for turn in self.turns], "teacher_passes": self.passes_in_all,
            "selection": {} if self.mcakd is None else self.mcakd.selection(),
            "widths": {} if self.mcakd is None else self.view.feature_widths(),
        }  # fmt: skip
