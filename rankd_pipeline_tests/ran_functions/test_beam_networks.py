"""The beam networks: masks, scaling inside the graph, symmetry, sizes, export; and that they learn real structure."""

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.beam_management.networks import (
    BeamMLP,
    BeamTransformer,
    Deployable,
    ReportNormalizer,
    masked_modelling_loss,
)
from rankd_pipeline.training.fit import FitConfig, fit
from rankd_pipeline.training.weights import load_weights, save_weights

GRID = {"set_b_rows": 2, "set_b_cols": 8, "set_a_rows": 4, "set_a_cols": 16}


def transformer(history: int = 1, **options) -> BeamTransformer:
    torch.manual_seed(0)
    return BeamTransformer(**{**GRID, "history": history, "width": 16, "depth": 1, "heads": 2, **options}).eval()


def student(history: int = 1, **options) -> BeamMLP:
    torch.manual_seed(0)
    return BeamMLP(**{**GRID, "history": history, "hidden": (24, 16), **options}).eval()


def reports(n: int = 40, history: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    dbm = np.round(rng.normal(-90, 12, (n, history, 16))).astype(np.float32)
    mask = (rng.random((n, history, 16)) < 0.7).astype(np.uint8)
    mask[0] = 0
    return torch.from_numpy(np.where(mask, dbm, np.nan).astype(np.float32)), torch.from_numpy(mask)


def one_path(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Reports and best beams of a single path at a random angle: what the array factors of both sets give."""
    rng = np.random.default_rng(seed)
    v, h = rng.uniform(-0.12, 0.12, n), rng.uniform(-0.5, 0.5, n)

    def gain_db(rows: int, cols: int) -> np.ndarray:
        def axis(at: np.ndarray, count: int) -> np.ndarray:
            phase = 2j * np.pi * (at[:, None] - np.arange(count) / count)
            return np.abs(np.exp(phase[..., None] * np.arange(count)).sum(-1)) ** 2 / count

        both = axis(v, rows)[:, :, None] * axis(h, cols)[:, None, :]
        return 10 * np.log10(both.reshape(n, -1) + 1e-9)

    dbm = -90 + np.maximum(gain_db(2, 8), -30) + rng.normal(0, 0.5, (n, 16))
    return dbm[:, None].astype(np.float32), gain_db(4, 16).argmax(1)


@pytest.mark.parametrize("history", [1, 4])
@pytest.mark.parametrize("make", [transformer, student])
def test_missing_entries_do_not_matter_and_never_give_nan(make, history):
    model = make(history)
    dbm, mask = reports(history=history)
    model.normalizer.learn(dbm, mask)
    logits = model(dbm, mask)
    assert logits.shape == (40, 64) and logits.isfinite().all()
    garbage = torch.where(mask > 0, dbm, torch.tensor(12345.0))
    assert torch.equal(model(garbage, mask), logits)
    assert torch.equal(model(dbm[:1], mask[:1]), model(dbm[:1] * 0 - 77, mask[:1]))


def test_normalizer_learns_the_training_statistics():
    dbm, mask = reports(4000)
    normalizer = ReportNormalizer(16)
    normalizer.learn(dbm.numpy(), mask.numpy())
    shape, level, there = normalizer(dbm, mask)
    seen = mask[:, 0].bool()
    for beam in range(16):
        values = shape[:, 0, beam][seen[:, beam]]
        assert abs(values.mean()) < 1e-4 and abs(values.std(unbiased=False) - 1) < 1e-4
    assert abs(level[1:].mean()) < 1e-3 and level[0] == 0
    assert torch.equal(there, mask.float()) and (shape[~mask.bool()] == 0).all()
    with pytest.raises(RankdError, match="not one L1-RSRP report"):
        normalizer.learn(dbm, mask * 0)


@given(st.floats(-40, 40))
@settings(max_examples=20)
def test_level_is_kept_apart_from_shape(shift):
    dbm, mask = reports()
    normalizer = ReportNormalizer(16)
    normalizer.learn(dbm, mask)
    shape, level, _ = normalizer(dbm, mask)
    moved_shape, moved_level, _ = normalizer(dbm + shift, mask)
    assert torch.allclose(shape, moved_shape, atol=1e-4)
    assert torch.allclose((moved_level - level)[1:], torch.full((39, 1), shift) / normalizer.level_std, atol=1e-4)


def test_teacher_is_mirror_symmetric():
    model = transformer()
    dbm, mask = reports()
    model.normalizer.learn(dbm, mask)
    assert model.mirror is not None
    mirrored = model(dbm[..., model.mirror.reports], mask[..., model.mirror.reports])
    assert torch.allclose(mirrored[:, model.mirror.beams], model(dbm, mask), atol=1e-5)
    for indices, cols in ((model.mirror.reports, 8), (model.mirror.beams, 16)):
        assert torch.equal(indices[indices], torch.arange(len(indices)))
        assert indices[1] == cols - 1 and indices[0] == 0 and indices[cols // 2] == cols // 2


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("make", [transformer, student])
def test_networks_turn_with_their_input(make, history):
    """Without place and per-beam statistics a network must turn exactly with its input: one wide beam, two narrow ones."""
    model = make(history=history)
    dbm, mask = reports(history=history)
    model.normalizer.learn(dbm, mask)
    with torch.no_grad():
        model.place.zero_()
        model.normalizer.shape_mean.zero_()
        model.normalizer.shape_std.fill_(10.0)
    turned = model(*(x.reshape(-1, history, 2, 8).roll(1, 3).flatten(2) for x in (dbm, mask)))
    expected = model(dbm, mask).reshape(-1, 4, 16).roll(2, 2).flatten(1)
    assert torch.allclose(turned, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_training_on_mirror_images_keeps_sample_and_label_together(kind):
    """For a network that is mirror symmetric by itself, seeing half the batch in the mirror changes nothing."""
    dbm, mask = reports()
    if kind == "teacher":
        model = transformer(dropout=0.0)
        assert model.mirror is not None
        symmetric = lambda x, m: model.mirror.mean(model._logits, x, m)  # noqa: E731
        mirror = model.mirror
    else:
        small = student()
        assert small.mirror is not None
        symmetric = lambda x, m: small.mirror.mean(small._logits, x, m)  # noqa: E731
        mirror = small.mirror
    assert torch.allclose(mirror.on_half(symmetric, dbm, mask), symmetric(dbm, mask), atol=1e-5)


def test_sizes_follow_the_settings():
    small = student(hidden=(48, 32))
    assert sum(p.numel() for p in small.parameters()) == 33 * 48 + 48 + 16 * 48 + 48 * 32 + 32 + 32 * 4 + 4
    one_beam = BeamMLP(set_b_rows=1, set_b_cols=4, set_a_rows=2, set_a_cols=8, history=3)
    assert one_beam(torch.zeros(5, 3, 4), torch.ones(5, 3, 4, dtype=torch.uint8)).shape == (5, 16)
    other = BeamTransformer(set_b_rows=1, set_b_cols=4, set_a_rows=2, set_a_cols=8, history=3, width=8, heads=2)
    assert other(torch.zeros(5, 3, 4), torch.ones(5, 3, 4, dtype=torch.uint8)).shape == (5, 16)
    with pytest.raises(RankdError, match="must be multiples"):
        BeamTransformer(set_b_rows=3, set_b_cols=8, set_a_rows=4, set_a_cols=16, history=1)
    with pytest.raises(RankdError, match="must be multiples"):
        BeamMLP(set_b_rows=2, set_b_cols=5, set_a_rows=4, set_a_cols=16, history=1)
    with pytest.raises(RankdError, match="multiple of heads"):
        transformer(width=18, heads=4)


def test_masked_modelling_hides_only_what_was_reported_and_learns_from_it(tmp_path):
    dbm, _ = one_path(400, 1)
    mask = np.ones_like(dbm, np.uint8)
    mask[:, :, 3] = 0
    data = {"dbm": dbm, "mask": mask}
    model = transformer(width=24, depth=1)
    model.normalizer.learn(dbm, mask)

    def loss(module, batch):
        return masked_modelling_loss(module, batch["dbm"], batch["mask"])

    def validate(module) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return loss(module, {k: torch.from_numpy(v) for k, v in data.items()}).item()

    before = validate(model)
    result = fit(model, data, loss, validate, FitConfig(epochs=20, batch_size=32, lr=5e-3), 0, tmp_path)
    assert result.best_value < 0.75 * before
    nothing = torch.zeros(4, 1, 16)
    assert masked_modelling_loss(model, nothing, nothing.to(torch.uint8)).item() == 0.0


def test_both_networks_find_the_beam_of_a_single_path(tmp_path):
    dbm, best = one_path(3000, 2)
    test_dbm, test_best = one_path(1000, 3)
    ones = np.ones_like(dbm, np.uint8)
    probe = torch.from_numpy(test_dbm), torch.from_numpy(ones[:1000])
    wide = test_dbm[:, 0].argmax(1)
    best_of_set_b = ((wide // 8) * 32 + (wide % 8) * 2 == test_best).mean()
    for model in (transformer(), student()):
        model.normalizer.learn(dbm, ones)

        def loss(module, batch):
            return torch.nn.functional.cross_entropy(module(batch["dbm"], batch["mask"]), batch["best"])

        def validate(module) -> float:
            return -(module(*probe).argmax(1).numpy() == test_best).mean()

        columns = {"dbm": dbm, "mask": ones, "best": best}
        cfg = FitConfig(epochs=8, batch_size=64, lr=5e-3, validate_every=2)
        result = fit(model, columns, loss, validate, cfg, 0, tmp_path / type(model).__name__)
        assert -result.best_value > 0.85 > best_of_set_b + 0.2


def test_deployable_graph_runs_alone_in_onnxruntime(tmp_path):
    dbm, mask = reports(history=4)
    model = student(history=4).train()
    model.normalizer.learn(dbm, mask)
    deployable = Deployable(model, 1.7)
    expected = deployable(dbm, mask)
    assert torch.allclose(expected.sum(1), torch.ones(40)) and not model.training
    names = {"input_names": ["l1_rsrp_dbm", "l1_rsrp_mask"], "output_names": ["beam_probability"]}
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        deployable, (dbm, mask), dynamo=True, dynamic_shapes=({0: batch}, {0: batch}), opset_version=20,
        external_data=False, verbose=False, **names,
    )  # fmt: skip
    assert program is not None
    program.save(tmp_path / "student.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    inputs = {"l1_rsrp_dbm": dbm.numpy(), "l1_rsrp_mask": mask.numpy()}
    assert np.abs(session.run(None, inputs)[0] - expected.detach().numpy()).max() < 1e-5
    one = {name: value[:1] for name, value in inputs.items()}
    assert np.abs(session.run(None, one)[0] - expected[:1].detach().numpy()).max() < 1e-5


@pytest.mark.parametrize("make", [transformer, student])
def test_weights_carry_the_scaling(make, tmp_path):
    dbm, mask = reports()
    model = make()
    model.normalizer.learn(dbm, mask)
    save_weights(model, tmp_path / "w.safetensors")
    other = make()
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other(dbm, mask), model(dbm, mask))
