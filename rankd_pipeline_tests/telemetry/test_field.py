"""The field, played with the bundle of the smoke chain: every shift moves what it says and nothing else, the rest is telemetry."""

import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rankd_pipeline.cli import rankd
from rankd_pipeline.cli.field import following_hour
from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.telemetry.contract import read_file
from rankd_pipeline.telemetry.field import Play, known_shifts, play
from rankd_pipeline.telemetry.windows import HOUR_S
from rankd_pipeline_tests.telemetry.made import PIPELINE, START_S, schema

ROWS = 200
SPEC = load_pipeline(PIPELINE).at("smoke")
FUNCTION = load_function(SPEC.function)


@pytest.fixture(scope="module")
def bundle(smoke_chain: Settings) -> Path:
    (found,) = (smoke_chain.home / "store" / PIPELINE / "deployment").glob("*/bundle")
    return found


def hour(bundle: Path, folder: Path, *shifts: str, seed: int = 0) -> dict[str, np.ndarray]:
    wanted = Play(bundle, frozenset(shifts), 1, ROWS, 0.25, seed, START_S)
    (path,) = play(FUNCTION, SPEC.steps.corpus.simulation, 100.0, wanted, folder, workers=1)
    return read_file(path, schema())[0]


@pytest.fixture(scope="module")
def calm(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return hour(bundle, tmp_path_factory.mktemp("calm"))


def test_a_calm_hour_is_whole_telemetry(calm: dict[str, np.ndarray], bundle: Path) -> None:
    assert len(calm["time_s"]) == ROWS and (np.diff(calm["time_s"]) >= 0).all()
    assert (calm["time_s"] >= START_S).all() and (calm["time_s"] < START_S + HOUR_S).all()
    sessions, rows = np.unique(calm["session"], return_counts=True)
    assert (rows == 10).all()
    labelled = {session: calm["has_label"][calm["session"] == session] for session in sessions}
    assert all(flags.all() or not flags.any() for flags in labelled.values()), "a session has a full sweep or it has none"
    assert 0 < calm["has_label"].sum() < ROWS
    np.testing.assert_allclose(calm["confidence"], calm["output"].max(axis=1))
    assert set(calm["model"]) == {bundle.parent.name} and (calm["latency_us"] > 0).all()


def test_the_same_seed_is_the_same_field_and_another_one_is_not(bundle: Path, calm: dict[str, np.ndarray], tmp_path: Path) -> None:
    again, other = hour(bundle, tmp_path / "a"), hour(bundle, tmp_path / "b", seed=1)
    for name in ("time_s", "l1_rsrp_dbm", "output", "has_label", "delay_spread_ns"):
        np.testing.assert_array_equal(again[name], calm[name])
        assert not np.array_equal(other[name], calm[name])


def test_context_is_estimated_with_the_error_that_is_stated(calm: dict[str, np.ndarray]) -> None:
    world = FUNCTION.field_config(FUNCTION.corpus_config(SPEC.steps.corpus.simulation), frozenset(), ROWS)
    assert {site.scenario for site in world.sites} == {"UMi"} and [band.ghz for band in world.bands] == [3.5]
    assert (calm["delay_spread_ns_error"] > 0).all() and (calm["snr_db_error"] == 1.0).all()
    los = np.isfinite(calm["k_factor_db"])
    assert 0.2 < los.mean() < 0.9, "without a line of sight there is no K-factor"
    speed = calm["doppler_hz"] * 299_792_458.0 / 3.5e9 * 3.6
    assert 2.0 < np.median(speed) < 4.0


def median_ratio(shifted: dict[str, np.ndarray], calm: dict[str, np.ndarray], name: str) -> float:
    return float(np.nanmedian(shifted[name]) / np.nanmedian(calm[name]))


def test_each_shift_moves_what_it_says(bundle: Path, calm: dict[str, np.ndarray], tmp_path: Path) -> None:
    shifted = {name: hour(bundle, tmp_path / name, name) for name in known_shifts(FUNCTION)}
    for name, columns in shifted.items():
        moved = {quantity: median_ratio(columns, calm, quantity) for quantity in ("delay_spread_ns", "doppler_hz")}
        assert (
            2.2 < moved["delay_spread_ns"] < 4
            if name == "delay_spread_x3"
            else name in ("uma", "new_site", "band_28") or (0.7 < moved["delay_spread_ns"] < 1.4)
        )
        assert 15 < moved["doppler_hz"] < 25 if name == "speed_60" else name == "band_28" or 0.8 < moved["doppler_hz"] < 1.3
        assert (set(columns["band_ghz"]) == {28.0}) == (name == "band_28")
        assert any("high_rise" in site for site in columns["site"]) == (name == "new_site")
        assert (np.quantile(columns["latency_us"], 0.98) > 100.0) == (name == "slow_host")
    assert median_ratio(shifted["uma"], calm, "delay_spread_ns") > 1.5
    assert median_ratio(shifted["uma"], calm, "angle_spread_deg") < 0.8
    share = np.mean(["high_rise" in site for site in shifted["new_site"]["site"]])
    assert 0.3 < share < 0.7
    dead = shifted["broken_beam"]["l1_rsrp_mask"][:, 0]
    assert not dead[:, 7].any() and dead[:, :7].mean() > 0.9
    weak = shifted["weak_beam"]
    level = np.where(weak["l1_rsrp_mask"] > 0, weak["l1_rsrp_dbm"], np.nan)[:, 0]
    before = np.where(calm["l1_rsrp_mask"] > 0, calm["l1_rsrp_dbm"], np.nan)[:, 0]
    drop = np.nanmedian(before, axis=0) - np.nanmedian(level, axis=0)
    assert drop[7] - np.median(drop) > 5


def test_what_cannot_be_played_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    for wanted, why in (
        (Play(bundle, frozenset({"flood"}), 1, 10, 0.1, 0, START_S), "shift 'flood': unknown.*expected one of uma"),
        (Play(bundle, frozenset(), 1, 10, 0.1, 0, time.time() + 9e4), "ahead of now"),
        (Play(tmp_path, frozenset(), 1, 10, 0.1, 0, START_S), "not a bundle"),
    ):
        with pytest.raises(RankdError, match=why):
            play(FUNCTION, SPEC.steps.corpus.simulation, 100.0, wanted, tmp_path / "out", 1)


def test_the_command_goes_on_after_the_last_hour(bundle: Path, home: Settings) -> None:
    folder = home.telemetry_dir(PIPELINE)
    options = ["field", PIPELINE, "--bundle", str(bundle), "--rows", "40"]
    for arguments in (["--hours", "2"], ["--shift", "weak_beam"]):
        result = CliRunner().invoke(rankd, [*options, *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    starts = sorted(float(read_file(path, schema())[0]["time_s"].min()) // HOUR_S for path in folder.glob("*.parquet"))
    assert starts == [starts[0], starts[0] + 1, starts[0] + 2]
    assert following_hour(folder, None) == (starts[-1] + 1) * HOUR_S
    with pytest.raises(RankdError, match="nothing serves yet"):
        CliRunner().invoke(rankd, ["field", PIPELINE], catch_exceptions=False)
    names = CliRunner().invoke(rankd, ["field", PIPELINE, "--list"], catch_exceptions=False).output
    assert all(name in names for name in known_shifts(FUNCTION))
