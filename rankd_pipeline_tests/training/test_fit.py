"""The training loop: it learns, stops early, resumes to the same bits after SIGKILL, and costs little over a bare loop."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rankd_pipeline.errors import RankdError
from rankd_pipeline.training.fit import FitConfig, fit

CFG = FitConfig(epochs=6, batch_size=32, lr=2e-2, ema_decay=0.9, clip_norm=1.0, weight_decay=0.01)


def problem(rows: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, 8)).astype(np.float32)
    return {"x": x, "y": (x[:, 0] > x[:, 1]).astype(np.int64) + (x[:, 2] > 0.5)}


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def noisy_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Draws: dropout in the model and noise here, as an augmentation does."""
    return functional.cross_entropy(model(batch["x"] + 0.1 * torch.randn_like(batch["x"])), batch["y"])


def validator(data: dict[str, np.ndarray]):
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    return lambda model: functional.cross_entropy(model(x), y).item()


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()


def test_learns_and_holds_the_best_weights(tmp_path):
    data, model, told = problem(), network(), []
    validate = validator(data)
    before = validate(model.eval())
    result = fit(model, data, noisy_loss, validate, CFG, seed=1, work=tmp_path, on_epoch=told.append)
    assert result.best_value < 0.8 * before
    assert validate(model) == pytest.approx(result.best_value, abs=1e-7)
    assert not model.training
    assert tuple(told) == result.history and len(told) == CFG.epochs
    assert result.best_value == min(r.validation for r in told) == told[result.best_epoch - 1].validation
    assert result.steps == CFG.epochs * 13 and result.samples_per_s > 0


def test_is_deterministic_and_leaves_the_global_generator_alone(tmp_path):
    hashes = []
    torch.manual_seed(77)
    expected = torch.rand(3)
    for run in range(2):
        model = network()
        torch.manual_seed(77)
        fit(model, problem(), noisy_loss, validator(problem()), CFG, seed=1, work=tmp_path / str(run))
        assert torch.equal(torch.rand(3), expected)
        hashes.append(digest(model))
    assert hashes[0] == hashes[1]
    other = network()
    fit(other, problem(), noisy_loss, validator(problem()), CFG, seed=2, work=tmp_path / "other")
    assert digest(other) != hashes[0]


def test_early_stopping_keeps_the_best_epoch(tmp_path):
    values = iter([3.0, 2.0, 2.5, 2.4, 9.9])
    cfg = CFG.model_copy(update={"patience": 2})
    result = fit(network(), problem(), noisy_loss, lambda _: next(values), cfg, seed=1, work=tmp_path)
    assert (result.best_epoch, result.best_value, len(result.history)) == (2, 2.0, 4)


def test_finished_fit_is_not_trained_again(tmp_path):
    model = network()
    first = fit(model, problem(), noisy_loss, validator(problem()), CFG, seed=1, work=tmp_path)
    again = network()

    def never(*_):
        raise AssertionError("a finished fit must not train")

    second = fit(again, problem(), never, validator(problem()), CFG, seed=1, work=tmp_path)
    assert digest(again) == digest(model)
    assert second.history == first.history


def test_checkpoint_of_another_fit_or_a_torn_one_is_started_over(tmp_path):
    reference = network()
    fit(reference, problem(), noisy_loss, validator(problem()), CFG, seed=1, work=tmp_path / "a")
    fit(network(), problem(), noisy_loss, validator(problem()), CFG, seed=9, work=tmp_path / "b")
    model = network()
    fit(model, problem(), noisy_loss, validator(problem()), CFG, seed=1, work=tmp_path / "b")
    assert digest(model) == digest(reference)
    whole = tmp_path / "b" / "checkpoint.safetensors"
    whole.write_bytes(whole.read_bytes()[:1000])
    model = network()
    fit(model, problem(), noisy_loss, validator(problem()), CFG, seed=1, work=tmp_path / "b")
    assert digest(model) == digest(reference)


