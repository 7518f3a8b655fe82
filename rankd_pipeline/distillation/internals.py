"""What a network shows of its inside to a distillation loss: attention maps and hidden states, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Internals:
    """One forward pass, from inside.

    output: as `forward` gives it. attention: of each stack the maps of its layers, each [B, H, Q, K] after the softmax.
    features: named states [B, N, D] (N tokens, D width), with gradients where the pass had them.
    """

    output: Tensor
    attention: Mapping[str, tuple[Tensor, ...]]
    features: Mapping[str, Tensor]


class Transparent(Protocol):
    """A network that MCAKD can distil from and into."""

    def internals(self, view: Mapping[str, Tensor]) -> Internals:
        """One pass over a training view (model inputs and `label`), from inside."""
        ...
