"""The networks of channel estimation: a model-driven student, a small CNN, and a U-Net teacher, all from DMRS estimates.

Real arithmetic only: a complex number is a pair on an axis of its own. What is common to all: estimates are scaled by their own
RMS, never standardised, and scaled back, so that a channel may be of any strength; the two DMRS symbols are taken as their
mean and half their difference, which is what a slowly turning channel consists of.

Shapes: B samples (slot and antenna), C = 2 real and imaginary part, S = 2 DMRS symbols, M = 2 mean and half difference of
them, P estimates of a DMRS symbol, K = 4 P subcarriers, T symbols, D modes of the filter bank, W width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankd_pipeline.distillation.heads import GAUSSIAN_90
from rankd_pipeline.errors import RankdError
from rankd_pipeline.radio.pusch import DMRS_SYMBOLS, SYMBOLS
from rankd_pipeline.ran_functions.channel_estimation.config import ChannelCorpusConfig

PER_PILOT = 4  # subcarriers an estimate stands for
# Noise relative to the estimates' power that a network sees: below and above lies nothing that a decoder could use.
NOISE_RANGE = (1e-5, 1e2)
_FLOOR = 1e-12


class Normalizer(nn.Module):
    """Scales a sample by the RMS of its LS estimates; noise becomes relative to them. Nothing is learned."""

    def forward(self, ls: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled modes [B, M, C, P], relative noise variance [B, 1] and scale [B, 1], from [B, C, S, P] and [B]."""
        power = (ls * ls).sum(1).mean((1, 2)).clamp(min=_FLOOR).unsqueeze(1)
        scale = power.sqrt()
        noise = (noise_variance.unsqueeze(1) / power).clamp(*NOISE_RANGE)
        first, second = ls[:, :, 0], ls[:, :, 1]
        modes_BMCP = torch.stack([0.5 * (first + second), 0.5 * (second - first)], dim=1)
        return modes_BMCP / scale[:, :, None, None], noise, scale


