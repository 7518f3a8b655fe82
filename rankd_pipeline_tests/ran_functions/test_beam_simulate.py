"""The simulated corpus: reproducible bytes, honest splits, and every setting does what its name says, down to the networks."""

import hashlib
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.ran_functions.beam_management.config import BeamCorpusConfig
from rankd_pipeline.ran_functions.beam_management.function import BeamManagement
from rankd_pipeline.ran_functions.beam_management.simulate import (
    Shard,
    ShardTables,
    hierarchical_codebook,
    plan_shards,
    simulate_shard,
)
from rankd_pipeline.store.tensors import column_array

FUNCTION = BeamManagement()
STREET = {
    "name": "street", "scenario": "UMi", "isd_m": 200.0, "bs_height_m": 10.0, "indoor_share": 0.2, "speed_kmh": (0.0, 30.0),
}  # fmt: skip
HILL = {
    "name": "hill", "scenario": "UMa", "isd_m": 500.0, "bs_height_m": 25.0, "indoor_share": 0.5, "speed_kmh": (0.0, 60.0),
    "min_distance_m": 35.0,
}  # fmt: skip
N78 = {"ghz": 3.5, "eirp_dbm": 70.0}
N257 = {"ghz": 28.0, "scs_khz": 120.0, "resource_blocks": 66, "eirp_dbm": 62.0, "noise_figure_db": 10.0}
MID = {"ghz": 10.0, "role": "heldout", "scs_khz": 60.0, "resource_blocks": 135, "eirp_dbm": 66.0}
SMALL: dict[str, Any] = {
    "sites": [STREET, HILL, STREET | {"name": "lane", "role": "heldout"}], "bands": [N78, N257, MID],
    "seen_samples": 160, "heldout_site_samples": 32, "heldout_band_samples": 32, "ues_per_drop": 2, "shard_samples": 16,
}  # fmt: skip
ONE_CELL: dict[str, Any] = {
    "sites": [STREET], "bands": [N78], "heldout_site_samples": 0, "heldout_band_samples": 0, "seen_samples": 64,
    "shard_samples": 64, "ues_per_drop": 4, "array": {"vertical_spacing": 0.5}, "measurement": {"implementation_error_db": 0.5},
}  # fmt: skip


def config(base: dict[str, Any], **changes: Any) -> BeamCorpusConfig:
    return BeamCorpusConfig.model_validate(base | changes)


def columns(tables: ShardTables) -> dict[str, np.ndarray]:
    """All columns of features and truth as arrays."""
    both = {n: tables.features[n] for n in tables.features.column_names} | {n: tables.truth[n] for n in tables.truth.column_names}
    return {name: column_array(column) for name, column in both.items()}


def digest(tables: ShardTables) -> str:
    """SHA-256 of both tables as an Arrow stream."""
    sha = hashlib.sha256()
    for table in (tables.features, tables.truth):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        sha.update(sink.getvalue())
    return sha.hexdigest()


@cache
def one_cell(**changes: Any) -> dict[str, np.ndarray]:
    """The 64 samples of the first shard of one street at 3.5 GHz."""
    cfg = config(ONE_CELL, **changes)
    return columns(simulate_shard(cfg, plan_shards(cfg, 3)[0]))


@pytest.fixture(scope="module")
def corpus() -> tuple[BeamCorpusConfig, list[Shard], list[ShardTables]]:
    """Small corpus of two seen sites, one held-out one, three bands."""
    cfg = config(SMALL)
    plan = plan_shards(cfg, 0)
    return cfg, plan, [simulate_shard(cfg, shard) for shard in plan]


# -- reproducibility ----------------------------------------------------------------------------------------------------
CHILD = """
import sys
import torch
from rankd_pipeline_tests.ran_functions.test_beam_simulate import SMALL, config, digest, plan_shards, simulate_shard
torch.set_num_threads(2); torch.manual_seed(99)
cfg = config(SMALL)
plan = plan_shards(cfg, 0)
for index in map(int, sys.argv[1:]):
    print(index, digest(simulate_shard(cfg, plan[index])))
"""


def test_same_seed_same_bytes_in_another_process_and_another_order(corpus):
    _, plan, tables = corpus
    wanted = [len(plan) - 1, 0, 3]
    run = subprocess.run([sys.executable, "-c", CHILD, *map(str, wanted)], capture_output=True, text=True, check=True, timeout=120)
    assert [line.split() for line in run.stdout.splitlines()] == [[str(i), digest(tables[i])] for i in wanted]


