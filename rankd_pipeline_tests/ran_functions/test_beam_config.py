"""The corpus settings: defaults as the docs say, and every contradiction refused in one sentence."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.beam_management.config import BeamCorpusConfig
from rankd_pipeline.spec import validated

SITE = {"scenario": "UMi", "isd_m": 200, "bs_height_m": 10, "indoor_share": 0.2, "speed_kmh": [0, 3]}
BAND = {"ghz": 3.5, "eirp_dbm": 70}


def test_defaults_are_what_the_study_says():
    cfg = BeamCorpusConfig()
    assert (cfg.array.rows, cfg.array.cols, cfg.n_set_a, cfg.n_set_b, cfg.beams_in_report) == (4, 16, 64, 16, 16)
    assert {b.ghz: b.role for b in cfg.bands} == {3.5: "train", 28.0: "train", 10.0: "heldout"}
    assert sum(s.role == "seen" for s in cfg.sites) >= 8 and any(s.role == "heldout" for s in cfg.sites)
    assert {s.scenario for s in cfg.sites if s.role == "heldout"} == {"UMi", "UMa"}
    for what in ("isd_m", "bs_height_m", "indoor_share", "speed_kmh"):
        assert len({getattr(s, what) for s in cfg.sites}) > 2
    # Held out means a new site, not a new kind of world: each number lies within those of the seen sites.
    for site in (s for s in cfg.sites if s.role == "heldout"):
        for what in ("isd_m", "bs_height_m", "indoor_share", "downtilt_deg"):
            seen = [getattr(s, what) for s in cfg.sites if s.role == "seen" and s.scenario == site.scenario]
            assert min(seen) <= getattr(site, what) <= max(seen), (site.name, what)


@given(st.none() | st.integers(1, 40), st.sampled_from([(2, 4), (1, 8), (4, 16)]))
def test_beams_in_a_report_never_exceed_set_b(reported, set_b):
    cfg = BeamCorpusConfig(reported_beams=reported, set_b={"rows": set_b[0], "cols": set_b[1]})
    assert cfg.beams_in_report == min(reported or cfg.n_set_b, cfg.n_set_b)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"set_b": {"rows": 3, "cols": 8}}, "set_b 3x8 must divide the array 4x16"),
        ({"arrays": {}}, "unknown key 'arrays'"),
        ({"array": {"row": 4}}, "unknown key 'array.row'"),
        ({"sites": [SITE | {"name": "a", "isd": 100}]}, "unknown key 'sites.0.isd'"),
        ({"array": {"rows": "four"}}, "'array.rows'.*found 'four'"),
        ({"labelled_share": 0}, "'labelled_share'.*greater than 0"),
        ({"split_shares": [0.7, 0.2, 0.2]}, "three shares that add up to 1"),
        ({"split_shares": [1.2, -0.1, -0.1]}, "three shares that add up to 1"),
        ({"bands": [BAND, BAND]}, "every band needs a name of its own"),
        ({"sites": [SITE | {"name": "a"}, SITE | {"name": "a"}]}, "every site needs a name of its own"),
        ({"bands": [BAND | {"role": "heldout"}]}, "at least one site must be seen and one band must have role train"),
        ({"sites": [SITE | {"name": "a"}]}, "heldout_site_samples is set but no site has role heldout"),
        ({"bands": [BAND]}, "heldout_band_samples is set but no band has role heldout"),
        ({"bands": [BAND | {"ghz": 3500}]}, "'bands.0.ghz'.*less than or equal to 100"),
        ({"sites": [SITE | {"name": "a", "scenario": "RMa"}]}, "'sites.0.scenario'.*'UMi' or 'UMa'"),
        ({"history": 16, "ssb_period_ms": 40}, "user would move 10.0 m within history"),
        ({"reported_beams": 0}, "'reported_beams'.*greater than or equal to 1"),
        ({"seen_samples": "many"}, "'seen_samples'.*found 'many'"),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_names_it(raw, said):
    with pytest.raises(RankdError) as refused:
        validated(BeamCorpusConfig, raw, "steps.corpus.simulation")
    message = str(refused.value)
    assert re.search(said, message), message
    assert message.startswith("steps.corpus.simulation") and "\n" not in message


@given(st.integers(1, 16), st.floats(0, 200), st.floats(1, 160))
@settings(max_examples=60)
def test_nobody_moves_further_within_a_sample_than_rays_may_stay(history, speed_kmh, period_ms):
    way_m = speed_kmh / 3.6 * (history - 1) * period_ms * 1e-3
    raw = {
        "sites": [SITE | {"name": "a", "speed_kmh": [0, speed_kmh]}], "bands": [BAND], "history": history,
        "ssb_period_ms": period_ms, "heldout_site_samples": 0, "heldout_band_samples": 0,
    }  # fmt: skip
    if way_m > 5.0:
        with pytest.raises(RankdError, match="lower history, ssb_period_ms or speed_kmh"):
            validated(BeamCorpusConfig, raw, "here")
    else:
        assert validated(BeamCorpusConfig, raw, "here").history == history