def test_changed_data_or_weights_start_over(tmp_path):
    fit(network(), problem(), noisy_loss, validator(problem()), CFG, seed=1, work=tmp_path)
    data = problem()
    data["x"] = data["x"] + 1
    calls = []

    def counted(model, batch):
        calls.append(1)
        return noisy_loss(model, batch)

    fit(network(), data, counted, validator(data), CFG, seed=1, work=tmp_path)
    assert len(calls) == CFG.epochs * 13


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 12, 13, 14, 40, 77])
def test_resume_after_any_step_ends_in_the_same_bits(tmp_path, stop_at):
    cfg = CFG.model_copy(update={"checkpoint_seconds": 0.0})
    reference = network()
    whole = fit(reference, problem(), noisy_loss, validator(problem()), cfg, seed=1, work=tmp_path / "a")
    steps = iter(range(10**6))

    def stopping(model, batch):
        if next(steps) == stop_at:
            raise Interrupted
        return noisy_loss(model, batch)

    with pytest.raises(Interrupted):
        fit(network(), problem(), stopping, validator(problem()), cfg, seed=1, work=tmp_path / "b")
    model = network()
    resumed = fit(model, problem(), noisy_loss, validator(problem()), cfg, seed=1, work=tmp_path / "b")
    assert digest(model) == digest(reference)
    assert resumed.history == whole.history and resumed.best_epoch == whole.best_epoch


def test_a_batch_is_of_one_group_and_an_epoch_sees_every_row_once(tmp_path):
    data = problem(50)
    groups = np.repeat([3, 7], [20, 30])
    seen: list[list[int]] = []

    def loss(model, batch):
        seen.append(sorted(batch["row"].tolist()))
        return functional.cross_entropy(model(batch["x"]), batch["y"])

    cfg = FitConfig(epochs=3, batch_size=8, lr=1e-3)
    result = fit(network(), {**data, "row": np.arange(50)}, loss, lambda _: 1.0, cfg, 1, tmp_path, groups=groups)
    assert result.steps == 3 * (3 + 4)
    for epoch in range(3):
        batches = seen[7 * epoch : 7 * (epoch + 1)]
        assert all(len({int(groups[row]) for row in batch}) == 1 for batch in batches)
        assert sorted(row for batch in batches for row in batch) == list(range(50))
    first_rows = [batch[0] < 20 for batch in seen]
    assert first_rows[:7] != first_rows[7:14] or first_rows[7:14] != first_rows[14:]  # groups take turns, not in one order


@pytest.mark.parametrize("stop_at", [14, 40])
def test_a_loss_that_follows_the_history_resumes_to_the_same_bits(tmp_path, stop_at):
    cfg = CFG.model_copy(update={"checkpoint_seconds": 0.0})

    def run(work, stop=10**9):
        turn, steps, model = [1.0], iter(range(10**6)), network()

        def before_epoch(history):
            turn[0] = 1.0 if not history else history[-1].validation

        def loss(model, batch):
            if next(steps) == stop:
                raise Interrupted
            return turn[0] * noisy_loss(model, batch)

        fit(model, problem(), loss, validator(problem()), cfg, 1, work, before_epoch=before_epoch)
        return digest(model)

    with pytest.raises(Interrupted):
        run(tmp_path / "b", stop_at)
    assert run(tmp_path / "b") == run(tmp_path / "a")


def test_modules_may_be_spared_from_weight_decay(tmp_path):
    class Spared(nn.Linear):
        no_weight_decay = True

    model = nn.ModuleDict({"decayed": nn.Linear(8, 3), "spared": Spared(8, 3)})
    start = {name: module.weight.detach().clone() for name, module in model.items()}

    def loss(model, batch):
        return 0.0 * (model["decayed"](batch["x"]).sum() + model["spared"](batch["x"]).sum())

    fit(model, problem(64), loss, lambda _: 1.0, FitConfig(epochs=4, batch_size=8, lr=1e-2, weight_decay=1.0), 1, tmp_path)
    assert torch.equal(model["spared"].weight, start["spared"])
    # The first validation is the best of equals, so one epoch of decay is what is left.
    assert model["decayed"].weight.norm() < 0.97 * start["decayed"].norm()


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"columns_on": "host"}])
def test_settings_for_large_machines_train_as_well(tmp_path, settings):
    data, model = problem(), network()
    result = fit(model, data, noisy_loss, validator(data), CFG.model_copy(update=settings), 1, tmp_path)
    reference = fit(network(), data, noisy_loss, validator(data), CFG, 1, tmp_path / "reference")
    assert result.best_value == pytest.approx(reference.best_value, abs=0.02)
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


