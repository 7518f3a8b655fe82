"""Block errors and pictures of channel estimation: better estimates lose fewer blocks, on the same noise, and it can be seen."""

import numpy as np
import pandas as pd
import pytest

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.evaluation.table import format_cell, validate_table
from rankd_pipeline.ran_functions.channel_estimation import pictures
from rankd_pipeline.ran_functions.channel_estimation.baselines import interpolated, true_lmmse, with_interval
from rankd_pipeline.ran_functions.channel_estimation.config import BandConfig, ChannelCorpusConfig, ProfileConfig
from rankd_pipeline.ran_functions.channel_estimation.decoding import DecodingConfig, block_errors
from rankd_pipeline.ran_functions.channel_estimation.simulate import plan_shards, simulate_shard
from rankd_pipeline.store.tensors import column_array

CFG = ChannelCorpusConfig(
    profiles=(ProfileConfig(name="tdl_c", model="TDL-C"),), bands=(BandConfig(ghz=3.5),), seen_slots=140, heldout_profile_slots=0,
    heldout_band_slots=0, receive_antennas=(1, 2),
)  # fmt: skip
SENT = DecodingConfig(slots=60, antennas=2, snr_db=(-4.0, 0.0, 3.0, 8.0))


@pytest.fixture(scope="module")
def rows() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(features with the statistics of the bound and the row's number, truth) of a small corpus."""
    tables = [simulate_shard(CFG, shard) for shard in plan_shards(CFG, 0)]
    features, truth = (
        {name: np.concatenate([column_array(getattr(item, side)[name]) for item in tables]) for name in names}
        for side, names in (
            ("features", ("sample_id", "drop_id", "ls", "noise_variance")),
            ("truth", ("slot_id", "antenna", "snr_db", "channel", "path_power", "path_delay_ns", "path_correlation")),
        )
    )
    statistics = {name: truth[name] for name in ("path_power", "path_delay_ns", "path_correlation")}
    return {**features, **statistics, "row": np.arange(len(features["drop_id"]))}, truth


@pytest.fixture(scope="module")
def table(rows) -> pd.DataFrame:
    features, truth = rows
    channel = truth["channel"].astype(np.float32)
    known = channel[:, 0] + 1j * channel[:, 1]
    models = {
        "known": lambda seen: with_interval(known[seen["row"]], np.full(len(seen["row"]), 1e-6)),
        "lmmse_true": lambda seen: true_lmmse(seen, CFG),
        "ls_linear": lambda seen: interpolated(seen, CFG, "lin"),
        "turned": lambda seen: with_interval(-known[seen["row"]], np.full(len(seen["row"]), 1e-6)),
    }
    return block_errors(models, features, truth, "test", CFG, SENT, seed=3)


def rate(table: pd.DataFrame, model: str) -> list[float]:
    mine = table[table["model"] == model]
    return [float(np.average(part["value"], weights=part["n"])) for _, part in mine.groupby("cell", sort=False, observed=True)]


def test_better_estimates_lose_fewer_blocks(table):
    known, bound, linear, turned = (rate(table, name) for name in ("known", "lmmse_true", "ls_linear", "turned"))
    assert turned == [1.0] * len(SENT.snr_db)
    assert sum(known) < sum(bound) < sum(linear)
    for curve in (known, bound, linear):
        assert curve[0] > 0.8 and sorted(curve, reverse=True) == curve
    assert known[-1] < 0.05
    at = {name: estimate(table, f"{name}@test", metric="block_error", aggregate="crossing(0.1,snr_db)", higher_is_better=False)
          for name in ("known", "lmmse_true", "ls_linear")}  # fmt: skip
    assert at["known"].value <= at["lmmse_true"].value < at["ls_linear"].value
    assert at["ls_linear"].ci95 is not None


def test_rows_are_drops_and_the_same_seed_gives_the_same_table(table, rows):
    features, truth = rows
    assert set(table["cell"].astype(str)) == {f"snr_db={snr:g}" for snr in SENT.snr_db}
    assert set(table["metric"]) == {"block_error"} and set(table["unit"]) <= set(features["drop_id"].tolist())
    of_a_model = table[(table["model"] == "known") & (table["cell"] == "snr_db=3")]
    two = np.unique(truth["slot_id"][truth["antenna"] == 1])
    assert of_a_model["n"].sum() == min(SENT.slots, len(two)), "each slot that has both antennas once"
    again = block_errors({"ls_linear": lambda seen: interpolated(seen, CFG, "lin")}, features, truth, "test", CFG, SENT, seed=3)
    alone = table[table["model"] == "ls_linear"].reset_index(drop=True)
    pd.testing.assert_series_equal(again["value"], alone["value"], check_names=False)


def test_too_few_antennas_are_a_sentence(rows):
    features, truth = rows
    with pytest.raises(RankdError, match=r"no slot of the test split has 3 antennas; lower end_metric\.antennas"):
        block_errors({}, features, truth, "test", CFG, DecodingConfig(antennas=3), seed=0)


def planted() -> pd.DataFrame:
    """A table where the teacher is 10 dB better than LS in the two cells that there are, and 1 dB above the bound."""
    parts = []
    for model, error in (("teacher", 0.01), ("ls_linear", 0.1), ("lmmse_true", 0.01 * 10**-0.1)):
        cells = [format_cell(site="a", snr=snr, ds="30..65", speed="75..120") for snr in ("0..5", "5..10")]
        parts.append(pd.DataFrame({"model": model, "cell": cells, "metric": "nmse", "value": error}))
        sent = [format_cell(snr_db=f"{snr:g}") for snr in (0.0, 4.0)]
        parts.append(pd.DataFrame({"model": model, "cell": sent, "metric": "block_error", "value": [10 * error, error]}))
    return validate_table(pd.concat(parts, ignore_index=True).assign(split="test", unit=1, n=40))


def test_pictures_show_the_cells_and_the_curves():
    table = planted()
    gain = pictures.cells_db(table, "ls_linear") - pictures.cells_db(table, "teacher")
    assert gain.shape == (6, 9) and np.isfinite(gain).sum() == 2
    assert gain[1, 2] == pytest.approx(10.0) and gain[2, 2] == pytest.approx(10.0)
    found = dict(pictures.all_pictures(table))
    assert set(found) == {
        "gain_of_the_teacher_over_LS_linear", "distance_of_the_teacher_to_LMMSE_with_the_truth",
        "block_errors_of_the_teacher_and_the_baselines",
    }  # fmt: skip
    assert all(picture.startswith(b"\x89PNG") and 5_000 < len(picture) < 100_000 for picture in found.values())
    assert not dict(pictures.all_pictures(table[table["model"] != "teacher"]))
