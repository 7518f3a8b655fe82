"""The simulated channel prediction corpus: schema, splits, power, noise, Doppler, and the same bytes from the same seed."""

import numpy as np
import pyarrow as pa
import pytest

from rankd_pipeline.radio.seeding import seeded
from rankd_pipeline.ran_functions.channel_prediction.config import CATALOGUE, ChannelCorpusConfig
from rankd_pipeline.ran_functions.channel_prediction.function import ChannelPrediction
from rankd_pipeline.ran_functions.channel_prediction.patches import unpatchify
from rankd_pipeline.ran_functions.channel_prediction.simulate import SetChannel, delay_spread_ns, with_noise
from rankd_pipeline.store.tensors import column_array

FUNCTION = ChannelPrediction()
SMALL = {"instants": 8, "rows": 2, "cols": 4, "subcarriers": 16}
SETS = [
    {"name": "D3-s", "crop": {"instants": 8, "rows": 1, "cols": 8, "subcarriers": 16}},
    {"name": "D10-s", "crop": {**SMALL, "subcarriers": 8}},
    {"name": "D17-s", "role": "heldout_site", "crop": SMALL},
    {"name": "D19-s", "role": "heldout_band", "crop": SMALL},
]


@pytest.fixture(scope="module")
def cfg() -> ChannelCorpusConfig:
    return FUNCTION.corpus_config(
        {
            "sets": SETS,
            "train_samples": 20,
            "val_samples": 6,
            "test_samples": 8,
            "shard_samples": 12,
            "batch_samples": 8,
            "deploy": {"name": "D3-s"},
        }
    )


@pytest.fixture(scope="module")
def shards(cfg):
    return [FUNCTION.simulate(cfg, shard) for shard in FUNCTION.plan(cfg, 1)]


def column(tables, name):
    return np.concatenate([column_array(table[name]) for table in tables])


def test_every_shard_has_the_schema_and_stays_in_range(cfg, shards):
    schema = FUNCTION.schema(cfg)
    for features, truth in shards:
        assert features.schema.equals(schema.arrow_schema())
        assert features["sample_id"].equals(truth["sample_id"])
        csi, mask = column_array(features["csi"]), column_array(features["csi_mask"])
        assert not csi[mask == 0].any()
        assert schema.column("csi").valid_range[0] < csi.min() and csi.max() < schema.column("csi").valid_range[1]
    assert {group.name: group.shape["csi"][0] for group in FUNCTION.groups(cfg)} == {"2x2x4": 16, "2x2x2": 8}


def test_sets_are_held_out_whole_and_ids_are_dense(cfg, shards):
    features = [f for f, _ in shards]
    assert column(features, "sample_id").tolist() == list(range(2 * 34 + 2 * 8))
    where = set(zip(column(features, "site"), column(features, "split"), strict=True))
    assert {split for site, split in where if site in ("D3-s", "D10-s")} == {"train", "val", "test"}
    assert {(site, split) for site, split in where if split.startswith("heldout")} == {
        ("D17-s", "heldout_site"), ("D19-s", "heldout_band")}  # fmt: skip
    assert set(column(features, "task")) == {"time", "frequency"}


def test_the_same_shard_gives_the_same_bytes_and_another_seed_others(cfg, shards):
    shard = FUNCTION.plan(cfg, 1)[1]
    again = FUNCTION.simulate(cfg, shard)
    assert again[0].equals(shards[1][0]) and again[1].equals(shards[1][1])
    other = FUNCTION.simulate(cfg, FUNCTION.plan(cfg, 2)[1])
    assert not other[0]["csi"].equals(shards[1][0]["csi"])
    more = FUNCTION.corpus_config({**cfg.model_dump(), "test_samples": 9})
    assert FUNCTION.plan(more, 1)[0].seed == FUNCTION.plan(cfg, 1)[0].seed  # what is there stays when the corpus grows


def test_features_are_the_truth_with_noise_20_db_below():
    rng = np.random.default_rng(0)
    clean = np.ones((200, 8, 4, 8), np.complex64)
    noise = with_noise(clean, 20.0, rng) - clean
    assert np.mean(np.abs(noise) ** 2) == pytest.approx(0.01, rel=0.02)
    assert np.var(noise.real) == pytest.approx(0.005, rel=0.03)


