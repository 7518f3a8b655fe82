"""Two small models for the runtime tests: a beam picker with a mask, and a stateful GRU with two tensors and a mask."""

import numpy as np
import torch

from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec


class BeamMlp(torch.nn.Module):
    """Reports [n, 16] dBm with mask -> beam probabilities [n, 64]; scaling, mask and temperature in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(33, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 64)])
        self.register_buffer("temperature", torch.tensor(0.3))

    def forward(self, rsrp_dbm: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Beam probabilities from reports; strongest reported value is the reference."""
        seen = mask > 0
        best = torch.where(seen, rsrp_dbm, torch.tensor(-200.0)).amax(-1, keepdim=True)
        relative = torch.where(seen, (rsrp_dbm - best) / 20.0, torch.tensor(-2.0))
        hidden = torch.cat([relative, mask.to(torch.float32), (best + 100.0) / 20.0], dim=-1)
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
        return torch.softmax(self.layers[-1](hidden) / self.temperature, dim=-1)


class HandoverGru(torch.nn.Module):
    """Cell RSRP [n, 6] dBm with mask, speed [n, 2] m/s and a carried state [n, 8] -> (scores [n, 4], state [n, 8])."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.cell = torch.nn.GRUCell(14, hidden)
        self.head = torch.nn.Linear(hidden, 4)

    def forward(
        self, rsrp_dbm: torch.Tensor, mask: torch.Tensor, speed_mps: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the recurrence."""
        reported = torch.where(mask > 0, (rsrp_dbm + 90.0) / 20.0, torch.tensor(0.0))
        features = torch.cat([reported, mask.to(torch.float32), speed_mps / 30.0], dim=-1)
        following = self.cell(features, state)
        return self.head(following), following


MLP_SIGNATURE = ModelSignature(
    name="toy_beam",
    budget_us=100,
    inputs=(
        TensorSpec(name="l1_rsrp_dbm", axes=("ssb_beam",), shape=(16,), unit="dBm"),
        TensorSpec(name="l1_rsrp_mask", axes=("ssb_beam",), shape=(16,), unit="1", dtype="uint8"),
    ),
    outputs=(TensorSpec(name="beam_probability", axes=("beam",), shape=(64,), unit="probability"),),
    masks={"l1_rsrp_dbm": "l1_rsrp_mask"},
)

GRU_SIGNATURE = ModelSignature(
    name="toy_handover",
    budget_us=10_000,
    inputs=(
        TensorSpec(name="cell_rsrp_dbm", axes=("cell",), shape=(6,), unit="dBm"),
        TensorSpec(name="cell_mask", axes=("cell",), shape=(6,), unit="1", dtype="uint8"),
        TensorSpec(name="speed_mps", axes=("xy",), shape=(2,), unit="m/s"),
        TensorSpec(name="state", axes=("hidden",), shape=(8,), unit="1"),
    ),
    outputs=(
        TensorSpec(name="cell_score", axes=("cell",), shape=(4,), unit="logit"),
        TensorSpec(name="next_state", axes=("hidden",), shape=(8,), unit="1"),
    ),
    masks={"cell_rsrp_dbm": "cell_mask"},
    state={"state": "next_state"},
)


def mlp() -> BeamMlp:
    """The beam picker with fixed weights, scaled so that its decisions are clear."""
    torch.manual_seed(0)
    module = BeamMlp()
    with torch.no_grad():
        for layer in module.layers:
            layer.weight *= 3.0
    return module


def gru() -> HandoverGru:
    """The GRU with fixed weights."""
    torch.manual_seed(1)
    return HandoverGru()


def mlp_inputs(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`count` reports of the beam picker."""
    generator = np.random.default_rng(seed)
    return {
        "l1_rsrp_dbm": (generator.standard_normal((count, 16)) * 10 - 90).astype(np.float32),
        "l1_rsrp_mask": generator.integers(0, 2, (count, 16)).astype(np.uint8),
    }


def gru_inputs(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`count` inputs of the GRU, with a state as a running network would hold it."""
    generator = np.random.default_rng(seed)
    return {
        "cell_rsrp_dbm": (generator.standard_normal((count, 6)) * 10 - 90).astype(np.float32),
        "cell_mask": generator.integers(0, 2, (count, 6)).astype(np.uint8),
        "speed_mps": generator.uniform(-30, 30, (count, 2)).astype(np.float32),
        "state": generator.uniform(-1, 1, (count, 8)).astype(np.float32),
    }
