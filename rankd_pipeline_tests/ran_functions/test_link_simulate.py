"""The simulated corpus of link adaptation: whole traces in their splits, channels that move as they should, feedback as it is."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import j0

from rankd_pipeline.errors import RankdError
from rankd_pipeline.radio.seeding import seeded
from rankd_pipeline.ran_functions.link_adaptation import simulate
from rankd_pipeline.ran_functions.link_adaptation.config import SLOT_US, LinkCorpusConfig
from rankd_pipeline.ran_functions.link_adaptation.function import LinkAdaptation
from rankd_pipeline.ran_functions.link_adaptation.rollout import traces_of
from rankd_pipeline.ran_functions.link_adaptation.tables import CQI_TO_MCS, link_tables
from rankd_pipeline.store.tensors import column_array

FUNCTION = LinkAdaptation()
QUIET = {"interfered_share": 0.0, "shadow_sigma_db": 0.0}


def config(site: dict | None = None, **changes) -> LinkCorpusConfig:
    """One TDL-A street of 12 users, one window of 256 slots a trace unless told otherwise."""
    street = {"name": "street", "scenario": "TDL-A", "speed_kmh": [3, 30], **(site or {})}
    return FUNCTION.corpus_config({
        "sites": [street], "bands": [{"ghz": 3.5}], "seen_traces": 12, "heldout_site_traces": 0, "heldout_band_traces": 0,
        "trace_slots": 256, "window_slots": 256, **changes,
    })  # fmt: skip


def made(cfg: LinkCorpusConfig, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Features and truth of the first shard."""
    tables = FUNCTION.simulate(cfg, FUNCTION.plan(cfg, seed)[0])
    features, truth = ({name: column_array(table[name]) for name in table.column_names} for table in tables)
    return features, truth


def users(cfg: LinkCorpusConfig, n: int = 12, seed: int = 0) -> simulate._Users:
    tables = link_tables(cfg.allocations_prb, cfg.symbols)
    return simulate._Users(cfg, cfg.sites[0], 3.5, n, np.random.default_rng(seed), tables)


@given(st.integers(1, 400), st.integers(0, 60), st.integers(0, 60), st.floats(0.1, 1.0), st.integers(1, 40))
@settings(max_examples=40)
def test_a_trace_is_in_one_split_and_held_out_sites_and_bands_stay_out(seen, sites, bands, labelled, shard):
    cfg = LinkCorpusConfig(seen_traces=seen, heldout_site_traces=sites, heldout_band_traces=bands, labelled_share=labelled,
                           shard_traces=shard)  # fmt: skip
    shards = simulate.plan_shards(cfg, 1)
    ids = [trace for s in shards for trace in range(s.first_trace, s.first_trace + len(s.codes))]
    assert ids == list(range(len(ids)))
    roles = {site.name: site.role for site in cfg.sites} | {band.ghz: band.role for band in cfg.bands}
    for s in shards:
        assert set(s.codes) <= set("Luvtsb")
        assert (roles[s.site] == "heldout") == (set(s.codes) == {"s"})
        assert (roles[s.band_ghz] == "heldout") == (set(s.codes) == {"b"})
    codes = "".join(s.codes for s in shards if roles[s.site] == "seen" and roles[s.band_ghz] == "train")
    assert len(codes) >= seen
    assert abs(codes.count("t") - 0.3 * len(codes)) <= 1 and abs(codes.count("v") - 0.2 * len(codes)) <= 1
    assert abs(codes.count("L") - 0.5 * labelled * len(codes)) <= 1 and (labelled < 1 or "u" not in codes)
    assert simulate.plan_shards(cfg, 1) == shards != simulate.plan_shards(cfg, 2)


@pytest.mark.parametrize("scenario", ["TDL-C", "UMi", "UMa"])
def test_same_shard_same_bytes_and_the_promised_columns(scenario):
    cfg = config({"scenario": scenario, "indoor_share": 0.5}, trace_slots=128, window_slots=64, seen_traces=3)
    shard = FUNCTION.plan(cfg, 4)[0]
    features, truth = FUNCTION.simulate(cfg, shard)
    again = FUNCTION.simulate(cfg, shard)
    assert features.equals(again[0]) and truth.equals(again[1])
    schema = FUNCTION.schema(cfg)
    assert features.schema.equals(schema.arrow_schema())
    assert features.num_rows == 3 * 2 and truth["bler"].type.shape == [64, 28]
    for column in schema.columns:
        if column.valid_range is not None:
            values = column_array(features[column.name])
            assert column.valid_range[0] <= values.min() and values.max() <= column.valid_range[1], column.name
    bler = column_array(truth["bler"])
    assert (bler >= 0).all() and (bler <= 1).all() and 0.05 < (bler > 0.5).mean() < 0.95
    other = FUNCTION.simulate(cfg, FUNCTION.plan(cfg, 5)[0])
    assert not other[0].equals(features)


