"""The networks of channel prediction: WiFo's masked transformer in every size, for channels of any shape.

Written from the architecture as published (Liu et al., WiFo, arXiv:2412.08908) and its size table.
Shapes: B samples, V visible patches, M wanted patches, L = V + M, E = 128 real numbers a patch, D width, H heads.
A patch's place is its (time, antenna, frequency) index; attention does not care for the order, so the decoder's tokens
stand as [visible, wanted].
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankd_pipeline.distillation.heads import RegressionHead
from rankd_pipeline.distillation.internals import Internals
from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.channel_prediction.alignment import aligned
from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, PATCH

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 64, "encoder_depth": 6, "decoder_depth": 4, "heads": 8, "expansion": 2},
    "little": {"width": 128, "encoder_depth": 6, "decoder_depth": 4, "heads": 8, "expansion": 2},
    "small": {"width": 256, "encoder_depth": 6, "decoder_depth": 4, "heads": 8, "expansion": 2},
    "base": {"width": 512, "encoder_depth": 6, "decoder_depth": 4, "heads": 8, "expansion": 2},
    # Expansion 4 is inferred from the published 86.1 M parameters; the released code holds no such size.
    "large": {"width": 768, "encoder_depth": 8, "decoder_depth": 4, "heads": 8, "expansion": 4},
    "tiny-wifo": {"width": 256, "encoder_depth": 6, "decoder_depth": 4, "heads": 8, "expansion": 2},
    "tiny-wifo-v1": {"width": 256, "encoder_depth": 3, "decoder_depth": 2, "heads": 8, "expansion": 2},
    "tiny-wifo-v2": {"width": 128, "encoder_depth": 6, "decoder_depth": 4, "heads": 8, "expansion": 2},
    "tiny-wifo-v3": {"width": 128, "encoder_depth": 3, "decoder_depth": 2, "heads": 8, "expansion": 2},
}
"""WiFo's sizes, and Tiny-WiFo (the architecture of WiFo-small) with its three smaller versions."""
NOISE = 0.01
"""Of a channel's power, from which what is learned of it begins: 20 dB below, as the corpus has it."""


def masked_transformer(size: str | None = None, **network: Any) -> "MaskedChannelTransformer":
    """A network by the name of its size, single settings over it. Raises: RankdError for an unknown size."""
    if size is not None and size not in SIZES:
        raise RankdError(f"network size {size!r}: unknown; expected one of {', '.join(SIZES)}, or width and depths of your own.")
    return MaskedChannelTransformer(**{**(SIZES[size] if size is not None else {}), **network})


