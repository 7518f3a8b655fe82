"""A student beside its teacher: who is run when, what is counted, what gets gradients, and resume in the middle of a phase."""

import pytest
import torch
from torch import nn

from rankd_pipeline.distillation.distiller import Apprentice, DistillationConfig
from rankd_pipeline.distillation.teacher_view import TeacherView
from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.channel_prediction.function import ChannelPrediction
from rankd_pipeline.ran_functions.channel_prediction.networks import MaskedChannelTransformer
from rankd_pipeline.training.fit import FitConfig, fit

FUNCTION, HEAD = ChannelPrediction(), ChannelPrediction().head()
INPUTS = ["visible_at", "visible_patches", "wanted_at"]  # in no order
ROWS, EPOCHS = 24, 6
PERIODIC = {"mode": "periodic", "most_autonomous": 1, "passive": 1, "warmup": 0, "closing_share": 0.0}


def network(width: int, heads: int = 4) -> MaskedChannelTransformer:
    torch.manual_seed(width)
    return MaskedChannelTransformer(width=width, encoder_depth=2, decoder_depth=1, heads=heads)


class Watched(MaskedChannelTransformer):
    """Counts its passes, whatever anyone else counts."""

    runs = 0

    def _predict(self, patches, visible_at, wanted_at, found):
        self.runs += len(patches)
        assert not torch.is_grad_enabled() and not self.training
        return super()._predict(patches, visible_at, wanted_at, found)


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"csi": torch.randn(ROWS, 16, 128, generator=generator), "grid": torch.tensor([[2, 2, 4]] * ROWS, dtype=torch.int16),
            "has_label": torch.ones(ROWS)}  # fmt: skip


def apprentice(teacher: nn.Module | None = None, **settings) -> Apprentice:
    torch.manual_seed(9)
    cfg = DistillationConfig.model_validate({"kind": "mcakd", "schedule": PERIODIC, **settings})
    return Apprentice(network(16), TeacherView(None, teacher or network(32)), INPUTS, EPOCHS, cfg)


def train(model: Apprentice, work, stop_at: int = 10**9) -> Apprentice:
    steps = iter(range(10**6))

    def loss(module, batch):
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        views = FUNCTION.views(batch)
        return torch.stack([HEAD.supervised_loss(out, view) + (0.0 if taught is None else taught)
                            for (out, taught), view in zip(module.losses(views), views, strict=True)]).mean()  # fmt: skip

    fit(model, data(), loss, lambda module: 1.0, FitConfig(epochs=EPOCHS, batch_size=8, lr=1e-3, checkpoint_seconds=0.0), 3, work,
        before_epoch=lambda history: model.before_epoch([record.validation for record in history]))  # fmt: skip
    return model


def test_the_teacher_is_not_run_in_an_autonomous_epoch_and_every_pass_is_counted(tmp_path):
    teacher = Watched(width=32, encoder_depth=2, decoder_depth=1, heads=4)
    model = train(apprentice(teacher), tmp_path)
    # Three passive epochs of six, three views of every row.
    assert teacher.runs == model.view.passes == 3 * ROWS * 3
    assert [turn["phase"] for turn in model.record()["phases"]] == ["AL", "PL"] * 3
    never = Watched(width=32, encoder_depth=2, decoder_depth=1, heads=4)
    train(apprentice(never, schedule={"mode": "never"}), tmp_path / "never")
    assert never.runs == 0


@pytest.mark.parametrize("stop_at", [4, 5, 10])
def test_a_fit_killed_in_a_passive_phase_ends_in_the_same_bits_and_counts_each_pass_once(tmp_path, stop_at):
    whole = train(apprentice(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(apprentice(), tmp_path / "killed", stop_at)
    resumed = train(apprentice(), tmp_path / "killed")
    expected, found = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.record() == whole.record()


def test_teacher_and_student_see_the_same_view_and_the_teacher_gets_no_gradient():
    seen = []

    class Looking(MaskedChannelTransformer):
        def internals(self, view):
            seen.append(view)
            return super().internals(view)

    teacher = Looking(width=32, encoder_depth=2, decoder_depth=1, heads=4)
    model = apprentice(teacher, schedule={"mode": "always"})
    model.before_epoch([])
    views = FUNCTION.views(data())
    losses = model.losses(views)
    assert [id(view) for view in seen] == [id(view) for view in views]
    torch.stack([taught for _, taught in losses]).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"student.embed.weight", "student.encoder.0.attend.weight", "student.decoder.0.attend.weight"} <= trained
    gradients = dict(model.named_parameters())["student.encoder.0.attend.weight"].grad
    assert gradients is not None and all(part.any() for part in gradients.chunk(3)[:2])  # of queries and keys
    assert any("selectors" in name for name in trained)
    assert not any(name.startswith("view") for name, _ in model.named_parameters())


def test_output_matching_wants_the_teachers_output_and_nothing_else():
    model = apprentice(kind="output", weight=1.0, schedule={"mode": "always"})
    model.before_epoch([])
    views = FUNCTION.views(data())
    taught = [part.item() for _, part in model.losses(views)]
    by_hand = [
        (model.student(**{name: view[name] for name in INPUTS}) - model.view.run(**{name: view[name] for name in INPUTS}))
        .square()
        .mean()
        .item()
        for view in views
    ]
    assert taught == pytest.approx(by_hand, rel=1e-5)
    assert model.mcakd is None and model.record()["selection"] == {}


def test_dimensions_are_chosen_at_the_start_of_a_phase_and_then_every_so_many_steps():
    model = apprentice(mcakd={"selection": {"reselect_every": 3}}, schedule={**PERIODIC, "passive": 9})
    model.before_epoch([1.0])
    first = [model._reselect(model.turns[-1]) for _ in range(7)]
    assert first == [True, False, False, True, False, False, True]
    model.turns = [type(model.turns[0])(1, "PL", "", 2)]
    assert [model._reselect(model.turns[-1]) for _ in range(2)] == [True, False]


def test_a_network_that_shows_nothing_cannot_be_distilled_so():
    with pytest.raises(RankdError, match="does not show its inside"):
        Apprentice(network(16), TeacherView(None, nn.Linear(2, 2)), INPUTS, 1, DistillationConfig(kind="mcakd"))


@pytest.mark.parametrize(("settings", "mode"), [({"precision": "bf16"}, "always"), ({"compile": True}, "never")])
def test_mixed_precision_and_compiled_blocks_train_the_same_student(tmp_path, settings, mode):
    """The code path of a GPU, at a size that a CPU takes."""

    def run(work, **more):
        model = apprentice(schedule={"mode": mode})
        model.before_epoch([])
        cfg = FitConfig(epochs=1, batch_size=12, lr=1e-3, **more)

        def loss(module, batch):
            views = FUNCTION.views(batch)
            return torch.stack([HEAD.supervised_loss(out, view) + (0.0 if taught is None else taught)
                                for (out, taught), view in zip(module.losses(views), views, strict=True)]).mean()  # fmt: skip

        return fit(model, data(), loss, lambda module: 1.0, cfg, 3, work).history[-1].train_loss

    assert run(tmp_path / "a", **settings) == pytest.approx(run(tmp_path / "b"), rel=0.02)