def test_fading_follows_the_doppler():
    """TDL-A of 3.5 GHz at one speed: the correlation of the channel over time is the Bessel function of its Doppler."""
    cfg = config({"speed_kmh": [20, 20], **QUIET}, subcarrier_samples=2, trace_slots=512)
    made_of = users(cfg, 60)
    with seeded(3):
        paths, _ = made_of._tdl()
    h = paths.sum(dim=2).numpy().reshape(120, -1)
    doppler_hz = 20 / 3.6 * 3.5e9 / 299792458.0
    for lag in (2, 5, 10, 15):
        found = np.mean(h[:, lag:] * h[:, :-lag].conj()).real / np.mean(np.abs(h) ** 2)
        assert found == pytest.approx(j0(2 * np.pi * doppler_hz * lag * SLOT_US * 1e-6), abs=0.15)


def test_mean_snr_of_a_trace_is_what_was_drawn():
    cfg = config({"snr_db": [8, 30], **QUIET}, step_share=0.0)
    made_of = users(cfg)
    with seeded(1):
        power = made_of._fading()
    np.testing.assert_allclose(power.mean(axis=(1, 2)), 1.0, rtol=1e-5)
    level, step_slot = made_of._level_db()
    np.testing.assert_allclose(level, np.broadcast_to(made_of.snr_db[:, None], level.shape))
    assert (step_slot == -1).all()


def test_interference_comes_in_bursts_of_the_asked_length_and_load():
    cfg = config({"interfered_share": 1.0, "interference_load": [0.3, 0.3], "burst_ms": [5, 5], "inr_db": [6, 6]},
                 trace_slots=4096, window_slots=4096)  # fmt: skip
    rise = users(cfg, 40)._interference_db()
    sending = rise > 0
    assert sending.mean() == pytest.approx(0.3, abs=0.03)
    starts = (sending[:, 1:] & ~sending[:, :-1]).sum()
    assert sending.sum() / starts == pytest.approx(5 / (SLOT_US / 1e3), rel=0.15)
    assert np.median(rise[sending]) == pytest.approx(10 * np.log10(1 + 10**0.6), abs=0.5)


def test_shadowing_is_stationary_and_forgets_with_distance():
    keep = np.full(4000, np.exp(-0.1))
    x = simulate._gauss_markov(keep, 3.0, 30, np.random.default_rng(0))
    assert x.std() == pytest.approx(3.0, rel=0.03)
    assert np.mean(x[:, 10] * x[:, 15]) / 9 == pytest.approx(np.exp(-0.5), abs=0.05)


def test_jumps_stay_within_the_site_s_coverage():
    cfg = config({"snr_db": [10, 24], **QUIET}, step_share=1.0, step_db=[6, 6], trace_slots=512)
    made_of = users(cfg, 60)
    level, step_slot = made_of._level_db()
    assert ((step_slot >= 0.4 * 512) & (step_slot < 0.6 * 512)).all()
    jump = level[:, -1] - level[:, 0]
    np.testing.assert_allclose(np.abs(jump), 6.0)
    assert (level[:, -1] >= 10).all() and {-6, 6} == set(np.round(jump).astype(int))
    at = step_slot + made_of.lead
    rows = np.arange(60)
    np.testing.assert_allclose(level[rows, at] - level[rows, at - 1], jump)


def test_a_report_is_as_old_as_its_delay_and_at_most_a_period_older():
    cfg = config(feedback={"cqi_period_slots": [10], "cqi_delay_slots": [6, 6]}, seen_traces=4)
    features, _ = made(cfg)
    age, cqi = features["cqi_age_slots"].astype(int), features["cqi"].astype(int)
    assert age.min() == 6 and age.max() == 15
    np.testing.assert_array_equal(np.unique(np.diff(age, axis=1)), [-9, 1])
    assert (np.diff(cqi, axis=1)[np.diff(age, axis=1) == 1] == 0).all()


def test_an_honest_receiver_s_cqi_keeps_its_promise():
    """A channel that stands still, no bias, no error: the CQI's own modulation and code rate has a BLER of 0.1 or less, the
    next CQI's has more."""
    exact = {"cqi_bias_db": 0.0, "cqi_error_db": 0.0}
    cfg = config({"speed_kmh": [0, 0], **QUIET}, step_share=0.0, feedback=exact, allocations_prb=[24])
    features, truth = made(cfg)
    bler = truth["bler"][:, 0].astype(float)
    rows, cqi = np.arange(len(bler)), features["cqi"][:, 0].astype(int)
    inside = (cqi >= 2) & (cqi < 15)
    assert inside.sum() > 5
    assert (bler[rows, CQI_TO_MCS[cqi]][inside] <= 0.101).all()
    assert (bler[rows[inside], CQI_TO_MCS[cqi[inside] + 1]] > 0.099).all()


