"""CA-KS: which of the teacher's feature dimensions a narrower student should learn (Tiny-WiFo, arXiv:2511.04015, III-B2).

The paper fixes the idea (student tokens are the query, teacher tokens key and value; the teacher's dimensions are scored
and the best d_s are kept) and leaves the shapes open, so there are modes:

    channel   relevance of each teacher dimension to the student's: correlation of the two over the tokens (default)
    token     the literal reading: attention of student tokens over teacher tokens, dimensions scored by what it gathers
    none      without CA-KS: a learned linear map from the teacher's width to the student's
    first     without CA-KS: the first d_s dimensions

A hard choice passes no gradient, so the chosen columns are multiplied by a gate that is 1 in value and has the score's
gradient (straight-through). Scores are averaged over batches, and a dimension that stays chosen keeps its slot: an
element-wise target whose columns move from batch to batch is noise.

Shapes: B samples, N tokens, d_s and d_t the widths of student and teacher.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

Mode = Literal["channel", "token", "none", "first"]


class SelectionConfig(BaseModel):
    """How dimensions are scored and when they are chosen anew.

    The literal reading of the paper is {mode: token, ema: 0, reselect_every: 1, sticky: false, gradient: none}.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = "channel"
    temperature: float = Field(default=10.0, gt=0, description="channel mode: sharpness of the softmax over correlations")
    heads: int = Field(default=8, ge=1, description="token mode")
    ema: float = Field(default=0.9, ge=0, lt=1, description="memory of the running score")
    reselect_every: int = Field(default=100, ge=1, description="passive steps between two choices inside a phase")
    sticky: bool = True
    gradient: Literal["straight_through", "none"] = "straight_through"


class KnowledgeSelector(nn.Module):
    """One CA-KS module, shared by all masks; lives only while the student is trained. Its weights are not decayed."""

    score: Tensor
    slots: Tensor
    scored: Tensor
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    no_weight_decay = True

    def __init__(self, teacher_width: int, student_width: int, cfg: SelectionConfig) -> None:
        super().__init__()
        if student_width > teacher_width:
            raise ValueError(f"a student of width {student_width} cannot select from a teacher of width {teacher_width}")
        self.cfg, self.teacher_width, self.student_width = cfg, teacher_width, student_width
        self.register_buffer("score", torch.zeros(teacher_width))
        self.register_buffer("slots", torch.arange(student_width))
        self.register_buffer("scored", torch.zeros((), dtype=torch.bool))
        self.map = nn.Linear(teacher_width, student_width, bias=False) if cfg.mode == "none" else None
        if cfg.mode in ("channel", "token"):
            inner = student_width if cfg.mode == "channel" else teacher_width
            self.query = nn.Linear(student_width, inner, bias=False)
            self.key, self.value = (nn.Linear(teacher_width, teacher_width, bias=False) for _ in range(2))
            for layer in (self.query, self.key, self.value):  # a map onto another width stays random
                if layer.in_features == layer.out_features:
                    nn.init.eye_(layer.weight)

    def forward(self, student_BNs: Tensor, teacher_BNt: Tensor, reselect: bool) -> tuple[Tensor, Tensor]:
        """The teacher's features at the student's width [B, N, d_s], and the alignment loss of the selector itself.

        The student gets gradients from neither: what it learns from is the comparison with the selected features.
        """
        student, teacher = student_BNs.detach().float(), teacher_BNt.detach().float()
        none = teacher.new_zeros(())
        if self.cfg.mode == "first":
            return teacher[..., : self.student_width], none
        if self.map is not None:
            return self.map(teacher), none
        score, gathered = self._channel(student, teacher) if self.cfg.mode == "channel" else self._token(student, teacher)
        self._remember(score.detach(), reselect)
        selected = teacher[..., self.slots]
        if self.cfg.gradient == "none":
            return selected, none
        gate = score / score.detach().mean().clamp(min=1e-12)
        selected = selected * (1.0 + (gate - gate.detach())[self.slots])
        aim = student if gathered.shape[-1] == self.student_width else teacher
        return selected, 1.0 - functional.cosine_similarity(gathered, aim, dim=-1).mean()

    def _channel(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Score [d_t] by correlation over the tokens, and the teacher gathered at the student's width [B, N, d_s]."""
        q, k, v = self.query(student), self.key(teacher), self.value(teacher)
        q, k = (functional.normalize(x - x.mean(dim=1, keepdim=True), dim=1) for x in (q, k))
        relevance = torch.softmax(self.cfg.temperature * (q.transpose(1, 2) @ k).abs(), dim=-1)  # [B, d_s, d_t]
        return relevance.sum(dim=1).mean(dim=0), v @ relevance.transpose(1, 2)

    def _token(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Score [d_t] by what attention over the teacher's tokens gathers [B, N, d_t]."""
        q, k, v = (layer(x).unflatten(-1, (self.cfg.heads, -1)).transpose(1, 2)
                   for layer, x in ((self.query, student), (self.key, teacher), (self.value, teacher)))  # fmt: skip
        weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
        gathered = (weights @ v).transpose(1, 2).flatten(2)
        return gathered.abs().sum(dim=1).mean(dim=0), gathered

    @torch.no_grad()
    def _remember(self, score: Tensor, reselect: bool) -> None:
        """Fold a batch's score into the running one; choose anew where asked."""
        first = not bool(self.scored)
        self.score.copy_(score if first else self.cfg.ema * self.score + (1.0 - self.cfg.ema) * score)
        self.scored.fill_(True)
        if reselect or first:
            old = self.slots if self.cfg.sticky and not first else None
            self.slots.copy_(choose(self.score, self.student_width, old))


def choose(score: Tensor, count: int, slots: Tensor | None = None) -> Tensor:
    """The `count` dimensions of highest score [count], by falling score; equal scores by index.

    With `slots` (the choice so far), a dimension that stays keeps its slot and newcomers fill the freed slots in order of
    their score.
    """
    ranked = torch.sort(score, descending=True, stable=True).indices[:count]
    if slots is None:
        return ranked
    stays = torch.isin(slots, ranked)
    newcomers = ranked[~torch.isin(ranked, slots)]
    chosen = slots.clone()
    chosen[~stays] = newcomers
    return chosen
