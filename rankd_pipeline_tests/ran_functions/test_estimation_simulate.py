"""The simulated PUSCH corpus: settings refused in one sentence, reproducible bytes, honest splits, and columns as promised."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.radio.pusch import NOISE_OF_ESTIMATE, noise_power
from rankd_pipeline.ran_functions.channel_estimation.config import ChannelCorpusConfig
from rankd_pipeline.ran_functions.channel_estimation.function import ChannelEstimation
from rankd_pipeline.ran_functions.channel_estimation.simulate import ShardTables, plan_shards, simulate_shard
from rankd_pipeline.ran_functions.drops import SPLIT_OF_CODE
from rankd_pipeline.spec import validated
from rankd_pipeline.store.tensors import column_array

SMALL: dict[str, Any] = {
    "profiles": [
        {"name": "a", "model": "TDL-A"}, {"name": "d", "model": "CDL-D"},
        {"name": "street", "model": "UMi"}, {"name": "b", "model": "TDL-B", "role": "heldout"},
    ],
    "bands": [{"ghz": 3.5}, {"ghz": 4.7, "role": "heldout"}],
    "seen_slots": 120, "heldout_profile_slots": 16, "heldout_band_slots": 12, "shard_slots": 24,
}  # fmt: skip


def columns(tables: ShardTables) -> dict[str, np.ndarray]:
    both = {n: tables.features[n] for n in tables.features.column_names} | {n: tables.truth[n] for n in tables.truth.column_names}
    return {name: column_array(column) for name, column in both.items()}


@pytest.fixture(scope="module")
def corpus() -> tuple[ChannelCorpusConfig, list[ShardTables]]:
    cfg = ChannelCorpusConfig.model_validate(SMALL)
    return cfg, [simulate_shard(cfg, shard) for shard in plan_shards(cfg, 0)]


def test_defaults_are_what_the_study_says():
    cfg = ChannelCorpusConfig()
    assert (cfg.resource_blocks, cfg.scs_khz, cfg.receive_antennas, cfg.snr_db) == (4, 30, (1, 4), (-5.0, 25.0))
    assert {p.family for p in cfg.profiles if p.role == "seen"} == {"TDL", "CDL", "UMi", "UMa"}
    assert {p.family for p in cfg.profiles if p.role == "heldout"} == {"TDL", "CDL", "UMi", "UMa"}
    assert all(p.delay_spread_ns == (30.0, 300.0) and p.speed_kmh == (3.0, 120.0) for p in cfg.profiles)
    trained = [b.ghz for b in cfg.bands if b.role == "train"]
    assert all(b.ghz > max(trained) for b in cfg.bands if b.role == "heldout"), "the held-out band has more Doppler than any seen"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"resource_block": 4}, "unknown key 'resource_block'"),
        ({"resource_blocks": 1}, "'resource_blocks'.*greater than or equal to 2"),
        ({"scs_khz": 20}, "'scs_khz'.*found 20"),
        ({"receive_antennas": [3, 2]}, "two numbers between 1 and 64 that do not fall"),
        ({"snr_db": [10, 0]}, "snr_db must not fall"),
        ({"split_shares": [0.7, 0.2, 0.2]}, "three shares that add up to 1"),
        ({"profiles": [{"name": "a", "model": "TDL-F"}]}, "'profiles.0.model'.*'TDL-A'"),
        (
            {"profiles": [{"name": "a", "model": "TDL-A", "speed_kmh": [50, 3]}]},
            "profile a: speed_kmh must be two positive numbers",
        ),
        ({"profiles": [{"name": "a", "model": "TDL-A"}] * 2}, "every profile needs a name of its own"),
        ({"profiles": [{"name": "a", "model": "TDL-A"}]}, "heldout_profile_slots is set but no profile has role heldout"),
        ({"bands": [{"ghz": 3.5, "role": "heldout"}]}, "at least one profile must be seen and one band must have role train"),
        ({"bands": [{"ghz": 3.5}]}, "heldout_band_slots is set but no band has role heldout"),
    ],
)
def test_a_contradiction_is_one_sentence(raw, said):
    with pytest.raises(RankdError) as error:
        validated(ChannelCorpusConfig, raw, "steps.corpus.simulation")
    assert re.search(said, str(error.value)), str(error.value)


@settings(max_examples=30)
@given(st.integers(1, 400), st.integers(0, 60), st.integers(1, 8), st.integers(1, 64), st.integers(0, 2**32))
def test_every_plan_is_dense_and_splits_by_whole_drop(seen, heldout, slots, shard, seed):
    cfg = ChannelCorpusConfig.model_validate(
        SMALL | {"seen_slots": seen, "heldout_profile_slots": heldout, "heldout_band_slots": heldout, "slots_per_drop": slots,
                 "shard_slots": shard}
    )  # fmt: skip
    plan = plan_shards(cfg, seed)
    first = 0
    for shard_ in plan:
        assert shard_.first_drop == first
        first += len(shard_.drop_codes)
    assert len({shard_.seed for shard_ in plan}) == len(plan)
    held = {"s": ("b", 3.5), "b": (None, 4.7)}
    for shard_ in plan:
        for code in set(shard_.drop_codes):
            site, band = held.get(code, (None, 3.5))
            assert shard_.band_ghz == band and (site is None or shard_.site == site) and code in SPLIT_OF_CODE


def test_the_same_shard_has_the_same_bytes_whatever_ran_before(corpus):
    cfg, tables = corpus
    plan = plan_shards(cfg, 0)
    for index in (5, 0):
        again = simulate_shard(cfg, plan[index])
        assert again.features.equals(tables[index].features) and again.truth.equals(tables[index].truth)
    assert not simulate_shard(cfg, plan_shards(cfg, 1)[0]).features["ls"].equals(tables[0].features["ls"])


def test_the_features_are_what_the_schema_promises(corpus):
    cfg, tables = corpus
    features = pa.concat_tables([table.features for table in tables])
    schema = ChannelEstimation().schema(cfg).arrow_schema()
    assert features.schema.equals(schema)
    for spec in ChannelEstimation().schema(cfg).columns:
        if spec.valid_range and spec.dtype.startswith("float"):
            values = column_array(features[spec.name])
            assert values.min() >= spec.valid_range[0] and values.max() <= spec.valid_range[1], spec.name
    assert len(np.unique(column_array(features["sample_id"]))) == features.num_rows


def test_estimates_are_the_channel_in_noise_of_the_measured_size(corpus):
    table = [columns(tables) for tables in corpus[1]]
    data = {
        name: np.concatenate([part[name] for part in table]) for name in ("ls", "channel", "noise_variance", "snr_db", "antenna")
    }
    channel = data["channel"].astype(np.float32)
    at_pilots = 0.5 * (channel[:, :, [2, 11]][..., 0::4] + channel[:, :, [2, 11]][..., 2::4])
    error = ((data["ls"] - at_pilots) ** 2).sum(1).mean((1, 2))
    true_variance = NOISE_OF_ESTIMATE * noise_power(data["snr_db"])
    assert np.mean(error / true_variance) == pytest.approx(1.0, abs=0.05)
    # 48 empty pilots an antenna: the receiver knows the noise to about a seventh, no better than that and no worse.
    off = data["noise_variance"] / true_variance
    assert np.mean(off) == pytest.approx(1.0, abs=0.03) and 0.03 < np.std(off) < 0.2
    assert np.mean((channel**2).sum(1)) == pytest.approx(1.0, abs=0.12)
    assert set(np.unique(data["antenna"])) == {0, 1, 2, 3}


def test_antennas_of_a_slot_share_what_belongs_to_the_slot(corpus):
    data = columns(corpus[1][0])
    for slot in np.unique(data["slot_id"]):
        rows = data["slot_id"] == slot
        for name in ("drop_id", "snr_db", "noise_variance", "delay_spread_ns", "speed_kmh", "split"):
            assert len(np.unique(data[name][rows])) == 1, name
        assert sorted(data["antenna"][rows]) == list(range(rows.sum()))
    of_drop = {drop: len(np.unique(data["slot_id"][data["drop_id"] == drop])) for drop in np.unique(data["drop_id"])}
    assert set(of_drop.values()) == {4}
