"""What a distillation loss may ask of the teacher: its stored soft labels, or a counted pass of the frozen network."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankd_pipeline.distillation.internals import Internals
from rankd_pipeline.errors import RankdError


class TeacherView:
    """Serves stored logits by row; a loss that needs more (augmented inputs, hidden states) runs the teacher.

    Passes are counted in samples, so that a report can say what a loss cost beyond the stored soft labels.

    Args:
        stored: [N, K] logits of the `soft_labels` artifact, in corpus order; or None.
        teacher: the network that made them; frozen here. Or None where only stored logits are allowed.
    """

    def __init__(self, stored: np.ndarray | Tensor | None, teacher: nn.Module | None = None) -> None:
        self._stored = None if stored is None else torch.as_tensor(stored)
        self._teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.passes = 0

    def logits(self, rows: Tensor) -> Tensor:
        """Stored logits [B, K] of corpus rows [B]; no pass."""
        if self._stored is None:
            raise RankdError("this distillation loss asks for stored soft labels, and none are given; run soft_labels")
        return self._stored.index_select(0, rows)

    def run(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The teacher's output for its inputs, without gradients; counts one pass a sample."""
        with torch.no_grad():
            return self._counted([*inputs, *named.values()])(*inputs, **named)

    def internals(self, view: Mapping[str, Tensor]) -> Internals:
        """Output, attention maps and hidden states for a training view, without gradients; counts one pass a sample."""
        teacher = self._counted([next(iter(view.values()))])
        with torch.no_grad():
            return teacher.internals(view)  # type: ignore[operator]

    def feature_widths(self) -> dict[str, int]:
        """Width of each hidden state that the teacher shows."""
        if self._teacher is None:
            raise RankdError("this distillation loss needs passes of the teacher, and only stored logits are given")
        return feature_widths(self._teacher)

    def hidden(self, inputs: Sequence[Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of the named submodules for `inputs` (feature and relation losses); counts one pass a sample."""
        teacher = self._counted(inputs)
        found: dict[str, Any] = {}
        modules = dict(teacher.named_modules())
        unknown = [name for name in layers if name not in modules]
        if unknown:
            raise RankdError(f"the teacher {type(teacher).__name__} has no layer {unknown[0]!r} to distil from")
        hooks = [
            modules[name].register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out)) for name in layers
        ]
        try:
            with torch.no_grad():
                teacher(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _counted(self, inputs: Sequence[Tensor]) -> nn.Module:
        if self._teacher is None:
            raise RankdError("this distillation loss needs passes of the teacher, and only stored logits are given")
        self.passes += len(inputs[0])
        self._teacher.to(inputs[0].device)  # the student's batch says where; after the first pass this moves nothing
        return self._teacher


def feature_widths(network: nn.Module) -> dict[str, int]:
    """Width of each feature in a network's `internals`; RankdError if it shows none."""
    widths = getattr(network, "feature_widths", None)
    if widths is None:
        raise RankdError(f"{type(network).__name__} does not show its inside (no `internals`); mcakd needs a transformer that does")
    return dict(widths)