@pytest.mark.parametrize("name", ["D3-s", "D8-s", "D2-s", "D17-s"])
def test_channels_have_unit_power_and_the_asked_shape_and_speed(name):
    item = CATALOGUE[name].model_copy(update={"instants": 8, "rows": 1, "cols": 4, "subcarriers": 16})
    with seeded(3):
        h, speed, _ = SetChannel(item).draw(400, np.random.default_rng(0))
    assert h.shape == (400, 8, 4, 16)
    assert np.mean(np.abs(h) ** 2) == pytest.approx(1.0, abs=0.12)
    assert item.speed_kmh[0] <= speed.min() and speed.max() <= item.speed_kmh[1]


def test_a_faster_user_turns_faster_and_los_fades_less():
    still, fast = (CATALOGUE["D15-s"].model_copy(update={"speed_kmh": (v, v + 0.1), "rows": 1, "cols": 4}) for v in (0.0, 30.0))
    change, spread = [], []
    for item in (still, fast, fast.model_copy(update={"los": False})):
        with seeded(3):
            h, _, _ = SetChannel(item).draw(100, np.random.default_rng(0))
        change.append(np.mean(np.abs(h[:, 1:] - h[:, :-1]) ** 2))
        power = np.mean(np.abs(h) ** 2, axis=(1, 2))
        spread.append(np.std(power / power.mean(axis=1, keepdims=True)))
    assert change[0] < 1e-3 < 0.1 * change[1]
    assert spread[1] < 0.8 * spread[2]


def test_stored_patches_are_the_channel(cfg, shards):
    features, truth = shards[0]
    h = unpatchify(column_array(truth["csi_clean"])[:, :16], column_array(features["grid"])[0])
    assert h.shape == (12, 8, 8, 16)
    noisy = unpatchify(column_array(features["csi"])[:, :16], (2, 2, 4))
    assert np.mean(np.abs(noisy - h) ** 2) == pytest.approx(0.01, rel=0.2)


def field(cfg, *shifts):
    """(features, truth, configuration) of 40 samples of the field."""
    world = FUNCTION.field_config(cfg, frozenset(shifts), 40)
    tables = [FUNCTION.simulate(world, shard) for shard in FUNCTION.plan(world, 5)]
    features, truth = (pa.concat_tables([pair[side] for pair in tables]) for side in (0, 1))
    return *({name: column_array(t[name]) for name in t.column_names} for t in (features, truth)), world


def test_the_field_is_the_deployed_set_and_each_shift_moves_what_it_says(cfg):
    calm, truth, world = field(cfg)
    assert set(calm["site"]) == {"D3-s"} and set(calm["task"]) == {"time"} and len(calm["site"]) == 40
    assert calm["csi"].shape[1] == cfg.most_tokens  # rows of the field fit the corpus they may join
    before = FUNCTION.field_context(world, calm, truth)
    assert before["doppler_hz"].max() <= 10 / 3.6 * 1.5e9 / 299_792_458 and set(before["snr_db"]) == {20.0}
    medians = {name: np.median(values) for name, values in before.items()}
    for shift, moved in (("delay_spread_x3", "delay_spread_ns"), ("speed_60", "doppler_hz"), ("interference", "snr_db")):
        features, clean, changed = field(cfg, shift)
        after = {name: np.median(values) for name, values in FUNCTION.field_context(changed, features, clean).items()}
        assert {name for name in after if not np.isclose(after[name], medians[name], rtol=0.05)} == {moved}
        if shift == "delay_spread_x3":
            assert after[moved] == pytest.approx(3 * medians[moved], rel=0.1)
    assert set(field(cfg, "band_28")[0]["band_ghz"]) == {28.0}


def test_the_delay_spread_of_two_equal_paths_is_half_their_distance():
    found = delay_spread_ns(np.array([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]]), np.array([[0.0, 200e-9, 1e-3], [50e-9, 0.0, 0.0]]))
    assert found == pytest.approx([100.0, 0.0])