class Estimator(nn.Module, ABC):
    """What the networks share: from an estimate and the log of its error to outputs, and what is exported."""

    @abstractmethod
    def estimate(self, ls: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
        """The channel [B, C, T, K], and the log-variance of its parts, [B, 1, 1, 1] or [B, 1, 1, K]."""

    def forward(self, ls: Tensor, noise_variance: Tensor) -> Tensor:
        """[B, 2, C, T, K]: estimate and log-variance of its real and imaginary parts, as the regression head takes them."""
        channel, log_variance = self.estimate(ls, noise_variance)
        return torch.stack([channel, log_variance.expand_as(channel)], dim=1)


class TimeInterpolation(nn.Module):
    """From the mean and half difference of the DMRS symbols to all symbols, by one of a few curves, mixed for each sample.

    A channel that turns by ±x between the DMRS and their middle is mean·cos(x u)/cos(x) + difference·sin(x u)/sin(x) at u; the
    curves start as these for several x, and are trained.
    """

    def __init__(self, curves: int) -> None:
        super().__init__()
        middle = sum(DMRS_SYMBOLS) / 2
        u = (torch.arange(SYMBOLS) - middle) / (DMRS_SYMBOLS[1] - middle)
        turns = torch.linspace(0.05, 0.8, curves)[:, None]
        pairs = torch.stack([torch.cos(turns * u) / torch.cos(turns), torch.sin(turns * u) / torch.sin(turns)], dim=2)
        self.curves = nn.Parameter(pairs.flatten(1))

    def forward(self, y_BMCK: Tensor, shares: Tensor) -> Tensor:
        """[B, C, T, K], with `shares` [B, curves] of each curve."""
        curves_BTM = (shares @ self.curves).reshape(-1, 1, SYMBOLS, 2)
        return curves_BTM @ y_BMCK.transpose(1, 2)


class FrequencyInterpolation(nn.Module):
    """From estimates to subcarriers: a complex FIR filter of `taps` estimates for each of the four subcarriers of one.

    Beyond the edges of the band, estimates are continued by linear prediction from the `taps` nearest. Both start as the MMSE
    interpolators of a noise-free channel with an exponential profile of `delay_spread_ns`, and are trained.
    """

    def __init__(self, taps: int, delay_spread_ns: float, scs_khz: float) -> None:
        super().__init__()
        self.taps, self.before, self.after = taps, taps // 2, taps - 1 - taps // 2
        seen = PER_PILOT * np.arange(taps) + 1.0  # the middle of the two DMRS that an estimate comes from

        def mmse(wanted: np.ndarray) -> nn.Parameter:
            among = _correlation(seen[:, None] - seen, delay_spread_ns, scs_khz) + 1e-3 * np.eye(taps)
            toward = _correlation(wanted[:, None] - seen, delay_spread_ns, scs_khz)
            return nn.Parameter(_pair(toward @ np.linalg.inv(among)))

        self.filter = mmse(PER_PILOT * self.before + np.arange(PER_PILOT))
        self.behind = mmse(seen[0] - PER_PILOT * np.arange(self.before, 0, -1))
        self.ahead = mmse(seen[-1] + PER_PILOT * np.arange(1, self.after + 1))

    def forward(self, y_BMCP: Tensor) -> Tensor:
        """[B, M, C, P] → [B, M, C, K]."""
        pilots = y_BMCP.shape[-1]
        behind = (y_BMCP[..., : self.taps].flatten(-2) @ _block(self.behind)).unflatten(-1, (2, self.before))
        ahead = (y_BMCP[..., -self.taps :].flatten(-2) @ _block(self.ahead)).unflatten(-1, (2, self.after))
        wide = torch.cat([behind, y_BMCP, ahead], dim=-1)
        windows = torch.stack([wide[..., tap : tap + pilots] for tap in range(self.taps)], dim=-1)
        windows_BMPCt = windows.transpose(2, 3).flatten(-2)
        return (windows_BMPCt @ _block(self.filter)).unflatten(-1, (2, PER_PILOT)).transpose(2, 3).flatten(-2)


class Rest(nn.Module):
    """Gives back what no mode of a filter bank carries, where it stands out of the noise: late, weak paths at high SNR.

    A few modes for many estimates cut off an impulse response that is longer than theirs, and that error does not fall with the
    noise. Whether it is there shows in what they leave: noise alone has the noise's power.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor([[2.0, -2.0], [2.0, -2.0]]))  # slope and offset for mean and half difference
        self.error = nn.Parameter(torch.zeros(1))

    def forward(self, x_BMCP: Tensor, smoothed_BMCP: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The smoothed estimates and a share of what they leave, and what it adds to the log of the error [B, 1]."""
        left = x_BMCP - smoothed_BMCP
        level_BM = torch.log((left * left).sum(2).mean(2) / noise + _FLOOR)
        share_BM = torch.sigmoid(level_BM * self.gate[:, 0] + self.gate[:, 1])
        return smoothed_BMCP + share_BM[:, :, None, None] * left, share_BM[:, :1] * self.error


class FilterBank(Estimator):
    """The model-driven student: a learned 2x1-D Wiener filter whose experts are opened and closed by gates.

    Each expert is the low-rank part of a Wiener filter for one delay spread: estimates are projected on its modes, each
    mode is weighed by a gate between 0 and 1 (its Wiener gain), and the weighed modes are put back together. Gates see the SNR
    and how far each mode stands out of the noise; everything else is linear, so the estimate turns and scales with its
    input exactly. Over time a mixture of a few interpolation curves, whose shares the same gates give.

    Args:
        bank: (delay spread in ns, modes) of each expert, where training starts.
        hidden: width of the two layers of the gates.
        taps: estimates that the interpolation to subcarriers looks at.
        curves: experts of the time interpolation.
        rest: let through what no mode carries where it stands out of the noise (for many resource blocks).
    """

    def __init__(
        self, cfg: ChannelCorpusConfig, *, bank: Sequence[tuple[float, int]] = ((30.0, 3), (100.0, 5), (400.0, 9)),
        hidden: int = 24, taps: int = 6, curves: int = 4, rest: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        pilots = cfg.subcarriers // PER_PILOT
        if taps > pilots or any(count > pilots for _, count in bank):
            raise RankdError(f"student network: {pilots} estimates carry at most {pilots} taps and modes of an expert")
        self.normalizer = Normalizer()
        self.modes = nn.Parameter(
            _pair(np.concatenate([_eigenmodes(pilots, n, spread, cfg.scs_khz) for spread, n in bank], axis=1))
        )
        self.count, self.curves = self.modes.shape[-1], curves
        last = nn.Linear(hidden, 2 * self.count + curves + 1)
        # Experts share their strongest modes: all of them open would count these several times.
        nn.init.constant_(last.bias, -1.0)
        self.gates = nn.Sequential(
            nn.Linear(1 + 2 * self.count, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), last
        )  # fmt: skip
        self.frequency = FrequencyInterpolation(taps, 400.0, cfg.scs_khz)
        self.time = TimeInterpolation(curves)
        self.rest = Rest() if rest else None

    def filtered(self, x_BMCP: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From scaled estimates: the filter's output [B, M, C, K], shares of the time curves, log of the error over the noise."""
        synthesis = _block(self.modes)
        z_BMCD = (x_BMCP.flatten(-2) @ synthesis.T).unflatten(-1, (2, self.count))
        energy_BMD = (z_BMCD * z_BMCD).sum(2)
        seen = torch.cat([torch.log(noise), torch.log1p(energy_BMD.flatten(1) / noise)], dim=1)
        gates, shares, log_error = self.gates(seen).split([2 * self.count, self.curves, 1], dim=1)
        weighed = z_BMCD * torch.sigmoid(gates).reshape(-1, 2, 1, self.count)
        smoothed = (weighed.flatten(-2) @ synthesis).unflatten(-1, (2, x_BMCP.shape[-1]))
        if self.rest is not None:
            smoothed, more = self.rest(x_BMCP, smoothed, noise)
            log_error = log_error + more
        return self.frequency(smoothed), torch.softmax(shares, dim=1), log_error

    def estimate(self, ls: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
        x_BMCP, noise, scale = self.normalizer(ls, noise_variance)
        y_BMCK, shares, log_error = self.filtered(x_BMCP, noise)
        channel = self.time(y_BMCK, shares) * scale[:, :, None, None]
        return channel, (log_error + torch.log(noise * scale * scale))[:, :, None, None]


class PilotCNN(Estimator):
    """The small CNN: convolutions along the estimates of a DMRS symbol, on top of the estimates themselves.

    Each estimate becomes its four subcarriers (a sub-pixel convolution, as in ReEsNet), so that the convolutions run on the
    estimates, a 28th of the grid.
    """

    def __init__(self, cfg: ChannelCorpusConfig, *, width: int = 16, depth: int = 3, kernel: int = 5, curves: int = 4) -> None:
        super().__init__()
        self.normalizer = Normalizer()
        sizes = [5, *[width] * depth]
        layers: list[nn.Module] = []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Conv1d(before, after, kernel, padding=kernel // 2), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.up = nn.Conv1d(width, 4 * PER_PILOT, 1)
        self.pooled = nn.Linear(width + 1, curves + 1)
        self.time = TimeInterpolation(curves)
        self.curves = curves

    def estimate(self, ls: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
        x_BMCP, noise, scale = self.normalizer(ls, noise_variance)
        log_noise = torch.log(noise)
        flat = x_BMCP.flatten(1, 2)
        hidden = self.layers(torch.cat([flat, 0.2 * log_noise.unsqueeze(2).expand(-1, 1, flat.shape[-1])], dim=1))
        correction = self.up(hidden).unflatten(1, (2, 2, PER_PILOT)).transpose(3, 4)
        y_BMCK = (x_BMCP.unsqueeze(-1) + correction).flatten(-2)
        shares, log_error = self.pooled(torch.cat([hidden.mean(2), log_noise], dim=1)).split([self.curves, 1], dim=1)
        channel = self.time(y_BMCK, torch.softmax(shares, dim=1))
        return channel * scale[:, :, None, None], (log_error + torch.log(noise * scale * scale))[:, :, None, None]


class UNet(Estimator):
    """The teacher: a U-Net along the estimates that corrects a wide filter bank, and says how sure it is of each subcarrier.

    The phase of a channel is arbitrary: what the U-Net sees is turned so that the mean channel is real, and turned back.
    """

    def __init__(
        self, cfg: ChannelCorpusConfig, *, width: int = 48, blocks: int = 2, dropout: float = 0.1,
        bank: Sequence[tuple[float, int]] = ((30.0, 4), (100.0, 6), (400.0, 10)), hidden: int = 96, taps: int = 8,
        rest: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bank = FilterBank(cfg, bank=bank, hidden=hidden, taps=taps, curves=6, rest=rest)
        pilots = cfg.subcarriers // PER_PILOT
        if pilots % 2:
            raise RankdError(f"teacher network: {pilots} estimates cannot be halved; take an even number of resource blocks")
        self.enter = nn.Conv1d(4 + 4 * PER_PILOT + 1, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(width, pilots))
        self.down = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.halve = nn.Conv1d(width, 2 * width, 2, stride=2)
        self.bottom = nn.ModuleList(_Block(2 * width, dropout, pilots // 2) for _ in range(blocks))
        self.widen = nn.ConvTranspose1d(2 * width, width, 2, stride=2)
        self.up = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.leave = nn.Conv1d(width, 5 * PER_PILOT, 1)
        nn.init.zeros_(self.leave.weight)
        if self.leave.bias is not None:
            nn.init.zeros_(self.leave.bias)

    def estimate(self, ls: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
        x_BMCP, noise, scale = self.bank.normalizer(ls, noise_variance)
        y_BMCK, shares, log_error = self.bank.filtered(x_BMCP, noise)
        turn = functional.normalize(y_BMCK[:, 0].sum(-1), dim=1, eps=1e-6)
        correction_BMCK, log_errors_BK = self._corrected(_turned(x_BMCP, turn, -1.0), _turned(y_BMCK, turn, -1.0), noise)
        y_BMCK = y_BMCK + _turned(correction_BMCK * noise.sqrt()[:, :, None, None], turn, 1.0)
        channel = self.bank.time(y_BMCK, shares) * scale[:, :, None, None]
        return channel, (log_error + torch.log(noise * scale * scale) + log_errors_BK)[:, None, None]

    def _corrected(self, x_BMCP: Tensor, y_BMCK: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        pilots = x_BMCP.shape[-1]
        smoothed = y_BMCK.unflatten(-1, (pilots, PER_PILOT)).transpose(3, 4).flatten(1, 3)
        level = 0.2 * torch.log(noise).unsqueeze(2).expand(-1, 1, pilots)
        x = self.enter(torch.cat([x_BMCP.flatten(1, 2), smoothed, level], dim=1)) + self.place
        for block in self.down:
            x = block(x)
        deep = self.halve(x)
        for block in self.bottom:
            deep = block(deep)
        x = x + self.widen(deep)
        for block in self.up:
            x = block(x)
        out = self.leave(x).unflatten(1, (5, PER_PILOT)).transpose(2, 3).flatten(2)
        return out[:, :4].unflatten(1, (2, 2)), out[:, 4]


class _Block(nn.Module):
    """A residual block of two convolutions; with `places`, it also mixes all of them."""

    def __init__(self, width: int, dropout: float, places: int | None = None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first, self.second = nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
        self.mix = None if places is None else nn.Linear(places, places)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BWP: Tensor) -> Tensor:
        inside = functional.gelu(self.first(functional.gelu(self.norm(x_BWP))))
        if self.mix is not None:
            inside = inside + self.mix(inside)
        return x_BWP + self.dropout(self.second(inside))


class Deployable(nn.Module):
    """What is shipped: the student, with the error variance that its calibration makes honest, in eval mode."""

    def __init__(self, student: Estimator, radius: float) -> None:
        super().__init__()
        self.student = student
        # The radius is that of a 90 % interval: over a Gaussian's, it is how many predicted deviations one really is.
        self.register_buffer("log_factor", torch.tensor(2.0 * float(np.log(radius / GAUSSIAN_90) + 0.5 * np.log(2.0))))
        self.eval()

    log_factor: Tensor

    def forward(self, ls: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
        """`channel` [B, C, T, K] and `error_variance` [B], that of the complex estimate, mean over the grid."""
        channel, log_variance = self.student.estimate(ls, noise_variance)
        return channel, torch.exp(log_variance + self.log_factor).mean((1, 2, 3))


def masked_pilots_loss(model: Estimator, ls: Tensor, noise_variance: Tensor, low: float = 0.3, high: float = 0.5) -> Tensor:
    """Hide a share (`low` to `high`, drawn a sample) of the estimates of each DMRS symbol, and guess them from their
    neighbours: squared error over the noise of what was hidden, on a log scale, so that strong samples count as weak ones.

    A hidden estimate is filled by linear interpolation between those that are left, as a receiver without it would.
    """
    pilots = ls.shape[-1]
    share = low + (high - low) * torch.rand(len(ls), 1, device=ls.device)
    hidden = torch.rand(len(ls), pilots, device=ls.device) < share
    hidden[:, 0] = hidden[:, -1] = False
    seen = _filled(ls, hidden)
    channel, _ = model.estimate(seen, noise_variance)
    # An estimate is the mean of two DMRS, two subcarriers apart.
    at = torch.tensor(DMRS_SYMBOLS, device=ls.device)
    guess = 0.5 * (channel[:, :, at, 0::PER_PILOT] + channel[:, :, at, 2::PER_PILOT])
    error = ((guess - ls) ** 2).sum((1, 2)) * hidden
    each = error.sum(1) / hidden.sum(1).clamp(min=1)
    return torch.log1p(each / noise_variance.clamp(min=_FLOOR)).mean()


def _filled(ls: Tensor, hidden: Tensor) -> Tensor:
    """LS estimates [B, C, S, P] with hidden ones [B, P] interpolated between the nearest that are not."""
    place = torch.arange(hidden.shape[1], device=ls.device).expand_as(hidden)
    before = torch.where(hidden, -1, place).cummax(1).values
    after = torch.where(hidden, hidden.shape[1], place).flip(1).cummin(1).values.flip(1)
    part = (place - before) / (after - before).clamp(min=1)

    def taken(index: Tensor) -> Tensor:
        return ls.gather(3, index[:, None, None].expand_as(ls))

    return taken(before) + part[:, None, None] * (taken(after) - taken(before))


def _turned(x: Tensor, turn: Tensor, sign: float) -> Tensor:
    """Complex [B, M, C, ...] times `turn` [B, C] of unit size, or (sign −1) its conjugate."""
    shape = (-1, *[1] * (x.ndim - 2))
    real, imaginary = turn[:, 0].reshape(shape), sign * turn[:, 1].reshape(shape)
    return torch.stack([x[:, :, 0] * real - x[:, :, 1] * imaginary, x[:, :, 0] * imaginary + x[:, :, 1] * real], dim=2)


def _pair(matrix: np.ndarray) -> Tensor:
    """A complex matrix [out, in] as float32 [2, out, in]."""
    return torch.tensor(np.stack([np.real(matrix), np.imag(matrix)]), dtype=torch.float32)


def _block(pair: Tensor) -> Tensor:
    """The real matrix [2 in, 2 out] by which (real parts, imaginary parts) side by side are multiplied from the left, so
    that a complex product with `pair` [2, out, in] becomes one real one."""
    real, imaginary = pair[0].T, pair[1].T
    return torch.cat([torch.cat([real, imaginary], dim=1), torch.cat([-imaginary, real], dim=1)], dim=0)


def _correlation(subcarriers: np.ndarray, delay_spread_ns: float, scs_khz: float) -> np.ndarray:
    """E[h(k + x) h*(k)] of a channel with an exponential power delay profile."""
    return 1.0 / (1.0 + 2j * np.pi * subcarriers * scs_khz * 1e3 * delay_spread_ns * 1e-9)


def _eigenmodes(pilots: int, count: int, delay_spread_ns: float, scs_khz: float) -> np.ndarray:
    """The `count` strongest eigenvectors [P, count] of the covariance of the estimates of a DMRS symbol."""
    at = PER_PILOT * np.arange(pilots)
    _, vectors = np.linalg.eigh(_correlation(at[:, None] - at, delay_spread_ns, scs_khz))
    return vectors[:, ::-1][:, :count]


def symmetric(batch: dict[str, Tensor], noise_share: float = 0.0) -> dict[str, Tensor]:
    """A training batch as it might have been as well: turned by any phase, and half of it run backwards in time.

    Both keep what is known of a sample: its channel and its teacher's answer turn with it. With `noise_share` that share of
    the samples is heard with more noise on top of the simulator's, up to 4 dB; no stored answer of a teacher fits these.
    """
    if noise_share and "teacher" in batch:
        raise RankdError("student.loss: noise_share changes what the teacher would say; take it out of the student's loss.")
    ls, noise = batch["ls"], batch["noise_variance"]
    angle = 2 * torch.pi * torch.rand(len(ls), device=ls.device)
    turn = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    seen = {"ls": ls, **{name: batch[name].to(ls.dtype) for name in ("label", "teacher") if name in batch}}
    half = len(ls) // 2
    for name, value in seen.items():
        turned = _turned(value.unsqueeze(1), turn, 1.0).squeeze(1)
        seen[name] = torch.cat([turned[:half].flip(2), turned[half:]])
    if noise_share:
        more = (
            noise * 10 ** (1.2 * torch.rand(len(ls), device=ls.device) - 1) * (torch.rand(len(ls), device=ls.device) < noise_share)
        )
        seen["ls"] = seen["ls"] + torch.randn_like(ls) * (0.5 * more).sqrt()[:, None, None, None]
        seen["noise_variance"] = noise + more
    return {**batch, **seen}


STUDENTS: dict[str, Callable[..., Estimator]] = {"filter_bank": FilterBank, "cnn": PilotCNN}
