"""Patches, masks, NMSE and baselines of channel prediction, on cases whose answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.ran_functions.channel_prediction import baselines
from rankd_pipeline.ran_functions.channel_prediction.config import CATALOGUE, ChannelCorpusConfig
from rankd_pipeline.ran_functions.channel_prediction.function import ChannelPrediction
from rankd_pipeline.ran_functions.channel_prediction.metrics import evaluate_task, nmse_of_samples, speed_bin
from rankd_pipeline.ran_functions.channel_prediction.networks import NOISE, MaskedChannelTransformer
from rankd_pipeline.ran_functions.channel_prediction.patches import (
    TASKS,
    hidden_patches,
    network_inputs,
    patchify,
    random_kept,
    unpatchify,
    visible_patches,
    wanted_patches,
)

SIZES = st.integers(1, 4)


def noise(shape, seed=0):
    rng = np.random.default_rng(seed)
    return ((rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / np.sqrt(2)).astype(np.complex64)


@given(SIZES, SIZES, SIZES)
def test_patches_go_back_to_the_channel(t, a, k):
    h = noise((2, 4 * t, 4 * a, 4 * k))
    patches = patchify(h)
    assert patches.shape == (2, t * a * k, 128)
    assert np.array_equal(unpatchify(patches, (t, a, k)), h)


def test_patch_order_is_time_then_antenna_then_frequency_and_re_im_last():
    h = np.zeros((1, 8, 8, 8), np.complex64)
    h[0, 4, 0, 4] = 1 + 2j  # second patch in time, first antenna patch, second in frequency; first entry of the patch
    patches = patchify(h)
    token = 1 * 4 + 0 * 2 + 1
    assert patches[0, token, :2].tolist() == [1.0, 2.0]
    assert np.count_nonzero(patches) == 2


def test_a_grid_that_patches_do_not_divide_is_refused():
    with pytest.raises(RankdError, match="10 antennas"):
        patchify(np.zeros((1, 8, 10, 8), np.complex64))


@pytest.mark.parametrize("name", CATALOGUE)
def test_masks_of_every_published_shape(name):
    item = CATALOGUE[name]
    t, a, k = item.grid
    assert item.tokens == t * a * k == item.instants * item.antennas * item.subcarriers // 64
    assert len(visible_patches(item.grid, "time")) == (t // 2) * a * k
    assert len(visible_patches(item.grid, "frequency")) == t * a * (k // 2)
    assert random_kept(item.tokens) == int(0.15 * item.tokens)
    for task in TASKS:
        both = np.concatenate([visible_patches(item.grid, task), wanted_patches(item.grid, task)])
        assert sorted(both) == list(range(item.tokens))


def test_token_counts_of_the_published_table():
    counts = [192, 384, 128, 256, 96, 384, 256, 256, 192, 192, 256, 256, 384, 384, 256, 256, 256, 384]
    published = {f"D{i}-s": count for i, count in enumerate(counts, 1)}
    assert {name: CATALOGUE[name].tokens for name in published} == published
    assert CATALOGUE["D17-s"].coherence_ms == pytest.approx(1.30, abs=0.01)


def test_views_share_the_batch_and_are_redrawn_by_the_seed_alone():
    function = ChannelPrediction()
    batch = {"csi": torch.randn(4, 20, 128), "grid": torch.tensor([[2, 2, 4]] * 4), "has_label": torch.ones(4)}
    torch.manual_seed(5)
    one = function.views(batch)
    torch.manual_seed(5)
    two = function.views(batch)
    assert [len(view["visible_at"][0]) for view in one] == [2, 8, 8]
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    random = one[0]
    assert not torch.equal(random["visible_at"][0], random["visible_at"][1])  # a permutation for each sample
    for view in one:
        tokens = torch.cat([view["visible_patches"], view["label"]], dim=1)
        assert torch.allclose(tokens.sum(dim=1), batch["csi"][:, :16].sum(dim=1), atol=1e-4)  # each patch once, no padding


def test_the_loss_is_twice_the_mean_square_and_sees_the_wanted_patches_only():
    head = ChannelPrediction().head()
    output, label = torch.randn(3, 8, 128), torch.randn(3, 8, 128)
    complex_error = torch.view_as_complex((output - label).reshape(3, 8, 64, 2)).abs() ** 2
    assert float(head.supervised_loss(output, {"label": label})) == pytest.approx(float(complex_error.mean()), rel=1e-5)


def test_nmse_is_linear_by_sample_then_by_set_and_only_then_in_db():
    truth = np.stack([np.full((2, 128), 1.0), np.full((2, 128), 3.0)])
    wrong = truth * np.array([0.9, 0.5])[:, None, None]
    assert nmse_of_samples(wrong, truth) == pytest.approx([0.01, 0.25])
    assert nmse_of_samples(np.zeros_like(truth), truth) == pytest.approx([1.0, 1.0])
    rows = [("D1-s", 0.1, 3), ("D2-s", 0.001, 1)]  # three samples of the one, one of the other
    table = pd.concat([
        pd.DataFrame({"model": "m", "split": "test", "unit": np.arange(n), "cell": f"set={name}|task=time|speed=0-3",
                      "metric": "nmse", "value": value, "n": 1})
        for name, value, n in rows
    ], ignore_index=True)  # fmt: skip
    metric = ChannelPrediction.metric
    found = estimate(table, "m@test", metric=metric.name, aggregate=metric.aggregate, higher_is_better=False).value
    assert found == pytest.approx(10 * np.log10((0.1 + 0.001) / 2))  # neither by sample count, nor a mean of decibels


def test_at_20_db_nothing_beats_the_noise_floor():
    clean = noise((64, 8, 8, 8))
    noisy = clean + 0.1 * noise(clean.shape, 1)
    score = nmse_of_samples(patchify(clean), patchify(noisy)).mean()
    assert score == pytest.approx(0.01 / 1.01, rel=0.05)


def features_of(h: np.ndarray, site: str = "D3-s") -> dict[str, np.ndarray]:
    n, (t, a, k) = len(h), (size // 4 for size in h.shape[1:])
    return {
        "csi": patchify(h), "grid": np.tile(np.array([t, a, k], np.int16), (n, 1)), "task": np.array(["time", "frequency"] * n)[:n],
        "site": np.full(n, site), "drop_id": np.arange(n), "speed_kmh": np.full(n, 5.0, np.float32),
    }  # fmt: skip


def test_evaluation_asks_both_tasks_leaves_out_what_one_model_cannot_answer_and_tells_horizons():
    h = noise((6, 8, 4, 8))
    features, truth = features_of(h), {"csi_clean": patchify(h)}

    def perfect(asked):
        hidden = hidden_patches(asked["csi"], asked["grid"], asked["task"])
        return np.stack([hidden, np.full_like(hidden, 0.1)], axis=1)

    def of_even_rows(asked):
        out = 0.5 * hidden_patches(asked["csi"], asked["grid"], asked["task"])
        out[1::2] = np.nan
        return out

    table = ChannelPrediction().evaluate({"p": perfect, "half": of_even_rows}, features, truth, "test", frozenset({"p"}))
    rows = table[(table["metric"] == "nmse") & (table["model"] == "half")]
    assert sorted(rows["unit"]) == [0, 0, 2, 2, 4, 4] and np.allclose(rows["value"], 0.25)
    assert set(rows["cell"]) == {"set=D3-s|task=time|speed=3-10", "set=D3-s|task=frequency|speed=3-10"}
    assert len(table[(table["metric"] == "nmse") & (table["model"] == "p")]) == 6
    assert np.allclose(table[(table["metric"] == "covered")]["value"], 1.0)
    horizons = table[(table["metric"] == "nmse_horizon") & (table["model"] == "half")]
    assert np.allclose(horizons["value"], 0.25) and len(horizons) == 3 * 2 * 4
    assert {c.split("horizon=")[1] for c in horizons["cell"]} == {"1", "2", "3", "4"}


def test_horizon_one_is_next_to_what_is_visible():
    h = np.ones((2, 16, 4, 8), np.complex64) * np.exp(1j * 0.3 * np.arange(16))[None, :, None, None]
    features = features_of(h)
    asked = {**features, "task": np.full(2, "time")}
    held = baselines.along_axis(baselines.hold)(asked)
    table = evaluate_task("hold", held, features, {"csi_clean": patchify(h)}, "time", "test", False, np.ones(2, bool))
    for horizon in range(1, 9):
        value = table[table["cell"].astype(str).str.endswith(f"horizon={horizon}")]["value"]
        assert np.allclose(value, abs(np.exp(1j * 0.3 * horizon) - 1) ** 2, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_an_autoregressive_model_runs_a_rotating_phase_on_and_no_baseline_sees_the_answer(task):
    shape = (4, 16, 4, 16)
    axis = {"time": 1, "frequency": 3}[task]
    phase = np.arange(16).reshape([-1 if i == axis else 1 for i in range(4)])
    h = (noise((4, *(1 if i == axis else size for i, size in enumerate(shape[1:], 1)))) * np.exp(0.4j * phase)).astype(np.complex64)
    features = {**features_of(h), "task": np.full(4, task)}
    truth = hidden_patches(features["csi"], features["grid"], features["task"])
    ar = baselines.along_axis(lambda v, q, *_: baselines.autoregressive(v, q, 1, 1e-6))
    assert nmse_of_samples(ar(features), truth).max() < 1e-4
    assert nmse_of_samples(baselines.along_axis(baselines.hold)(features), truth).min() > 0.1
    censored = {**features, "csi": features["csi"].copy()}
    wanted = wanted_patches(features["grid"][0], task)
    censored["csi"][:, wanted] = 1e3
    fitted = baselines.fit_wiener(features)
    for predict in (ar, baselines.along_axis(baselines.hold), fitted):
        assert np.array_equal(predict(features), predict(censored))


@pytest.mark.parametrize("task", TASKS)
def test_the_cleaned_run_is_an_aligned_network_that_has_learned_nothing(task):
    features = {**features_of(noise((5, 16, 4, 16))), "task": np.full(5, task)}
    found = baselines.ar_cleaned(features, NOISE)
    network = MaskedChannelTransformer(width=16, encoder_depth=1, decoder_depth=1, heads=2, align=True)
    inputs = network_inputs(features["csi"], features["grid"], features["task"])
    with torch.no_grad():
        said = network(**{name: torch.from_numpy(values) for name, values in inputs.items()}).numpy()
    assert np.allclose(found, said, atol=1e-4)
    censored = {**features, "csi": features["csi"].copy()}
    censored["csi"][:, wanted_patches(features["grid"][0], task)] = 1e3
    assert np.array_equal(found, baselines.ar_cleaned(censored, NOISE))


def test_wiener_is_the_least_squares_predictor_of_its_set_and_pools_for_others():
    steps = np.cumsum(noise((400, 16, 4, 8)), axis=1) / 4
    h = (steps + 0.01 * noise(steps.shape, 3)).astype(np.complex64)
    features = {**features_of(h), "task": np.full(400, "time")}
    predict = baselines.fit_wiener(features)
    truth = hidden_patches(features["csi"], features["grid"], features["task"])
    wiener = np.square(predict(features) - truth).mean()
    hold = np.square(baselines.along_axis(baselines.hold)(features) - truth).mean()
    assert wiener <= hold * 1.001  # of a random walk, holding is (nearly) the best
    other = {**features, "site": np.full(400, "elsewhere")}
    assert np.allclose(predict(other), predict(features), atol=1e-4)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_learned_baselines_learn(kind, monkeypatch):
    monkeypatch.setitem(baselines.LEARNED_FIT, "epochs", 30)
    phase = np.arange(8)[None, :, None, None]
    h = (noise((160, 1, 4, 8)) * np.exp(0.5j * phase)).astype(np.complex64)
    train, val = features_of(h[:128]), features_of(h[128:])
    asked = {**val, "task": np.full(32, "time")}
    truth = hidden_patches(asked["csi"], asked["grid"], asked["task"])
    found = nmse_of_samples(baselines.fit_sequence(kind, train, val, 0)(asked), truth).mean()
    held = nmse_of_samples(baselines.along_axis(baselines.hold)(asked), truth).mean()
    assert found < 0.7 * held


def test_network_inputs_hide_what_is_asked():
    h = noise((4, 8, 4, 8))
    features = features_of(h)
    inputs = network_inputs(features["csi"], features["grid"], features["task"])
    hidden = hidden_patches(features["csi"], features["grid"], features["task"])
    for row in range(4):
        seen = {tuple(patch) for patch in inputs["visible_patches"][row]}
        assert not seen & {tuple(patch) for patch in hidden[row]}


@given(st.integers(0, 99), st.booleans())
def test_what_the_field_leaves_out_is_what_the_label_puts_back(seed, padded):
    rng, function = np.random.default_rng(seed), ChannelPrediction()
    grids = np.array([[2, 2, 4], [2, 2, 2]] if padded else [[2, 2, 4]], np.int16)[rng.integers(0, 1 + padded, 6)]
    there = (np.arange(16) < grids.prod(axis=1)[:, None])[..., None]
    whole = {
        "csi": (rng.standard_normal((6, 16, 128)) * there).astype(np.float32), "grid": grids, "task": rng.choice(TASKS, 6),
        "csi_mask": np.broadcast_to(there, (6, 16, 128)).astype(np.uint8),
    }  # fmt: skip
    label = function.own_labels(whole)
    given = function.without_labels(whole)
    assert not function.own_labels(given).any() and label.any()
    for name, values in function.model_inputs(whole).items():
        np.testing.assert_array_equal(function.model_inputs(given)[name], values)
    assert (given["csi_mask"].sum((1, 2)) * 2 == whole["csi_mask"].sum((1, 2))).all()
    for name, values in function.with_labels(given, label).items():
        np.testing.assert_array_equal(values, whole[name])


def test_speed_bins():
    assert speed_bin(np.array([0.0, 2.9, 3.0, 50.0, 299.0])).tolist() == ["0-3", "0-3", "3-10", "30-100", "100-300"]


def test_configuration_refuses_what_cannot_be():
    d3 = {"name": "D3-s"}
    for raw, message in (
        ({"sets": [{"name": "D40-s"}]}, "not in the catalogue"),
        ({"sets": [{**d3, "crop": {"instants": 18, "rows": 1, "cols": 8, "subcarriers": 16}}]}, "exceeds"),
        ({"sets": [{**d3, "crop": {"instants": 10, "rows": 1, "cols": 8, "subcarriers": 16}}], "deploy": d3},
         "multiple of the patch"),
        ({"sets": [{"name": "D3-s"}], "deploy": {"name": "D4-s"}}, "deploy.name"),
        ({"sets": [{"name": "D3-s"}, {"name": "D1-s", "role": "heldout_band"}], "deploy": {"name": "D3-s"}}, "held out by band"),
    ):  # fmt: skip
        with pytest.raises(RankdError, match=message):
            ChannelPrediction().corpus_config(raw)
    assert ChannelCorpusConfig().most_tokens == 384