VICTIM = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from rankd_pipeline_tests.training.test_fit import *
cfg = CFG.model_copy(update={"checkpoint_seconds": 0.02})
def slow(model, batch):
    time.sleep(0.01)
    return noisy_loss(model, batch)
fit(network(), problem(), slow, validator(problem()), cfg, seed=1, work=Path(sys.argv[1]))
"""


def test_sigkill_in_the_middle_of_an_epoch_resumes_to_the_same_bits(tmp_path):
    reference = network()
    fit(reference, problem(), noisy_loss, validator(problem()), CFG, seed=1, work=tmp_path / "a")
    root = str(Path(__file__).parents[2])
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(tmp_path / "b"), root], cwd=root)
    path = tmp_path / "b" / "checkpoint.safetensors"
    deadline = time.monotonic() + 60
    while progress_of(path)["step"] < 18 and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    progress = progress_of(path)
    assert 18 <= progress["step"] < 78 and not progress["finished"]
    model, seen = network(), []

    def counted(model, batch):
        seen.append(1)
        return noisy_loss(model, batch)

    fit(model, problem(), counted, validator(problem()), CFG, seed=1, work=tmp_path / "b")
    assert digest(model) == digest(reference)
    assert len(seen) == CFG.epochs * 13 - progress["step"]


def progress_of(path: Path) -> dict:
    """The progress in a checkpoint's safetensors header; step 0 where there is none yet."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {"step": 0}
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["state"])["progress"]


def test_bad_numbers_and_bad_columns_are_one_clear_sentence(tmp_path):
    with pytest.raises(RankdError, match="diverged in epoch 1"):
        fit(network(), problem(), lambda m, b: m(b["x"]).sum() * float("nan"), lambda _: 1.0, CFG, 1, tmp_path)
    with pytest.raises(RankdError, match="validation of epoch 1 is nan"):
        fit(network(), problem(), noisy_loss, lambda _: float("nan"), CFG, 1, tmp_path)
    with pytest.raises(RankdError, match="common length"):
        fit(network(), {"x": np.zeros((3, 8)), "y": np.zeros(4)}, noisy_loss, lambda _: 1.0, CFG, 1, tmp_path)
    with pytest.raises(ValueError, match="Extra inputs"):
        FitConfig(epochs=1, batch_size=1, lr=1, epoch=3)  # type: ignore[call-arg]


def test_memory_mapped_and_read_only_columns_give_the_same_weights(tmp_path):
    reference = network()
    fit(reference, problem(), noisy_loss, validator(problem()), CFG, seed=1, work=tmp_path / "a")
    mapped = {}
    for name, value in problem().items():
        np.save(tmp_path / f"{name}.npy", value)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    model = network()
    fit(model, mapped, noisy_loss, validator(problem()), CFG, seed=1, work=tmp_path / "b")
    assert digest(model) == digest(reference)


def test_throughput_is_near_a_bare_loop(tmp_path):
    """The benchmark proper is in benchmarks/; here a floor that a shared machine can hold."""
    rng = np.random.default_rng(0)
    data = {"x": torch.from_numpy(rng.normal(size=(40_000, 32)).astype(np.float32)), "y": torch.arange(40_000) % 64}

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def loss(model, batch):
        return functional.cross_entropy(model(batch["x"]), batch["y"])

    def bare() -> float:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        started = time.perf_counter()
        for rows in torch.randperm(40_000).split(256):
            value = functional.cross_entropy(model(data["x"][rows]), data["y"][rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return 40_000 / (time.perf_counter() - started)

    torch.set_num_threads(1)
    cfg = FitConfig(epochs=1, batch_size=256, lr=1e-3)
    ratios = []
    for trial in range(7):
        ours = fit(net(), data, loss, lambda _: 0.0, cfg, seed=0, work=tmp_path / str(trial)).samples_per_s
        ratios.append(ours / bare())
    assert max(ratios) > 0.85, ratios
