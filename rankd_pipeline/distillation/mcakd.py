"""MCAKD: a transformer student learns its teacher's attention maps, embedding and hidden states (Tiny-WiFo, arXiv:2511.04015).

The printed equations are lost in the public text; what is here is a reading of it, each choice named where it is made.
Any pair of networks with `internals` (distillation/internals.py) can be distilled so, if both have as many heads and see
the same inputs and the same mask.
Shapes: B samples, H heads, Q and K the tokens of a stack, N tokens, d_s and d_t the widths of student and teacher.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from rankd_pipeline.distillation.caks import KnowledgeSelector, SelectionConfig
from rankd_pipeline.distillation.internals import Internals
from rankd_pipeline.errors import RankdError

FeatureLoss = Literal["cosine", "mse"]


class McakdConfig(BaseModel):
    """Which parts the loss has and how features are compared.

    attention, embedding, hidden: weights of the three parts (equal in the paper; 0 leaves a part out).
    feature_loss: cosine ignores the scale of the two residual streams, which differ; mse is the other reading.
    align: weight of the loss by which the selectors learn to gather.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: float = Field(default=1.0, ge=0)
    embedding: float = Field(default=1.0, ge=0)
    hidden: float = Field(default=1.0, ge=0)
    feature_loss: FeatureLoss = "cosine"
    align: float = Field(default=1.0, ge=0)
    selection: SelectionConfig = SelectionConfig()


def attention_loss(teacher: Mapping[str, Sequence[Tensor]], student: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Eq. (1): 1 − cosine of the flattened maps, the mean over samples, layers and heads, summed over the stacks.

    Args: maps of each stack, [B, H, Q, K] a layer. A shallower student's layers follow the teacher's at like depth.
    """
    total: Tensor | None = None
    for stack, maps in student.items():
        follow = layers_followed(len(teacher[stack]), len(maps))
        theirs = [teacher[stack][i] for i in follow]
        if theirs[0].shape != maps[0].shape:
            raise RankdError(
                f"attention distillation, {stack}: teacher maps {tuple(theirs[0].shape)}, student {tuple(maps[0].shape)}; both "
                "networks need as many heads and the same tokens"
            )
        each = [
            functional.cosine_similarity(t.detach().flatten(2).float(), s.flatten(2).float(), dim=-1).mean()
            for t, s in zip(theirs, maps, strict=True)
        ]
        part = 1.0 - torch.stack(each).mean()
        total = part if total is None else total + part
    if total is None:
        raise RankdError("attention distillation: the student shows no attention maps")
    return total


def layers_followed(teacher_depth: int, student_depth: int) -> list[int]:
    """Which teacher layer (from 0) each student layer learns from: the last one of its share of the depth."""
    return [math.ceil((i + 1) * teacher_depth / student_depth) - 1 for i in range(student_depth)]


def feature_loss(selected_BNs: Tensor, student_BNs: Tensor, kind: FeatureLoss = "cosine") -> Tensor:
    """Eqs. (5) and (6): how far the student's features [B, N, d_s] are from the selected ones of the teacher."""
    student = student_BNs.float()
    if kind == "mse":
        return functional.mse_loss(student, selected_BNs)
    return 1.0 - functional.cosine_similarity(selected_BNs, student, dim=-1).mean()


class Mcakd(nn.Module):
    """The distillation loss of eq. (7) with its three CA-KS modules; trained beside the student, dropped after."""

    def __init__(self, teacher_widths: Mapping[str, int], student_widths: Mapping[str, int], cfg: McakdConfig) -> None:
        super().__init__()
        self.cfg = cfg
        names = [name for name in student_widths if self._weight(name) > 0]
        self.selectors = nn.ModuleDict(
            {name: KnowledgeSelector(teacher_widths[name], student_widths[name], cfg.selection) for name in names}
        )

    def _weight(self, feature: str) -> float:
        return self.cfg.embedding if feature == "embedding" else self.cfg.hidden

    def forward(self, teacher: Internals, student: Internals, reselect: bool) -> Tensor:
        """The loss of one view. reselect: choose the teacher's dimensions anew now."""
        total = next(iter(student.features.values())).new_zeros((), dtype=torch.float32)
        if self.cfg.attention:
            total = total + self.cfg.attention * attention_loss(teacher.attention, student.attention)
        for name, selector in self.selectors.items():
            selected, align = selector(student.features[name], teacher.features[name], reselect)
            total = total + self._weight(name) * feature_loss(selected, student.features[name], self.cfg.feature_loss)
            total = total + self.cfg.align * align
        return total

    def selection(self) -> dict[str, list[int]]:
        """The teacher's dimensions in each selector's slots, as they stand."""
        chosen = {name: module for name, module in self.selectors.items() if isinstance(module, KnowledgeSelector)}
        return {name: module.slots.tolist() for name, module in chosen.items() if module.cfg.mode in ("channel", "token")}
