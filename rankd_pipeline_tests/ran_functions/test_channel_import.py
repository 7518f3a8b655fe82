"""Import of channels from HDF5 files, in the layout of MATLAB and of Python, into the same corpus as simulated ones."""

import h5py
import numpy as np
import pytest

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.channel_prediction.config import CATALOGUE
from rankd_pipeline.ran_functions.channel_prediction.function import ChannelPrediction
from rankd_pipeline.ran_functions.channel_prediction.patches import unpatchify
from rankd_pipeline.store.tensors import column_array

FUNCTION, D5 = ChannelPrediction(), CATALOGUE["D5-s"]
CROP = {"instants": 8, "rows": 2, "cols": 2, "subcarriers": 16}


def channels(n: int = 20) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (n, D5.instants, D5.antennas, D5.subcarriers)
    return (3.0 * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape))).astype(np.complex64)


def write(path, h: np.ndarray, layout: str, key: str = "X_val") -> None:
    with h5py.File(path, "w") as file:
        if layout == "python":
            file[key] = h
            return
        pairs = np.zeros(h.T.shape, dtype=[("real", "<f4"), ("imag", "<f4")])
        pairs["real"], pairs["imag"] = h.T.real, h.T.imag
        file[key] = pairs
        file[key].attrs["MATLAB_class"] = np.bytes_("single")


def config(**changes):
    choice = {"name": "D5-s", "file": "own/X_test.mat", "crop": CROP, **changes}
    return FUNCTION.corpus_config({"sets": [choice], "deploy": {"name": "D5-s"}, "shard_samples": 8})


@pytest.fixture
def folder(home):
    (home.home / "own").mkdir()
    return home.home / "own"


@pytest.mark.parametrize("layout", ["matlab", "python"])
def test_either_layout_gives_the_channels_at_unit_power_with_our_noise(folder, layout):
    h = channels()
    write(folder / "X_test.mat", h, layout)
    cfg = config()
    shards = FUNCTION.plan(cfg, 0)
    assert [(shard.split, shard.samples) for shard in shards] == [("train", 8), ("train", 6), ("val", 3), ("test", 3)]
    found = [FUNCTION.simulate(cfg, shard) for shard in shards]
    assert found[0][0].schema.equals(FUNCTION.schema(cfg).arrow_schema())
    clean = np.concatenate([column_array(truth["csi_clean"]) for _, truth in found])
    noisy = np.concatenate([column_array(features["csi"]) for features, _ in found])
    expected = h[:, :8, :4, :16]
    scaled = expected / np.sqrt(np.mean(np.abs(expected) ** 2))
    assert np.allclose(unpatchify(clean, (2, 1, 4)), scaled, atol=1e-5)
    assert np.mean(np.square(noisy - clean)) * 2 == pytest.approx(0.01, rel=0.05)
    assert set(column_array(found[0][0]["source"])) == {"X_test"}


def test_a_held_out_file_is_one_split(folder):
    write(folder / "X_test.mat", channels(), "python")
    seen = {"name": "D3-s", "crop": {"instants": 8, "rows": 1, "cols": 8, "subcarriers": 8}}
    choice = {"name": "D5-s", "file": "own/X_test.mat", "crop": CROP, "role": "heldout_site"}
    cfg = FUNCTION.corpus_config({"sets": [seen, choice], "deploy": {"name": "D5-s"}, "train_samples": 8, "val_samples": 4,
                                  "test_samples": 4})  # fmt: skip
    assert [(s.split, s.samples) for s in FUNCTION.plan(cfg, 0) if s.name == "D5-s"] == [("heldout_site", 20)]


def test_what_does_not_fit_is_one_clear_sentence(folder):
    with pytest.raises(RankdError, match="is no file; put the .mat under the rankd home"):
        FUNCTION.plan(config(), 0)
    (folder / "X_test.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(RankdError, match="no HDF5 file"):
        FUNCTION.plan(config(), 0)
    write(folder / "X_test.mat", channels(), "python", key="X_test")
    with pytest.raises(RankdError, match="no array 'X_val'; it holds X_test"):
        FUNCTION.plan(config(), 0)
    assert len(FUNCTION.plan(config(key="X_test"), 0)) == 4
    write(folder / "X_test.mat", channels()[:, :16], "python")
    with pytest.raises(RankdError, match=r"shape \(20, 16, 4, 64\); expected \[samples, 24, 4, 64\]"):
        FUNCTION.plan(config(), 0)
    broken = channels()
    broken[9, 0, 0, 0] = np.nan
    write(folder / "X_test.mat", broken, "python")
    with pytest.raises(RankdError, match="sample 9 holds NaN"):
        FUNCTION.simulate(config(), FUNCTION.plan(config(), 0)[0])
    with pytest.raises(RankdError, match="home"):
        FUNCTION.plan(config(file="../outside.mat"), 0)


def test_a_channel_has_no_csv_and_says_what_to_do(tmp_path):
    cfg = FUNCTION.corpus_config({"sets": [{"name": "D5-s"}], "deploy": {"name": "D5-s"}})
    with pytest.raises(RankdError, match="call the bundle from Python"):
        FUNCTION.read_reports(tmp_path / "reports.csv", FUNCTION.signatures(cfg, 1000.0)[0])
