"""The networks of beam management: a transformer teacher and a tiny student, from L1-RSRP reports to the best beam.

Shapes: B samples, H reports of history (the newest last), W wide beams of Set B (rows x cols), N narrow beams of
Set A, D width. Beams are numbered row by row: beam = row * cols + col (row: elevation, col: azimuth).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankd_pipeline.errors import RankdError

# Below this far under the strongest report a beam tells nothing but noise; it also bounds a wild report.
_FLOOR_DB = -60.0


class ReportNormalizer(nn.Module):
    """Scales reports inside the graph, so that the deployed file takes them as the standard delivers them.

    Two views of a report: each beam relative to the strongest one reported (the shape, which holds the angle), and the
    strongest one itself (the level, which tells near from far). What is missing becomes 0, that is the training mean.
    The constants are buffers, learned from the training reports by `learn`.
    """

    shape_mean: Tensor
    shape_std: Tensor
    level_mean: Tensor
    level_std: Tensor

    def __init__(self, set_b: int) -> None:
        super().__init__()
        self.register_buffer("shape_mean", torch.zeros(set_b))
        self.register_buffer("shape_std", torch.ones(set_b))
        self.register_buffer("level_mean", torch.zeros(1))
        self.register_buffer("level_std", torch.ones(1))

    def forward(self, l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return shape [B, H, W], level [B, 1] and mask [B, H, W] as float, all without unit and finite.

        Args:
            l1_rsrp_dbm: [B, H, W] reported L1-RSRP, dBm; any value (NaN too) where nothing was reported.
            l1_rsrp_mask: [B, H, W] non-zero where a report is there. A sample without any is all zeros.
        """
        present = l1_rsrp_mask > 0
        relative, strongest = self._relative(l1_rsrp_dbm, present)
        there = present.to(relative.dtype)
        any_there = there.flatten(1).max(dim=1, keepdim=True).values
        shape = (relative - self.shape_mean) / self.shape_std * there
        level = (strongest - self.level_mean) / self.level_std * any_there
        return shape, level, there

    @staticmethod
    def _relative(l1_rsrp_dbm: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Each beam relative to the sample's strongest report, dB; and that one, dBm [B, 1] (very low if none)."""
        reported = torch.where(there, l1_rsrp_dbm, -1e4)
        strongest = reported.flatten(1).max(dim=1, keepdim=True).values
        relative = (reported - strongest.unsqueeze(-1)).clamp(min=_FLOOR_DB)
        return relative, strongest

    def relative_to_visible(self, l1_rsrp_dbm: Tensor, visible: Tensor) -> Tensor:
        """Scaled shape [B, H, W] of all entries relative to the strongest `visible` one: the masked-modelling target."""
        _, strongest = self._relative(l1_rsrp_dbm, visible)
        relative = (l1_rsrp_dbm - strongest.unsqueeze(-1)).clamp(min=_FLOOR_DB, max=-_FLOOR_DB)
        return (relative - self.shape_mean) / self.shape_std

    @torch.no_grad()
    def learn(self, l1_rsrp_dbm: np.ndarray | Tensor, l1_rsrp_mask: np.ndarray | Tensor) -> None:
        """Set the constants from training reports [B, H, W]; `RankdError` if not one beam was reported."""
        there = torch.as_tensor(l1_rsrp_mask) > 0
        if not bool(there.any()):
            raise RankdError("the training corpus holds not one L1-RSRP report (every mask entry is 0)")
        relative, strongest = self._relative(torch.as_tensor(l1_rsrp_dbm), there)
        weight = there.double()
        count = weight.sum((0, 1))
        seen = count.clamp(min=1)
        mean = (relative.double() * weight).sum((0, 1)) / seen
        variance = ((relative.double() - mean) ** 2 * weight).sum((0, 1)) / seen
        self.shape_mean.copy_(torch.where(count > 0, mean, 0.0))
        # A beam never (or always equally) reported keeps its dB: a tiny deviation would blow its noise up.
        self.shape_std.copy_(variance.sqrt().clamp(min=1.0))
        level = strongest[there.flatten(1).any(dim=1)].double()
        self.level_mean.copy_(level.mean().reshape(1))
        self.level_std.copy_(level.std(unbiased=False).clamp(min=1.0).reshape(1))


class BeamTransformer(nn.Module):
    """The teacher: one token a wide beam and report, and from each token the narrow beams beneath it.

    Every token sees its whole report turned into its own direction (DFT codebooks wrap around, so the beam at offset
    (i, j) of a token always exists), and input, attention and head share their weights over the directions: what is
    learned at one angle holds at the next. Where it does not (element pattern, who lives where), the token's place
    says so. In evaluation the answer is the mean over the sample and its mirror image, see `Mirror`.
    """

    def __init__(
        self,
        *,
        set_b_rows: int,
        set_b_cols: int,
        set_a_rows: int,
        set_a_cols: int,
        history: int,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        expansion: int = 2,
        dropout: float = 0.1,
        mirror: bool = True,
    ) -> None:
        super().__init__()
        _check_grids(set_b_rows, set_b_cols, set_a_rows, set_a_cols)
        if width % heads:
            raise RankdError(f"teacher network: width {width} must be a multiple of heads {heads}")
        self.rows, self.cols, self.set_b = set_b_rows, set_b_cols, set_b_rows * set_b_cols
        self.down, self.across = set_a_rows // set_b_rows, set_a_cols // set_b_cols
        self.normalizer = ReportNormalizer(self.set_b)
        self.mirror = Mirror(set_b_rows, set_b_cols, set_a_rows, set_a_cols) if mirror else None
        self.register_buffer("around", _turned(set_b_rows, set_b_cols), persistent=False)
        self.embed = nn.Linear(2 * self.set_b + 1, width)
        self.place = nn.Parameter(0.02 * torch.randn(self.set_b, width))
        self.time = nn.Parameter(0.02 * torch.randn(history, 1, width))
        self.blocks = nn.ModuleList(_Block(width, heads, expansion, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.beneath = nn.Linear(width, self.down * self.across)
        self.reconstruction = nn.Linear(width, 1)

    def forward(self, l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> Tensor:
        """Logits [B, N] over Set A from reports [B, H, W] (dBm) and their mask."""
        if self.mirror is None:
            return self._logits(l1_rsrp_dbm, l1_rsrp_mask)
        if self.training:
            return self.mirror.on_half(self._logits, l1_rsrp_dbm, l1_rsrp_mask)
        return self.mirror.mean(self._logits, l1_rsrp_dbm, l1_rsrp_mask)

    def reconstruct(self, l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> Tensor:
        """Every wide beam's scaled shape [B, H, W], guessed from those that the mask leaves (masked modelling)."""
        tokens_BTD = self._tokens(l1_rsrp_dbm, l1_rsrp_mask)
        return self.reconstruction(tokens_BTD).reshape(l1_rsrp_dbm.shape)

    def _logits(self, l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> Tensor:
        newest_BWD = self._tokens(l1_rsrp_dbm, l1_rsrp_mask)[:, -self.set_b :]
        beneath = self.beneath(newest_BWD).reshape(-1, self.rows, self.cols, self.down, self.across)
        return beneath.transpose(2, 3).flatten(1)

    def _tokens(self, l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> Tensor:
        """Tokens [B, H*W, D] after all blocks, the newest report's last."""
        shape_BHW, level_B1, there_BHW = self.normalizer(l1_rsrp_dbm, l1_rsrp_mask)
        level = level_B1.reshape(-1, 1, 1, 1).expand(*shape_BHW.shape, 1)
        tokens = self.embed(torch.cat([shape_BHW[..., self.around], there_BHW[..., self.around], level], dim=-1))
        tokens_BTD = (tokens + self.place + self.time).flatten(1, 2)
        for block in self.blocks:
            tokens_BTD = block(tokens_BTD)
        return self.norm(tokens_BTD)


def _check_grids(set_b_rows: int, set_b_cols: int, set_a_rows: int, set_a_cols: int) -> None:
    if set_a_rows % set_b_rows or set_a_cols % set_b_cols:
        raise RankdError(
            f"Set A has {set_a_rows}x{set_a_cols} beams and Set B {set_b_rows}x{set_b_cols}; "
            "rows and columns of Set A must be multiples of Set B's"
        )


def _turned(rows: int, cols: int) -> Tensor:
    """[W, W]: in row w, the beams at offsets 0, 1, … from beam w, both axes cyclic."""
    row, col = torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)
    return (row[:, None] + row) % rows * cols + (col[:, None] + col) % cols


class Mirror(nn.Module):
    """The mirror symmetry of a sector: what comes from the left by the beams of the left comes as well from the right.

    It holds for a panel whose DFT beams are numbered by spatial frequency (beam `col` points where `-col` modulo `cols`
    does on the other side) and a sector without a preferred side. It doubles the training samples, and it makes the
    teacher an average of two.
    """

    reports: Tensor
    beams: Tensor

    def __init__(self, set_b_rows: int, set_b_cols: int, set_a_rows: int, set_a_cols: int) -> None:
        super().__init__()
        self.register_buffer("reports", _mirrored(set_b_rows, set_b_cols), persistent=False)
        self.register_buffer("beams", _mirrored(set_a_rows, set_a_cols), persistent=False)

    def on_half(self, network: Callable[[Tensor, Tensor], Tensor], l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> Tensor:
        """`network` with the first half of the batch seen in the mirror, and its logits turned back.

        Batches are shuffled, so every sample is seen from both sides over the epochs, without a draw.
        """
        cut = len(l1_rsrp_dbm) // 2
        reports = torch.cat([l1_rsrp_dbm[:cut][..., self.reports], l1_rsrp_dbm[cut:]])
        mask = torch.cat([l1_rsrp_mask[:cut][..., self.reports], l1_rsrp_mask[cut:]])
        logits_BN = network(reports, mask)
        return torch.cat([logits_BN[:cut, self.beams], logits_BN[cut:]])

    def mean(self, network: Callable[[Tensor, Tensor], Tensor], l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> Tensor:
        """The mean of `network`'s logits for a sample and for its mirror image."""
        mirrored = network(l1_rsrp_dbm[..., self.reports], l1_rsrp_mask[..., self.reports])
        return 0.5 * (network(l1_rsrp_dbm, l1_rsrp_mask) + mirrored[:, self.beams])


def _mirrored(rows: int, cols: int) -> Tensor:
    """[rows*cols]: the beam on the other side of each."""
    return (torch.arange(rows)[:, None] * cols + (-torch.arange(cols)) % cols).flatten()


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, tokens, width = x_BTD.shape
        qkv = self.qkv(self.norm_attention(x_BTD)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Written out: for a few dozen tokens it is faster on a CPU than the fused attention (measured: 4 heads, +15 %).
        weight = torch.softmax((q * (width // self.heads) ** -0.5) @ k.transpose(-1, -2), dim=-1)
        mixed = (weight @ v).transpose(1, 2).reshape(batch, tokens, width)
        x_BTD = x_BTD + self.dropout(self.out(mixed))
        return x_BTD + self.dropout(self.down(functional.gelu(self.up(self.norm_mlp(x_BTD)))))


class BeamMLP(nn.Module):
    """The student: a tiny MLP, run once from the direction of every wide beam, each run scoring the narrow beams beneath it.

    As in the teacher, the report is turned into each wide beam's own direction, so one set of weights serves all of them and
    what is learned at one angle holds at the next; `place` is what differs (element pattern, who lives where). At equal
    weights this is 1.2 points of Top-1 better than an MLP over the flat report, and 1,000 weights do what 4,000 did there.
    It is plain matrix products over W rows, which every runtime takes.

    Args:
        set_b_rows, set_b_cols, set_a_rows, set_a_cols: the beam grids; Set A's are multiples of Set B's.
        history: reports H in a sample, the newest last.
        hidden: widths of the hidden layers.
        mirror: train on mirror images too, see `Mirror`; what is deployed runs once.
    """

    around: Tensor

    def __init__(
        self,
        *,
        set_b_rows: int,
        set_b_cols: int,
        set_a_rows: int,
        set_a_cols: int,
        history: int,
        hidden: Sequence[int] = (32, 24),
        mirror: bool = True,
    ) -> None:
        super().__init__()
        _check_grids(set_b_rows, set_b_cols, set_a_rows, set_a_cols)
        self.rows, self.cols, set_b = set_b_rows, set_b_cols, set_b_rows * set_b_cols
        self.down, self.across = set_a_rows // set_b_rows, set_a_cols // set_b_cols
        self.normalizer = ReportNormalizer(set_b)
        self.mirror = Mirror(set_b_rows, set_b_cols, set_a_rows, set_a_cols) if mirror else None
        self.register_buffer("around", _turned(set_b_rows, set_b_cols), persistent=False)
        self.embed = nn.Linear(2 * history * set_b + 1, hidden[0])
        self.place = nn.Parameter(0.02 * torch.randn(set_b, hidden[0]))
        layers: list[nn.Module] = [nn.ReLU()]
        for before, after in zip(hidden[:-1], hidden[1:], strict=True):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], self.down * self.across))

    def forward(self, l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> Tensor:
        """Logits [B, N] over Set A from reports [B, H, W] (dBm) and their mask."""
        if self.training and self.mirror is not None:
            return self.mirror.on_half(self._logits, l1_rsrp_dbm, l1_rsrp_mask)
        return self._logits(l1_rsrp_dbm, l1_rsrp_mask)

    def _logits(self, l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> Tensor:
        shape_BHW, level_B1, there_BHW = self.normalizer(l1_rsrp_dbm, l1_rsrp_mask)
        reports = torch.cat([shape_BHW, there_BHW], dim=1)
        turned_BWF = reports[..., self.around].transpose(1, 2).flatten(2)
        level = level_B1.unsqueeze(1).expand(-1, turned_BWF.shape[1], 1)
        beneath = self.layers(self.embed(torch.cat([turned_BWF, level], dim=-1)) + self.place)
        return beneath.reshape(-1, self.rows, self.cols, self.down, self.across).transpose(2, 3).flatten(1)


class Deployable(nn.Module):
    """What is shipped: the student, its calibration temperature and the softmax in one graph, in eval mode."""

    temperature: Tensor

    def __init__(self, student: nn.Module, temperature: float) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.eval()

    def forward(self, l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor) -> Tensor:
        """`beam_probability` [B, N]: the probability that each narrow beam of Set A is the best one."""
        return torch.softmax(self.student(l1_rsrp_dbm, l1_rsrp_mask) / self.temperature, dim=-1)


def masked_modelling_loss(
    model: BeamTransformer, l1_rsrp_dbm: Tensor, l1_rsrp_mask: Tensor, low: float = 0.3, high: float = 0.5
) -> Tensor:
    """Hide a share (`low` to `high`, drawn a sample) of the reported entries; Huber loss of their reconstruction.

    The target is the entry relative to the strongest report left, scaled as the input is, so that the loss has no
    unit. Draws from torch's global generator. A batch with nothing to reconstruct has loss 0.
    """
    there = l1_rsrp_mask > 0
    share = low + (high - low) * torch.rand(len(there), 1, 1, device=there.device)
    hidden = there & (torch.rand(there.shape, device=there.device) < share)
    left = there & ~hidden
    # Without any report left there is no reference to be relative to.
    hidden = hidden & left.flatten(1).any(dim=1)[:, None, None]
    target = model.normalizer.relative_to_visible(l1_rsrp_dbm, left)
    guess = model.reconstruct(l1_rsrp_dbm, left)
    error = functional.huber_loss(guess[hidden], target[hidden], reduction="sum")
    return error / hidden.sum().clamp(min=1)