def test_shards_differ_and_the_seed_matters(corpus):
    cfg, plan, tables = corpus
    assert len({digest(t) for t in tables}) == len(tables) and len({s.seed for s in plan}) == len(plan)
    other = plan_shards(cfg, 1)
    assert not {s.seed for s in plan} & {s.seed for s in other}
    assert digest(simulate_shard(cfg, other[0])) != digest(tables[0])


def test_simulating_leaves_torch_as_it_was():
    cfg = config(ONE_CELL, seen_samples=4)
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    simulate_shard(cfg, plan_shards(cfg, 0)[0])
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


# -- the plan -----------------------------------------------------------------------------------------------------------
def codes_of_cells(plan: list[Shard]) -> dict[tuple[str, float], str]:
    """One letter a drop, of all shards of a (site, band)."""
    found: dict[tuple[str, float], str] = {}
    for shard in plan:
        assert shard.first_drop_of_cell == len(found.get((shard.site, shard.band_ghz), ""))
        found[shard.site, shard.band_ghz] = found.get((shard.site, shard.band_ghz), "") + shard.drop_codes
    return found


@given(
    seen=st.integers(1, 3000), heldout=st.integers(0, 300), users=st.integers(1, 8), shard=st.integers(1, 500),
    share=st.floats(0.01, 1), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_plan_is_dense_split_by_drop_and_large_enough(seen, heldout, users, shard, share, seed):
    cfg = config(
        SMALL, seen_samples=seen, heldout_site_samples=heldout, heldout_band_samples=heldout, ues_per_drop=users,
        shard_samples=shard, labelled_share=share,
    )  # fmt: skip
    plan = plan_shards(cfg, seed)
    assert [s.index for s in plan] == list(range(len(plan)))
    first = 0
    for s in plan:
        assert s.first_drop == first and 0 < len(s.drop_codes) <= max(shard // users, 1)
        first += len(s.drop_codes)
    cells = codes_of_cells(plan)
    heldout_sites, heldout_bands = {"lane"}, {10.0}
    drops, mixed = {"seen": 0, "s": 0, "b": 0}, ""
    for (site, band), codes in cells.items():
        assert not (site in heldout_sites and band in heldout_bands)
        if site in heldout_sites or band in heldout_bands:
            kind = "s" if site in heldout_sites else "b"
            assert set(codes) == {kind}
            drops[kind] += len(codes)
            continue
        assert set(codes) <= set("Luvt")
        drops["seen"] += len(codes)
        mixed += codes if len(codes) >= 10 else ""
    # Rounding is by whole drops, up for validation and test so that they never starve.
    for letter in "vt":
        assert 0 <= mixed.count(letter) - 0.15 * len(mixed) <= len(cells)
    assert abs(mixed.count("L") - 0.7 * share * len(mixed)) <= 2 * len(cells)
    for kind, samples in (("seen", seen), ("s", heldout), ("b", heldout)):
        assert samples <= drops[kind] * users < samples + 4 * users
    assert codes_of_cells(plan_shards(cfg, seed)) == cells


def test_shares_are_exact_over_many_drops_and_drawn_at_random():
    cells = codes_of_cells(plan_shards(config(SMALL, seen_samples=8000), 0))
    codes = "".join(code for (site, band), code in cells.items() if site != "lane" and band != 10.0)
    assert len(codes) == 4000
    train = codes.count("L") + codes.count("u")
    assert (train, codes.count("v"), codes.count("t"), codes.count("L")) == (2800, 600, 600, 840)
    street, hill = cells["street", 3.5], cells["hill", 3.5]
    assert street != hill and set(street[:40]) == set(street[-40:]) == set("Luvt")


def test_size_of_a_shard_moves_no_drop_to_another_split():
    sizes = [codes_of_cells(plan_shards(config(SMALL, shard_samples=size), 0)) for size in (2, 16, 1000)]
    assert sizes[0] == sizes[1] == sizes[2]


# -- the rows -----------------------------------------------------------------------------------------------------------
def test_ids_splits_and_labels_of_the_rows(corpus):
    cfg, _, tables = corpus
    rows = pa.concat_tables([t.features for t in tables])
    n = rows.num_rows
    get = {name: column_array(rows[name]) for name in rows.column_names}
    assert np.array_equal(get["sample_id"], np.arange(n)) and np.array_equal(get["drop_id"], np.arange(n) // 2)
    for table in tables:
        assert table.features["sample_id"] == table.truth["sample_id"]
    per_drop = {
        (d, s, b, p, lab)
        for d, s, b, p, lab in zip(*(get[c] for c in ("drop_id", "site", "band_ghz", "split", "labelled")), strict=True)
    }
    assert len(per_drop) == n // 2  # a drop is of one site, one band, one split, labelled or not
    seen = (get["site"] != "lane") & (get["band_ghz"] != 10.0)
    assert set(get["split"][seen]) == {"train", "val", "test"}
    assert set(get["split"][get["site"] == "lane"]) == {"heldout_site"} and set(get["split"][get["band_ghz"] == 10.0]) == {
        "heldout_band"
    }
    assert get["labelled"][get["split"] != "train"].all()
    assert get["labelled"][get["split"] == "train"].mean() == pytest.approx(0.30, abs=0.05)
    assert set(get["scenario"][get["site"] == "hill"]) == {"UMa"}
    for _, of_cell in rows.to_pandas()[["site", "band_ghz", "drop_id", "time_s"]].groupby(["site", "band_ghz"]):
        assert np.array_equal(np.unique(of_cell["time_s"]), np.arange(of_cell["drop_id"].nunique()))


def test_reports_and_truth_are_sound(corpus):
    _, _, tables = corpus
    for table in tables:
        c = columns(table)
        values, mask, rsrp = c["l1_rsrp_dbm"], c["l1_rsrp_mask"], c["rsrp_set_a_dbm"]
        assert values.shape == mask.shape == (len(rsrp), 1, 16) and rsrp.shape[1] == 64
        assert np.isfinite(values).all() and np.isfinite(rsrp).all() and np.array_equal(values == 0, mask == 0)
        assert set(np.unique(mask)) <= {0, 1} and values.min() >= -170 and values.max() <= 0 and values[mask > 0].max() <= -44
        assert np.array_equal(c["best_beam"], rsrp.argmax(1))
        assert not c["los"][c["indoor"]].any()
        assert all(np.isfinite(c[name]).all() for name in c if c[name].dtype.kind == "f")


def test_reports_say_what_the_truth_is_give_or_take_noise():
    """Where a wide beam is reported, the narrow beams it covers cannot be far from it."""
    c = one_cell()
    values, mask = c["l1_rsrp_dbm"][:, 0].reshape(-1, 2, 8), c["l1_rsrp_mask"][:, 0]
    wide = values.reshape(-1, 16).copy()
    wide[mask == 0] = -np.inf
    strong = mask.sum(1) > 8
    # The best of 64 narrow beams has 6 dB more aperture than the best of 16 wide ones: 0 to 7 dB above its report.
    gain = c["rsrp_set_a_dbm"].max(1)[strong] - wide.max(1)[strong]
    assert 1.5 < np.median(gain) < 7 and strong.sum() > 20


def test_sweeps_find_good_beams():
    """The full noisy sweep is nearly the genie; the hierarchical one (8 + 8 of 64) is worse, and far better than chance."""
    c = one_cell(seen_samples=256, shard_samples=256)
    rsrp = c["rsrp_set_a_dbm"]
    well = rsrp.max(1) > -100

    def loss_db(beam: np.ndarray) -> np.ndarray:
        return (rsrp.max(1) - rsrp[np.arange(len(rsrp)), beam])[well]

    full, two_stage = loss_db(c["sweep_beam"]), loss_db(c["hierarchical_beam"])
    any_beam = (rsrp.max(1) - np.median(rsrp, 1))[well]
    assert np.median(full) == 0 and full.mean() < 0.3 and (c["sweep_beam"] == c["best_beam"])[well].mean() > 0.8
    assert full.mean() < two_stage.mean() < 0.4 * any_beam.mean()
    assert c["hierarchical_beam"].min() >= 0 and c["hierarchical_beam"].max() < 64


@pytest.mark.parametrize(
    ("array", "set_b"),
    [((4, 16), (2, 8)), ((4, 8), (2, 4)), ((1, 8), (1, 4)), ((2, 2), (1, 1)), ((1, 2), (1, 1)), ((8, 8), (4, 4))],
)
def test_hierarchical_sweep_fits_every_array(array, set_b):
    """Children partition Set A; the sweep spends what Set B does, or, where no division does, as little as any division."""
    cfg = config(ONE_CELL, array={"rows": array[0], "cols": array[1]}, set_b={"rows": set_b[0], "cols": set_b[1]})
    parents, children = hierarchical_codebook(cfg)
    assert np.array_equal(np.sort(children.ravel()), np.arange(cfg.n_set_a))
    least = min(p + cfg.n_set_a // p for p in range(1, cfg.n_set_a + 1) if cfg.n_set_a % p == 0)
    assert len(parents) + children.shape[1] <= max(cfg.n_set_b, least)


# -- every knob ---------------------------------------------------------------------------------------------------------
def through_the_networks(cfg: BeamCorpusConfig, c: dict[str, np.ndarray]) -> None:
    """Signature, teacher and student take what was simulated, and answer with one score a narrow beam."""
    inputs = FUNCTION.model_inputs(c)
    (signature,) = FUNCTION.signatures(cfg, 100.0)
    for spec in signature.inputs:
        assert inputs[spec.name].shape[1:] == spec.shape and inputs[spec.name].dtype == spec.dtype
    tensors = [torch.tensor(inputs[name]) for name in signature.input_names]
    for network in (
        FUNCTION.teacher(cfg, {"width": 8, "depth": 1, "heads": 2}),
        FUNCTION.student(cfg, {"hidden": [8], "mirror": True}),
    ):
        FUNCTION.set_statistics(network, inputs)
        with torch.no_grad():
            scores = FUNCTION.deployable(network, {"temperature": 1.0})(*tensors)
        assert scores.shape == (len(c["sample_id"]), *signature.outputs[0].shape) and scores.isfinite().all()


KNOBS: dict[str, dict[str, Any]] = {
    "default": {},
    "array": {"array": {"rows": 2, "cols": 8}, "set_b": {"rows": 1, "cols": 4}},
    "square array": {"array": {"rows": 4, "cols": 8}, "set_b": {"rows": 2, "cols": 4}},
    "set_b": {"set_b": {"rows": 1, "cols": 16}},
    "spacing": {"array": {"vertical_spacing": 0.8, "horizontal_spacing": 0.6}},
    "band": {"bands": [N257]},
    "site": {"sites": [HILL]},
    "reported_beams": {"reported_beams": 4},
    "history": {"history": 4},
    "history and reported_beams": {"history": 3, "reported_beams": 4, "ssb_period_ms": 40.0},
    "measurement": {"measurement": {"n_re": 24, "coherent_re": 1, "implementation_error_db": 2.0, "detection_snr_db": 3.0}},
    "users": {"ues_per_drop": 3},
}


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_changes_the_corpus_and_reaches_the_networks(name):
    cfg = config(ONE_CELL, seen_samples=24, **KNOBS[name])
    tables = simulate_shard(cfg, plan_shards(cfg, 3)[0])
    c = columns(tables)
    assert c["l1_rsrp_dbm"].shape == (24, cfg.history, cfg.n_set_b) and c["rsrp_set_a_dbm"].shape == (24, cfg.n_set_a)
    assert (c["l1_rsrp_mask"].sum(2) <= cfg.beams_in_report).all() and c["l1_rsrp_mask"].any()
    assert np.isfinite(c["l1_rsrp_dbm"]).all() and max(c["hierarchical_beam"].max(), c["best_beam"].max()) < cfg.n_set_a
    if name != "default":
        default = columns(simulate_shard(config(ONE_CELL, seen_samples=24), plan_shards(config(ONE_CELL, seen_samples=24), 3)[0]))
        assert not np.array_equal(c["l1_rsrp_dbm"], default["l1_rsrp_dbm"])
    through_the_networks(cfg, c)


def test_reported_beams_is_a_cut_of_the_full_report():
    """The same users, the same noise: four reported beams are the four strongest of all sixteen."""
    full, four = one_cell(), one_cell(reported_beams=4)
    assert np.array_equal(full["rsrp_set_a_dbm"], four["rsrp_set_a_dbm"])
    kept = four["l1_rsrp_mask"] > 0
    assert np.array_equal(kept.sum(2), np.minimum(full["l1_rsrp_mask"].sum(2), 4))
    assert np.array_equal(four["l1_rsrp_dbm"][kept], full["l1_rsrp_dbm"][kept])
    left_out = np.where((full["l1_rsrp_mask"] > 0) & ~kept, full["l1_rsrp_dbm"], -np.inf).max(2)
    assert np.all(np.where(kept, four["l1_rsrp_dbm"], np.inf).min(2) >= left_out)


def test_history_evolves_with_the_speed_of_the_user():
    """Reports of a user who stands still repeat; those of a driver wander, the more the longer ago."""
    wander = {}
    for speed in (0.0, 30.0):
        cfg = config(
            ONE_CELL, sites=[STREET | {"speed_kmh": (speed, speed), "indoor_share": 0.0}], history=4,
            measurement={"implementation_error_db": 0.0},
        )  # fmt: skip
        c = columns(simulate_shard(cfg, plan_shards(cfg, 3)[0]))
        assert np.allclose(c["speed_kmh"], speed)
        values, mask = c["l1_rsrp_dbm"], c["l1_rsrp_mask"] > 0
        strong = mask.all(1) & (values > values.max(2, keepdims=True) - 10).all(1)
        apart = np.abs(values - values[:, -1:])
        wander[speed] = [apart[:, t][strong].mean() for t in range(4)]
    assert wander[0.0][0] < 0.6 and wander[30.0][0] > 2 * wander[0.0][0] and wander[30.0][2] > 2 * wander[0.0][2]
    assert wander[0.0][3] == wander[30.0][3] == 0


def test_the_newest_instant_is_the_truths():
    """The truth is of the last report's instant: with history, the newest reports tell most about it."""
    cfg = config(
        ONE_CELL, seen_samples=192, shard_samples=192, sites=[STREET | {"speed_kmh": (30.0, 30.0), "indoor_share": 0.0}],
        history=4, ssb_period_ms=80.0, set_b={"rows": 4, "cols": 16}, measurement={"implementation_error_db": 0.0},
    )  # fmt: skip
    c = columns(simulate_shard(cfg, plan_shards(cfg, 3)[0]))
    # Near the strongest: 30 dB below it the report says no more than that.
    mask = (c["l1_rsrp_mask"] > 0).all(1) & (c["rsrp_set_a_dbm"] > c["rsrp_set_a_dbm"].max(1, keepdims=True) - 15)
    error = [np.abs(c["l1_rsrp_dbm"][:, t] - c["rsrp_set_a_dbm"])[mask].mean() for t in range(4)]
    assert error[3] < 2.0 and error[3] < 0.6 * min(error[:3])  # Set B = Set A here: the newest report is the truth, quantised


def test_link_budget_moves_levels_and_noise_moves_detection():
    base, loud = one_cell(), columns_of(bands=[N78 | {"eirp_dbm": 60.0}])
    assert np.allclose(base["rsrp_set_a_dbm"] - loud["rsrp_set_a_dbm"], 10.0, atol=1e-3)
    wide = columns_of(bands=[N78 | {"resource_blocks": 546 // 4}])
    assert np.allclose(wide["rsrp_set_a_dbm"] - base["rsrp_set_a_dbm"], 10 * np.log10(273 / 136), atol=1e-3)
    deaf = columns_of(bands=[N78 | {"noise_figure_db": 30.0}])
    assert np.array_equal(base["rsrp_set_a_dbm"], deaf["rsrp_set_a_dbm"])
    assert deaf["l1_rsrp_mask"].mean() < base["l1_rsrp_mask"].mean() - 0.1


def columns_of(**changes: Any) -> dict[str, np.ndarray]:
    cfg = config(ONE_CELL, **changes)
    return columns(simulate_shard(cfg, plan_shards(cfg, 3)[0]))


def test_sites_place_their_users():
    def site(**changes: Any) -> dict[str, np.ndarray]:
        return columns_of(sites=[STREET | changes])

    inside, outside = site(indoor_share=1.0), site(indoor_share=0.0)
    assert inside["indoor"].all() and not outside["indoor"].any() and inside["speed_kmh"].max() <= 3.0
    assert outside["speed_kmh"].max() > 20 and outside["los"].any()
    assert np.median(inside["coupling_loss_db"]) > np.median(outside["coupling_loss_db"]) + 15
    reach = 200 * np.sqrt(np.sqrt(3) / 2 / np.pi)
    assert outside["distance_m"].max() <= np.hypot(reach, 10) and site(isd_m=800.0)["distance_m"].max() > 250
    assert site(min_distance_m=80.0)["distance_m"].min() >= 80
    # A narrow sector lights fewer azimuths: fewer different beams are the best one.
    assert len(set(site(sector_deg=10.0)["best_beam"] % 16)) < len(set(outside["best_beam"] % 16))


def test_batch_of_a_shard_does_not_show_in_its_ids():
    for name in ("sample_id", "drop_id", "split", "labelled", "time_s"):
        assert np.array_equal(one_cell()[name], one_cell(batch_samples=8)[name])