class MaskedChannelTransformer(nn.Module):
    """A masked autoencoder: the encoder sees the visible patches, the decoder fills in the wanted ones.

    align: turn each sample by the mean Doppler, delay and angle of its visible part first, and back behind the last layer;
    in between, the decoder is told the autoregressive run of the nearest visible patch, from which filters of the sample's own
    have taken noise, and what is learned is how much noise that is, how far to trust each entry of the run, and the change
    against it (alignment.py, runs.py). Not a part of WiFo.
    """

    def __init__(
        self, *, width: int = 64, encoder_depth: int = 3, decoder_depth: int = 2, heads: int = 8, expansion: int = 2,
        align: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.align = align
        if width % heads or width % 2:
            raise RankdError(f"network: width {width} must be even and a multiple of heads {heads}.")
        self.embed = nn.Linear(ELEMENTS, width)
        self.place = Place(width)
        self.encoder = nn.ModuleList(Block(width, heads, expansion) for _ in range(encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.decoder = nn.ModuleList(Block(width, heads, expansion) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, ELEMENTS)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for part in module.weight.chunk(3 if name.endswith("attend") else 1):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
        if align:  # the start is the autoregressive run
            self.noise = nn.Parameter(torch.zeros(()))
            self.trust = nn.Linear(width, PATCH**3)
            for start in (self.head.weight, self.trust.weight, self.trust.bias):
                nn.init.zeros_(start)

    def forward(self, visible_patches: Tensor, visible_at: Tensor, wanted_at: Tensor) -> Tensor:
        """Predict the wanted patches.

        Args:
            visible_patches: [B, V, E], unit mean power over a set.
            visible_at, wanted_at: places [B, V, 3] and [B, M, 3] in patches, any number type. A row whose patches are
                fewer than the tensor's is padded at the end with places of -1, and its padding comes back as zeros.
        Returns: [B, M, E].
        """
        if torch.compiler.is_exporting():  # an exported graph has one shape and no padding
            return self._predict(visible_patches, visible_at, wanted_at, None)
        outputs = None
        for rows, seen, wanted in _like_shaped(visible_at, wanted_at):
            part = self._predict(visible_patches[rows, :seen], visible_at[rows, :seen], wanted_at[rows, :wanted], None)
            if seen == visible_at.shape[1] and wanted == wanted_at.shape[1] and len(part) == len(visible_at):
                return part
            if outputs is None:
                outputs = part.new_zeros(len(visible_at), wanted_at.shape[1], ELEMENTS)
            outputs[rows, :wanted] = part
        assert outputs is not None
        return outputs

    @property
    def feature_widths(self) -> dict[str, int]:
        """Width of each feature in `internals`."""
        return dict.fromkeys(("embedding", "encoder", "decoder"), self.embed.out_features)

    def internals(self, view: Mapping[str, Tensor]) -> Internals:
        """What distillation may look at, for a view of one shape without padding (inputs and `label` [B, M, E]).

        Attention maps after the softmax of both stacks [B, H, V, V] and [B, H, L, L]; features: every patch's embedding
        before its place is added [B, L, D], hidden ones too, and each stack's residual stream after its last attention.
        """
        found: dict[str, Any] = {}
        output = self._predict(view["visible_patches"], view["visible_at"], view["wanted_at"], found)
        label = view["label"].to(output.dtype)
        if found["turn"] is not None:
            label = found["turn"].into(label)
        found["embedding"] = torch.cat([found["embedding"], self.embed(label)], dim=1)
        features = {name: found[name] for name in ("embedding", "encoder", "decoder")}
        return Internals(output, {name: tuple(found[f"{name}_maps"]) for name in ("encoder", "decoder")}, features)

    def _predict(self, patches: Tensor, visible_at: Tensor, wanted_at: Tensor, found: dict[str, Any] | None) -> Tensor:
        seen, wanted = visible_at.shape[1], wanted_at.shape[1]
        own = aligned(patches, visible_at, wanted_at, NOISE * torch.exp(self.noise)) if self.align else None
        embedded = self.embed(patches if own is None else own.patches_BLE)
        place = self.place(torch.cat([visible_at, wanted_at], dim=1))
        x_RD = self._through("encoder", embedded[:, :seen] + place[:, :seen], found)
        x_BVD = self.decoder_embed(self.encoder_norm(x_RD)).unflatten(0, (-1, seen))
        # Of what is hidden, the run alone says something.
        told = embedded[:, seen:] if own is not None else x_BVD.new_zeros(x_BVD.shape[0], wanted, 1)
        x_RD = self._through("decoder", torch.cat([x_BVD, self.mask_token.to(x_BVD.dtype) + told], dim=1) + place, found)
        if found is not None:
            found["embedding"], found["turn"] = embedded[:, :seen], None if own is None else own.turn
        x_RD = self.decoder_norm(x_RD.unflatten(0, (-1, seen + wanted))[:, seen:].flatten(0, 1))
        predicted = self.head(x_RD).unflatten(0, (-1, wanted))
        if own is None:
            return predicted
        # Real and imaginary part are trusted alike.
        weight, bias = (part.repeat_interleave(2, dim=0) for part in (self.trust.weight, self.trust.bias))
        return own.answer(functional.linear(x_RD, weight, 1.0 + bias).unflatten(0, (-1, wanted)), predicted)

    def _through(self, stack: str, x_BLD: Tensor, found: dict[str, Any] | None) -> Tensor:
        """All patches of all samples as rows [R, D] behind a stack's last block."""
        maps, attended, length = [], x_BLD, x_BLD.shape[1]
        x_RD = x_BLD.flatten(0, 1)
        for block in self.encoder if stack == "encoder" else self.decoder:
            x_RD, attended, weights = block(x_RD, length, found is not None)
            maps.append(weights)
        if found is not None:
            found[stack], found[f"{stack}_maps"] = attended.unflatten(0, (-1, length)), maps
        return x_RD


def _like_shaped(visible_at: Tensor, wanted_at: Tensor) -> list[tuple[Any, int, int]]:
    """Rows of a batch by how many patches they hold: [(row indices or all, V, M)]."""
    pairs = torch.stack([(at[..., 0] >= 0).sum(dim=1) for at in (visible_at, wanted_at)], dim=1)
    unique, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    if len(unique) == 1:
        return [(slice(None), int(unique[0, 0]), int(unique[0, 1]))]
    return [(torch.nonzero(inverse == i).flatten(), int(pair[0]), int(pair[1])) for i, pair in enumerate(unique)]


class Place(nn.Module):
    """Fixed sine and cosine of a patch's place: three parts, for time, antenna and frequency, beside each other.

    Each part: sin of place times 10000^(-i / (size / 2)) for all i, then the cosines. The first two parts are as near to
    a third of the width as an even number comes, the last is the rest.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        third = 2 * round(width / 6)
        self.parts = (third, third, width - 2 * third)
        rates, quarters = torch.zeros(3, width), torch.zeros(width)
        for axis, (size, start) in enumerate(zip(self.parts, (0, third, 2 * third), strict=True)):
            half = 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))
            rates[axis, start : start + size] = half.repeat(2).float()
            quarters[start + size // 2 : start + size] = math.pi / 2  # cos(x) is sin(x + pi / 2)
        self.register_buffer("rates", rates, persistent=False)
        self.register_buffer("quarters", quarters, persistent=False)

    def forward(self, at: Tensor) -> Tensor:
        """at [B, L, 3] -> [B, L, D]."""
        return torch.sin(at.float() @ self.get_buffer("rates") + self.get_buffer("quarters"))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer perceptron with GELU; no dropout.

    Queries, keys and values come of one layer, and patches are rows of one matrix: fewer operators for a runtime to start.
    """

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, eps=1e-6)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.widen = nn.Linear(width, expansion * width)
        self.narrow = nn.Linear(expansion * width, width)

    def forward(self, x_RD: Tensor, length: int, want_map: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output and residual stream after attention, both [R, D], and the attention map [B, H, L, L] where it is wanted.

        x_RD: the patches of all samples one behind the other, `length` of each.
        """
        heads = self.attend(self.norm_attention(x_RD)).reshape(-1, length, 3, self.heads, x_RD.shape[1] // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).split(1)
        weights = None
        if not want_map and not torch.compiler.is_exporting():
            mixed = functional.scaled_dot_product_attention(q[0], k[0], v[0])[None]
        else:  # a fused kernel does not give its weights away
            weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
            mixed = weights @ v
            weights = weights[0]
        attended = x_RD + self.project(mixed.permute(0, 1, 3, 2, 4).reshape(-1, x_RD.shape[1]))
        return attended + self.narrow(functional.gelu(self.widen(self.norm_mlp(attended)))), attended, weights


class MaskedHead(RegressionHead):
    """WiFo's loss: the mean squared magnitude of the error over the complex entries of all wanted patches.

    That is twice the mean over the real numbers. Unlike the NMSE of each sample it weighs a strong channel more, as the
    published loss does, unless the view has a `weight` [B, 1, 1]. Padding (patches of zeros, which a received channel never
    has) takes no part in the interval.
    """

    def supervised_loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        square = (outputs.float() - batch["label"].float()).square()
        return 2.0 * (square * batch["weight"] if "weight" in batch else square).mean()

    def fit_calibration(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        there = np.abs(labels).sum(axis=-1) > 0
        return super().fit_calibration(outputs[there], labels[there])


class Deployable(nn.Module):
    """The network with the half width of its conformal interval, the same for every entry, as a second output."""

    radius: Tensor

    def __init__(self, network: nn.Module, radius: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("radius", torch.tensor([radius], dtype=torch.float32))

    def forward(self, visible_patches: Tensor, visible_at: Tensor, wanted_at: Tensor) -> tuple[Tensor, Tensor]:
        """channel [B, M, E] and half_width [B, 1]."""
        channel = self.network(visible_patches, visible_at, wanted_at)
        return channel, self.radius.expand(channel.shape[0], 1)
