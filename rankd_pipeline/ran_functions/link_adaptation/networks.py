"""Networks of link adaptation: from CQI and HARQ history to the BLER of every MCS, rising with the MCS by construction.

Each network reads whole windows at once for training (`forward`) and one slot at a time in the field (`step`, with its
state carried by the caller); a test holds the two against each other. Axis legend: B samples, L slots, F encoded report
fields, H hidden units, M MCS indices, S values of carried state.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.contract import Run
from rankd_pipeline.ran_functions.link_adaptation.tables import EFFICIENCY, N_CQI, N_MCS

TARGETS = (0.01, 0.03, 0.1, 0.2, 0.3)
"""BLER targets at which the decision rule is tuned; between them it is interpolated."""
PRICE_STEP, PRICE_LIMIT, LOWEST_LOG_PRICE = 0.05, 6.0, -1.0
"""Step of the log price for each lost block, how far it may go from where it begins, and how low it may get at all."""
LIKELY_LOST, AVOID = 0.5, 10.0
"""A block that is likelier lost than not is avoided, whatever the price: what its utility loses for each unit of BLER."""
CQI_AGE_SCALE, DOPPLER_HZ, PRB = 20.0, 30.0, 24.0


class ReportEncoder(nn.Module):
    """The report of a slot as numbers near one: CQI and its age, ACK or NACK and the MCS it is about, Doppler, allocation.

    mean_F and scale_F are learned from training windows and stored with the weights.
    """

    FIELDS = 7
    mean_F: Tensor
    scale_F: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(self.FIELDS))
        self.register_buffer("scale_F", torch.ones(self.FIELDS))

    def forward(
        self, cqi: Tensor, cqi_age_slots: Tensor, harq_ack: Tensor, harq_mask: Tensor, harq_mcs: Tensor, doppler_hz: Tensor,
        allocated_prb: Tensor,
    ) -> Tensor:  # fmt: skip
        """[..., F] from fields [...]; the last two may lack the slot axis."""
        return (self.raw(cqi, cqi_age_slots, harq_ack, harq_mask, harq_mcs, doppler_hz, allocated_prb) - self.mean_F) / self.scale_F

    @staticmethod
    def raw(
        cqi: Tensor, cqi_age_slots: Tensor, harq_ack: Tensor, harq_mask: Tensor, harq_mcs: Tensor, doppler_hz: Tensor,
        allocated_prb: Tensor,
    ) -> Tensor:  # fmt: skip
        """The same before it is standardised."""
        if doppler_hz.ndim < cqi.ndim:
            doppler_hz, allocated_prb = doppler_hz[:, None].expand_as(cqi), allocated_prb[:, None].expand_as(cqi)
        ack = harq_ack * harq_mask
        fields = (
            cqi / (N_CQI - 1), torch.clamp(cqi_age_slots / CQI_AGE_SCALE, max=4.0), ack, harq_mask - ack,
            harq_mcs * harq_mask / (N_MCS - 1), torch.log(torch.clamp(doppler_hz, min=0.1) / DOPPLER_HZ),
            torch.log(torch.clamp(allocated_prb, min=1.0) / PRB),
        )  # fmt: skip
        return torch.stack(fields, dim=-1)

    def learn(self, inputs: Mapping[str, Tensor]) -> None:
        """Fix mean and scale from training windows."""
        raw = self.raw(**inputs).flatten(0, -2)
        self.mean_F.copy_(raw.mean(dim=0))
        self.scale_F.copy_(raw.std(dim=0).clamp(min=1e-2))


class MonotoneHead(nn.Module):
    """Logits [..., M] of the BLER, each at least that of the MCS below: a first value plus steps that are never negative."""

    staircase: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, N_MCS)
        self.register_buffer("staircase", torch.ones(N_MCS - 1, N_MCS - 1).tril(), persistent=False)
        with torch.no_grad():
            # To begin with, the logits climb from -8 to 8 over the table.
            self.linear.bias[0] = -8.0
            self.linear.bias[1:] = math.log(math.expm1(16.0 / (N_MCS - 1)))

    def forward(self, x: Tensor) -> Tensor:
        raw = self.linear(x)
        first = raw[..., :1]
        return torch.cat([first, first + functional.linear(functional.softplus(raw[..., 1:]), self.staircase)], dim=-1)


class LinkNetwork(nn.Module, ABC):
    """What all link adaptation networks share: the encoder in front, a carried state, a forecast for self-supervision.

    state_size: values of carried state S; a state of zeros knows nothing yet.
    """

    state_size: int

    def __init__(self, width: int) -> None:
        super().__init__()
        self.normalizer = ReportEncoder()
        self.forecast = nn.Linear(width, 1)

    def forward(self, **report: Tensor) -> Tensor:
        """Logits [B, L, M] from windows: fields [B, L], doppler_hz and allocated_prb [B]."""
        return self.read_out(self.hidden(self.normalizer(**_floats(report))))

    def step(self, state: Tensor, **report: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, M] and the next state [B, S] from the report of one slot, fields [B]."""
        hidden, following = self.advance(self.normalizer(**_floats(report)), state)
        return self.read_out(hidden), following

    @abstractmethod
    def hidden(self, x_BLF: Tensor) -> Tensor:
        """[B, L, H] of whole windows, beginning with a state of zeros."""

    @abstractmethod
    def advance(self, x_BF: Tensor, state_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden units [B, H] and the next state [B, S] of one slot."""

    @abstractmethod
    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits [..., M] from hidden units [..., H]."""


class LinkRecurrent(LinkNetwork):
    """The teacher: stacked recurrent layers with a small network on top.

    kind: gru or lstm. On the laptop corpus a GRU of 128 units reaches a validation loss of 0.149 where an LSTM of 128
    reaches 0.155 in the same time (docs/link_adaptation.md).
    """

    def __init__(self, *, kind: str = "gru", width: int = 128, depth: int = 1, dropout: float = 0.1) -> None:
        if kind not in ("gru", "lstm"):
            raise RankdError(f"steps.teacher.network: kind {kind!r} is unknown; expected gru or lstm.")
        super().__init__(width)
        self.width, self.depth, self.parts = width, depth, 2 if kind == "lstm" else 1
        self.state_size = self.parts * depth * width
        layer = nn.LSTM if kind == "lstm" else nn.GRU
        self.layers = layer(ReportEncoder.FIELDS, width, depth, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, width)
        self.head = MonotoneHead(width)

    def hidden(self, x_BLF: Tensor) -> Tensor:
        return self.layers(x_BLF)[0]

    def advance(self, x_BF: Tensor, state_BS: Tensor) -> tuple[Tensor, Tensor]:
        parts = state_BS.reshape(-1, self.parts, self.depth, self.width).permute(1, 2, 0, 3).contiguous()
        out, after = self.layers(x_BF[:, None], (parts[0], parts[1]) if self.parts == 2 else parts[0])
        after = torch.stack(after) if self.parts == 2 else after[None]
        return out[:, 0], after.permute(2, 0, 1, 3).reshape(-1, self.state_size)

    def read_out(self, hidden: Tensor) -> Tensor:
        return self.head(self.dropout(functional.gelu(self.up(hidden))))


class LinkGRU(LinkNetwork):
    """A student with memory: one GRU layer, its hidden units carried from slot to slot."""

    def __init__(self, *, hidden: int = 32) -> None:
        super().__init__(hidden)
        self.state_size = hidden
        self.gru = nn.GRU(ReportEncoder.FIELDS, hidden, batch_first=True)
        self.head = MonotoneHead(hidden)

    def hidden(self, x_BLF: Tensor) -> Tensor:
        return self.gru(x_BLF)[0]

    def advance(self, x_BF: Tensor, state_BS: Tensor) -> tuple[Tensor, Tensor]:
        # Written out, so that one slot exports as two matrix products that every runtime takes.
        weight_x, weight_h, bias_x, bias_h = self.gru.all_weights[0]
        reset_x, update_x, new_x = functional.linear(x_BF, weight_x, bias_x).chunk(3, dim=-1)
        reset_h, update_h, new_h = functional.linear(state_BS, weight_h, bias_h).chunk(3, dim=-1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        following = new + update * (state_BS - new)
        return following, following

    def read_out(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


class LinkMLP(LinkNetwork):
    """A student without memory of its own: the reports of the last `slots` slots at once; they are its carried state."""

    def __init__(self, *, slots: int = 32, hidden: Sequence[int] = (64, 32)) -> None:
        if slots < 2 or not hidden:
            raise RankdError("student network mlp: it needs at least 2 slots and one hidden layer")
        super().__init__(hidden[-1])
        self.slots = slots
        self.state_size = (slots - 1) * ReportEncoder.FIELDS
        self.first = nn.Conv1d(ReportEncoder.FIELDS, hidden[0], slots)
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in zip(hidden[:-1], hidden[1:], strict=True))
        self.head = MonotoneHead(hidden[-1])

    def hidden(self, x_BLF: Tensor) -> Tensor:
        before = functional.pad(x_BLF.transpose(1, 2), (self.slots - 1, 0))
        return self._rest(self.first(before).transpose(1, 2))

    def advance(self, x_BF: Tensor, state_BS: Tensor) -> tuple[Tensor, Tensor]:
        seen_BLF = torch.cat([state_BS, x_BF], dim=-1)
        weight = self.first.weight.transpose(1, 2).flatten(1)
        return self._rest(functional.linear(seen_BLF, weight, self.first.bias)), seen_BLF[:, ReportEncoder.FIELDS :]

    def read_out(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def _rest(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Deployable(nn.Module):
    """What is shipped: one slot of the network, its calibration and the decision rule in one graph.

    The rule takes the MCS of highest utility rate * (1 / price - BLER), rate over the highest. With price 1 that is the
    highest expected rate; above, a lost block costs `price` times its bits. It is the Lagrange multiplier of "highest rate
    under a mean BLER", and HARQ feedback finds it for each user, as the outer loop finds its offset: each NACK raises the
    log of the price by PRICE_STEP * (1 - aim), each ACK lowers it by PRICE_STEP * aim. It may fall a little below 1, so that
    users who would lose fewer blocks than they may come near the target, but not to where blocks are thrown away. Where
    the price begins, and which aim gives a mean BLER of `bler_target`, was tuned in the slot loop (see `operating`).
    Carried state: that of the network, then the log of the price over its beginning.
    """

    rate: Tensor
    knots: Tensor
    aims: Tensor
    prices: Tensor
    temperature: Tensor

    def __init__(self, network: LinkNetwork, calibration: Mapping[str, float], targets: Sequence[float] = TARGETS) -> None:
        super().__init__()
        self.network, self.targets = network, tuple(targets)
        self.register_buffer("knots", torch.log(torch.tensor(self.targets[:-1])))
        for name, key in (("aims", aim_key), ("prices", price_key)):
            self.register_buffer(name, _bends(self.targets, [calibration[key(target)] for target in self.targets]))
        self.register_buffer("temperature", torch.tensor(float(calibration["temperature"])))
        self.register_buffer("rate", torch.from_numpy(EFFICIENCY / EFFICIENCY.max()))
        self.eval()

    def forward(
        self, cqi: Tensor, cqi_age_slots: Tensor, harq_ack: Tensor, harq_mask: Tensor, harq_mcs: Tensor, doppler_hz: Tensor,
        allocated_prb: Tensor, bler_target: Tensor, state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(mcs_utility [B, M], bler [B, M], next_state [B, S]) from one slot's report, fields [B], and the state [B, S]."""
        memory, offset_B = state[:, :-1], state[:, -1]
        logits, following = self.network.step(
            memory, cqi=cqi, cqi_age_slots=cqi_age_slots, harq_ack=harq_ack, harq_mask=harq_mask, harq_mcs=harq_mcs,
            doppler_hz=doppler_hz, allocated_prb=allocated_prb,
        )  # fmt: skip
        bler = torch.sigmoid(logits / self.temperature)
        log_aim, log_begin = self.tuned(bler_target)
        lost = 1.0 - harq_ack
        offset_B = torch.clamp(offset_B + PRICE_STEP * harq_mask * (lost - torch.exp(log_aim)), -PRICE_LIMIT, PRICE_LIMIT)
        offset_B = torch.maximum(offset_B, LOWEST_LOG_PRICE - log_begin)
        worth = torch.exp(-log_begin - offset_B)[:, None]
        utility = self.rate * (worth - bler - AVOID * torch.relu(bler - LIKELY_LOST))
        return utility, bler, torch.cat([following, offset_B[:, None]], dim=-1)

    def tuned(self, bler_target: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the aim and of the first price [B] for a target [B]; targets beyond those tuned count as the nearest one."""
        log_target = torch.log(torch.clamp(bler_target, self.targets[0], self.targets[-1]))
        climbed = torch.relu(log_target[:, None] - self.knots)
        return self.aims[0] + climbed @ self.aims[1:], self.prices[0] + climbed @ self.prices[1:]


def _bends(targets: Sequence[float], values: Sequence[float]) -> Tensor:
    """log(values) over log(targets) as a broken line [K]: its first value, and at each knot what the slope gains."""
    x, y = torch.log(torch.tensor(targets)), torch.log(torch.tensor(values))
    slope = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
    return torch.cat([y[:1], slope[:1], slope[1:] - slope[:-1]])


OUTPUTS = ("mcs_utility", "bler", "next_state")


def stepper(deployable: Deployable) -> Run:
    """A network in PyTorch as what its deployed file will be: one slot a call, tensors of the signature in and out."""

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            said = deployable(**{name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in inputs.items()})
        return {name: values.numpy() for name, values in zip(OUTPUTS, said, strict=True)}

    return run


def aim_key(target: float) -> str:
    """Name, among the calibration parameters, of the aim of each user's outer loop for a mean BLER of `target`."""
    return f"aim_at_{target:g}"


def price_key(target: float) -> str:
    """Name of the first price for `target`."""
    return f"price_at_{target:g}"


def forecast_loss(model: LinkNetwork, report: Mapping[str, Tensor], mask_share: tuple[float, float], ahead: int = 8) -> Tensor:
    """Self-supervision from logs alone: the CQI in force `ahead` slots later, from a history with part of the HARQ hidden.

    Huber loss in CQI steps. mask_share: range of the share of HARQ feedback hidden, drawn a window; draws from torch's
    global generator.
    """
    low, high = mask_share
    cqi = report["cqi"].float()
    share = low + (high - low) * torch.rand(len(cqi), 1, device=cqi.device)
    kept = report["harq_mask"].float() * (torch.rand(cqi.shape, device=cqi.device) >= share)
    hidden = model.hidden(model.normalizer(**_floats({**report, "harq_mask": kept})))
    guess = model.forecast(hidden[:, :-ahead])[..., 0]
    return functional.huber_loss(guess, (cqi[:, ahead:] - cqi[:, :-ahead]))


def _floats(report: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in report.items()}
