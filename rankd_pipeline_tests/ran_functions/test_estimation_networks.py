"""The networks: symmetries that hold exactly, a start that is already a filter, and files that every runtime takes."""

from functools import partial

import numpy as np
import pytest
import torch

from rankd_pipeline.distillation.heads import GAUSSIAN_90, RegressionHead, parameter_count
from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.channel_estimation.config import ChannelCorpusConfig
from rankd_pipeline.ran_functions.channel_estimation.function import ChannelEstimation
from rankd_pipeline.ran_functions.channel_estimation.networks import (
    Deployable,
    Estimator,
    FilterBank,
    FrequencyInterpolation,
    PilotCNN,
    UNet,
    masked_pilots_loss,
    symmetric,
)

FUNCTION = ChannelEstimation()
CFG, WIDE = ChannelCorpusConfig(), ChannelCorpusConfig(resource_blocks=24)
ALL = (FilterBank, PilotCNN, UNet)
WITH_REST = partial(FilterBank, rest=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Two torch threads on two busy cores collapse."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples(cfg: ChannelCorpusConfig = CFG, count: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Estimates of smooth channels in some noise, with the channels."""
    rng = np.random.default_rng(seed)
    gain = rng.normal(size=(count, 3)) + 1j * rng.normal(size=(count, 3))
    turns = np.exp(-2j * np.pi * 30e3 * np.array([0.0, 80e-9, 250e-9])[:, None] * np.arange(cfg.subcarriers)) / np.sqrt(6)
    channel = (gain @ turns)[:, None].repeat(14, 1)
    noise = 10 ** rng.uniform(-3, -0.5, count)
    ls = 0.5 * (channel[:, [2, 11]][..., 0::4] + channel[:, [2, 11]][..., 2::4])
    ls = ls + np.sqrt(noise / 2)[:, None, None] * (rng.normal(size=ls.shape) + 1j * rng.normal(size=ls.shape))

    def parts(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.stack([values.real, values.imag], 1), dtype=torch.float32)

    return {"ls": parts(ls), "noise_variance": torch.tensor(noise, dtype=torch.float32), "label": parts(channel)}


def at_pilots(channel: torch.Tensor) -> torch.Tensor:
    """What an estimate without noise says of a channel [B, C, T, K]."""
    return 0.5 * (channel[:, :, [2, 11]][..., 0::4] + channel[:, :, [2, 11]][..., 2::4])


def made(kind: type[Estimator], cfg: ChannelCorpusConfig = CFG, seed: int = 0) -> Estimator:
    """A network with weights of some size everywhere, so that nothing hides behind a zero."""
    torch.manual_seed(seed)
    model = kind(cfg)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def answer(model: Estimator, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(batch["ls"], batch["noise_variance"])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("cfg", [CFG, WIDE])
def test_outputs_are_what_the_head_takes(kind, cfg):
    batch = samples(cfg, 3)
    outputs = answer(made(kind, cfg), batch)
    assert outputs.shape == (3, 2, 2, 14, cfg.subcarriers) and bool(torch.isfinite(outputs).all())
    assert np.isfinite(RegressionHead(likelihood=True).validation_loss(outputs.numpy(), batch["label"].numpy()))


@pytest.mark.parametrize("kind", [*ALL, WITH_REST])
def test_a_stronger_channel_gives_a_stronger_answer_and_nothing_else(kind):
    model, batch = made(kind), samples()
    strong = {"ls": 30.0 * batch["ls"], "noise_variance": 900.0 * batch["noise_variance"]}
    one, other = answer(model, batch), answer(model, strong)
    assert torch.allclose(30.0 * one[:, 0], other[:, 0], rtol=1e-3, atol=1e-3)
    assert torch.allclose(one[:, 1] + np.log(900.0), other[:, 1], atol=1e-3)


@pytest.mark.parametrize("kind", [FilterBank, WITH_REST, UNet])
def test_a_turned_channel_gives_a_turned_answer(kind):
    model, batch = made(kind), samples()
    quarter = torch.stack([-batch["ls"][:, 1], batch["ls"][:, 0]], 1)
    one, other = answer(model, batch), answer(model, {**batch, "ls": quarter})
    turned = torch.stack([-one[:, 0, 1], one[:, 0, 0]], 1)
    assert torch.allclose(turned, other[:, 0], atol=2e-4)


@pytest.mark.parametrize("kind", [*ALL, WITH_REST])
def test_no_signal_and_wild_noise_stay_finite(kind):
    ls = torch.zeros(3, 2, 2, 12)
    ls[1] = 1e4
    outputs = answer(made(kind), {"ls": ls, "noise_variance": torch.tensor([1.0, 1e-9, 1e9])})
    assert bool(torch.isfinite(outputs).all())


def test_the_interpolation_starts_exact_for_a_smooth_channel():
    batch = samples(WIDE)
    channel = batch["label"][:, :, 0]
    pilots = 0.5 * (channel[..., 0::4] + channel[..., 2::4])
    interpolation = FrequencyInterpolation(6, 400.0, 30)
    with torch.no_grad():
        found = interpolation(pilots[:, None])[:, 0]
    error = ((found - channel) ** 2).sum() / (channel**2).sum()
    assert 10 * np.log10(float(error)) < -25


def test_what_no_mode_carries_comes_through_where_it_stands_out_of_the_noise():
    """A late path, cut off by a bank of few modes: kept with the rest at high SNR, as good as gone in noise of its size."""
    torch.manual_seed(0)
    bank, with_rest = (FilterBank(WIDE, bank=[(30.0, 3)], rest=rest).eval() for rest in (False, True))
    with_rest.load_state_dict(bank.state_dict(), strict=False)
    late = np.exp(-2j * np.pi * 30e3 * 3e-6 * (4 * np.arange(72) + 1))
    x = torch.tensor(np.stack([late.real, late.imag]), dtype=torch.float32)[None, None].repeat(1, 2, 1, 1)

    def kept(model: FilterBank, noise: float) -> float:
        with torch.no_grad():
            y, _, _ = model.filtered(x, torch.tensor([[noise]]))
            whole = model.frequency(x)
        return float((y * whole).sum() / (whole * whole).sum())

    assert kept(bank, 1e-4) < 0.1 and kept(with_rest, 1e-4) > 0.95
    assert kept(with_rest, 3.0) < 0.15


def test_the_bank_refuses_more_modes_than_there_are_estimates():
    with pytest.raises(RankdError, match="12 estimates carry at most 12 taps and modes"):
        FilterBank(CFG, bank=[(30.0, 13)])
    with pytest.raises(RankdError, match="kind 'mlp' is unknown; expected one of filter_bank, cnn"):
        FUNCTION.student(CFG, {"kind": "mlp"})


@pytest.mark.parametrize(("kind", "most"), [(FilterBank, 10_000), (WITH_REST, 10_000), (PilotCNN, 10_000)])
def test_students_are_small(kind, most):
    assert parameter_count(kind(CFG)) <= most


def test_training_finds_a_better_filter():
    torch.manual_seed(0)
    model, batch = FilterBank(CFG), {**samples(count=512), "has_label": torch.ones(512)}
    head, optimizer = RegressionHead(likelihood=True), torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = head.supervised_loss(model(batch["ls"], batch["noise_variance"]), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    fresh = samples(count=256, seed=1)
    error = (answer(model.eval(), fresh)[:, 0] - fresh["label"]) ** 2
    plain = (fresh["ls"] - at_pilots(fresh["label"])) ** 2
    assert float(error.mean()) < 0.6 * float(plain.mean())


def test_symmetric_batches_are_as_right_as_they_were():
    torch.manual_seed(1)
    batch = samples(count=64)
    batch["teacher"] = batch["label"].half()
    seen = symmetric(batch)
    kept = [((part["ls"] - at_pilots(part["label"])) ** 2).mean((1, 2, 3)) for part in (batch, seen)]
    assert torch.allclose(kept[0], kept[1], rtol=1e-3)
    assert not torch.allclose(batch["ls"], seen["ls"]) and torch.allclose(seen["teacher"], seen["label"], atol=2e-3)
    with pytest.raises(RankdError, match="noise_share changes what the teacher would say"):
        symmetric(batch, noise_share=0.5)
    del batch["teacher"]
    noisy = symmetric(batch, noise_share=1.0)
    assert bool((noisy["noise_variance"] > batch["noise_variance"]).all())


def test_masked_modelling_is_learned():
    torch.manual_seed(0)
    model, batch = FilterBank(CFG), samples(count=512)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return masked_pilots_loss(model, batch["ls"], batch["noise_variance"])

    before = loss(99).item()
    for step in range(30):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert loss(99).item() < before - 0.05


def test_the_error_variance_of_the_file_is_that_of_a_complex_error():
    class Known(Estimator):
        def estimate(self, ls, noise_variance):
            return torch.zeros(len(ls), 2, 14, 48), torch.log(noise_variance)[:, None, None, None]

    _, variance = Deployable(Known(), GAUSSIAN_90)(torch.zeros(2, 2, 2, 12), torch.tensor([0.1, 0.4]))
    assert torch.allclose(variance, torch.tensor([0.2, 0.8]))
    _, doubled = Deployable(Known(), 2 * GAUSSIAN_90)(torch.zeros(2, 2, 2, 12), torch.tensor([0.1, 0.4]))
    assert torch.allclose(doubled, 4 * variance)