def test_a_bias_makes_a_receiver_claim_more():
    honest, proud = (
        made(config({"speed_kmh": [0, 0], **QUIET}, step_share=0.0, feedback={"cqi_bias_db": bias, "cqi_error_db": 0.0}))[0]["cqi"]
        for bias in (0.0, 6.0)
    )
    assert (honest != proud).any() and np.abs(honest.astype(int) - proud.astype(int)).max() <= 10


def test_logged_feedback_is_what_the_link_answered():
    """HARQ columns are the sent blocks, harq_delay_slots later, over the borders of the windows."""
    cfg = config(trace_slots=256, window_slots=64, seen_traces=4)
    features, truth = made(cfg)
    columns = {name: features[name] for name in ("harq_ack", "harq_mask", "harq_mcs")}
    columns |= {name: truth[name] for name in ("sent_mcs", "sent_ack", "draw")}
    whole = {name: values.reshape(4, 256) for name, values in columns.items()}
    bler = truth["bler"].reshape(4, 256, -1)
    for user, delay in enumerate(features["harq_delay_slots"].reshape(4, 4)[:, 0].astype(int)):
        assert 4 <= delay <= 8
        np.testing.assert_array_equal(whole["harq_mask"][user], (np.arange(256) >= delay).astype(int))
        np.testing.assert_array_equal(whole["harq_mcs"][user, delay:], whole["sent_mcs"][user, :-delay])
        np.testing.assert_array_equal(whole["harq_ack"][user, delay:], whole["sent_ack"][user, :-delay])
    sent = np.take_along_axis(bler, whole["sent_mcs"][..., None].astype(int), axis=-1)[..., 0]
    np.testing.assert_array_equal(whole["sent_ack"], sent <= whole["draw"])


def test_logs_come_from_all_policies_in_their_shares():
    cfg = LinkCorpusConfig()
    tables = link_tables(cfg.allocations_prb, cfg.symbols)
    _, names = simulate.logged_policies(cfg, tables, 4000, np.random.default_rng(0))
    for name in simulate.POLICIES:
        assert np.mean(names == name) == pytest.approx(getattr(cfg.policies, name), abs=0.03)
    only = LinkCorpusConfig(policies={"cqi_table": 1, "illa": 0, "olla": 0, "random": 0})  # type: ignore[arg-type]
    assert set(simulate.logged_policies(only, tables, 50, np.random.default_rng(0))[1]) == {"cqi_table"}


def test_random_policies_try_what_others_would_not(tmp_path):
    cfg = config(policies={"cqi_table": 0, "illa": 0, "olla": 0, "random": 1}, trace_slots=512, window_slots=512)
    features, truth = made(cfg)
    from_cqi = CQI_TO_MCS[features["cqi"]]
    away = truth["sent_mcs"].astype(int) - from_cqi
    assert (away > 2).mean() > 0.1 and (away < -2).mean() > 0.1
    assert {str(name) for name in features["policy"]} == {"random"}


@pytest.mark.parametrize("changes,word", [
    ({"window_slots": 100}, "does not divide"),
    ({"policies": {"cqi_table": 0, "illa": 0, "olla": 0, "random": 0}}, "all policy shares are zero"),
    ({"sites": [{"name": "a", "scenario": "TDL-A", "speed_kmh": [5, 3]}]}, "speed_kmh falls"),
    ({"sites": [{"name": "a", "scenario": "CDL-A", "speed_kmh": [3, 5]}]}, "TDL-A"),
    ({"sites": [{"name": "a", "scenario": "UMi", "speed_kmh": [3, 5], "role": "heldout"}]}, "at least one seen site"),
    ({"colour": 3}, "unknown key 'colour'"),
    ({"policies": {"learned": 0.5}}, "name its learned_bundle"),
    ({"split_shares": [0.5, 0.2, 0.2]}, "are not shares of one"),
])  # fmt: skip
def test_a_wrong_setting_is_one_sentence(changes, word):
    with pytest.raises(RankdError, match=word):
        FUNCTION.corpus_config(changes)


def test_traces_of_a_corpus_are_whole():
    cfg = config(trace_slots=256, window_slots=64, seen_traces=5)
    features, truth = made(cfg)
    traces, rows = traces_of(features, truth)
    assert traces.bler_NTM.shape == (5, 256, 28) and len(rows) == 5
    assert isinstance(FUNCTION.delivered_labels(pa.table({"sample_id": truth["sample_id"], **{
        name: pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(truth[name])) for name in ("sent_mcs", "sent_ack")
    }})), pa.Table)  # fmt: skip
