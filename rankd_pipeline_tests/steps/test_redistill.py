"""A whole turn of the loop in this process, at smoke size: champion, field, drift, re-distillation, shadow run, decision."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from rankd_pipeline.cli import rankd
from rankd_pipeline.distillation.heads import outputs_of
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.runtime.bundle import verify_bundle
from rankd_pipeline.settings import Settings, settings
from rankd_pipeline.spec import DriftSensor, PipelineSpec, Sensors, SiteData, load_pipeline
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.data import as_trained, features_of, split_is, training_columns
from rankd_pipeline.steps.promotion import challenge
from rankd_pipeline.steps.runner import open_store, resolve, run_step
from rankd_pipeline.steps.site_data import roles_for
from rankd_pipeline.steps.triggers import drift_tick, recent_site
from rankd_pipeline.steps.watch import report_drift, take_telemetry
from rankd_pipeline.store.artifact import Artifact, Store
from rankd_pipeline.store.ledger import open_ledger
from rankd_pipeline.store.lineage import lineage_of, models_of_site
from rankd_pipeline.store.tensors import read_columns, rows_of
from rankd_pipeline.telemetry.contract import telemetry_schema
from rankd_pipeline.telemetry.field import Play, play
from rankd_pipeline.telemetry.rows import columns_of_files
from rankd_pipeline.telemetry.windows import HOUR_S
from rankd_pipeline.training.weights import load_weights
from rankd_pipeline_tests.telemetry.made import START_S

PIPELINE = "beam_management"
CONFIG = load_pipeline(PIPELINE)
SPEC = CONFIG.at("smoke")
BROKEN = 7
"""The beam that the field's `broken_beam` silences."""


@dataclasses.dataclass
class Loop:
    """A home in which the loop has turned once."""

    home: Settings
    store: Store
    first: dict[str, Artifact]
    report: Artifact
    site: SiteData
    spec: PipelineSpec
    second: dict[str, Artifact]
    shadow: Artifact

    def __post_init__(self) -> None:
        self.ledger = open_ledger(self.home, PIPELINE)


def field(home: Settings, hour: int, hours: int, *shifts: str) -> None:
    bundle = open_ledger(home, PIPELINE).bundle
    assert bundle is not None
    wanted = Play(bundle, frozenset(shifts), hours, 1000, 0.3, 0, START_S + hour * HOUR_S)
    play(load_function(PIPELINE), SPEC.steps.corpus.simulation, 100.0, wanted, home.telemetry_dir(PIPELINE), workers=1)


@pytest.fixture(scope="module")
def loop(smoke_chain: Settings, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    folder = tmp_path_factory.mktemp("loop") / "home"
    shutil.copytree(smoke_chain.home, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKD_HOME", str(folder))
        patch.setenv("RANKD_WORKERS", "1")
        home = settings()
    store, ledger = open_store(home), open_ledger(home, PIPELINE)
    first = {step: run_step(step, SPEC, store, home) for step in STEPS}
    # What is made at smoke scale never serves by itself: here a person lets it.
    ledger.decide(ledger.entries()[0], "champion", "for a test", verify_bundle)
    field(home, 0, 5)
    field(home, 5, 2, "broken_beam")
    take_telemetry(SPEC, store, home)
    report = report_drift(SPEC, store, home)
    site = recent_site(CONFIG, store, home)
    assert isinstance(site, SiteData), site
    again = CONFIG.at("smoke", site=site)
    second = {step: run_step(step, again, store, home) for step in STEPS}
    shadow, _ = challenge(again, store, home, "run-2")
    return Loop(home, store, first, report, site, again, second, shadow)


def test_the_drift_was_named_and_its_windows_are_what_is_learned_from(loop: Loop) -> None:
    assert loop.report.metrics["cause"] == "broken_element" and loop.report.metrics["action"] == "redistill"
    assert list(loop.site.windows) == [(START_S + hour * HOUR_S, START_S + (hour + 1) * HOUR_S) for hour in (5, 6)]
    assert loop.site.start == loop.first["deployment"].recipe
    assert "labelled rows since it began; 2000 are needed" in drift_tick(CONFIG, loop.store, loop.home, None, None, [], 0.0).why
    fewer = CONFIG.model_copy(update={"sensors": Sensors(drift=DriftSensor(min_labelled=400))})
    tick = drift_tick(fewer, loop.store, loop.home, None, None, [], 0.0)
    assert tick.start and tick.site == loop.site


def test_telemetry_joins_the_corpus_as_site_data(loop: Loop) -> None:
    base, corpus = loop.first["corpus"], loop.second["corpus"]
    site = corpus.metrics["site"]
    assert corpus.metrics["sources"] == {"sionna": base.metrics["samples"], "telemetry": site["rows"] - site["held_back"]}
    for split in ("test", "heldout_site", "heldout_band"):
        assert corpus.metrics["samples_by_split"][split] == base.metrics["samples_by_split"][split], "judged as before"
    features = read_columns(corpus.file("features"), ["sample_id", "drop_id", "source", "split", "labelled"])
    assert len(np.unique(features["sample_id"])) == len(features["sample_id"])
    mine = features["source"] == "telemetry"
    assert set(features["split"][mine]) == {"train", "val"}
    units = {split: set(features["drop_id"][mine & (features["split"] == split)]) for split in ("train", "val")}
    assert not units["train"] & units["val"] and not units["train"] & set(features["drop_id"][~mine])
    labels = read_columns(corpus.file("labels"), ["sample_id"])["sample_id"]
    assert int(np.isin(labels, features["sample_id"][mine]).sum()) == site["labelled"] > 0
    linked = next(iter(base.file("features").glob("*.parquet")))
    assert (corpus.file("features") / linked.name).stat().st_ino == linked.stat().st_ino, "the general corpus is not copied"


def test_a_dead_beam_is_hidden_in_half_of_the_general_training_rows(loop: Loop) -> None:
    corpus, function = loop.second["corpus"], load_function(PIPELINE)
    assert corpus.metrics["site"]["silent"] == [{"column": "l1_rsrp_dbm", "mask": "l1_rsrp_mask", "elements": [BROKEN]}]
    ids, seen = training_columns(function, corpus, loop.second["oracle_labels"])
    base = features_of(loop.first["corpus"], function.feature_columns, split_is("train"))
    assert as_trained(loop.first["corpus"], base) is base, "without a fault nothing is touched"
    rows = np.flatnonzero(ids < corpus.metrics["site"]["first_id"])
    assert (ids[rows] == base["sample_id"]).all()
    odd, others = ids[rows] % 2 == 1, np.arange(16) != BROKEN
    assert base["l1_rsrp_mask"][odd][..., BROKEN].mean() > 0.2
    for name in function.feature_columns:
        assert not seen[name][rows][odd][..., BROKEN].any()
        assert (seen[name][rows][~odd] == base[name][~odd]).all() and (
            seen[name][rows][..., others] == base[name][..., others]
        ).all()
    soft = read_columns(loop.second["soft_labels"].file("soft_labels"), ["sample_id", "teacher"])
    teacher = function.teacher(function.corpus_config(SPEC.steps.corpus.simulation), SPEC.steps.teacher.network)
    load_weights(teacher, loop.second["teacher"].file("weights.safetensors"))
    hidden = ids[rows][odd & (base["l1_rsrp_mask"][..., BROKEN].ravel() > 0)]
    judged = outputs_of(
        teacher.eval(), {name: seen[name][np.isin(ids, hidden)][: len(hidden)] for name in function.feature_columns}
    )
    told = soft["teacher"][rows_of(soft["sample_id"], hidden)].astype(np.float32)
    calibration = loop.second["calibration_scorecard"].metrics["calibration_parameters"]
    assert np.allclose(told, function.head().stored(judged, calibration).astype(np.float32), atol=0.02), "the teacher saw the same"


def test_sessions_that_judge_trained_nothing(loop: Loop) -> None:
    function = load_function(PIPELINE)
    schema = telemetry_schema(function, function.corpus_config(loop.spec.steps.corpus.simulation), 100.0)
    telemetry = loop.store.get(PIPELINE, "telemetry", loop.site.telemetry)
    assert telemetry is not None
    columns = columns_of_files(telemetry, schema, loop.site.windows)
    role = roles_for(loop.spec, columns)
    held_back = {(time, float(report.sum())) for time, report in zip(columns["time_s"][role == "judge"],
                 columns["l1_rsrp_dbm"][role == "judge"], strict=True)}  # fmt: skip
    assert loop.shadow.metrics["held_back"] == int((role == "judge").sum()) > 50
    seen = read_columns(loop.second["corpus"].file("features"), ["time_s", "l1_rsrp_dbm", "source"])
    mine = seen["source"] == "telemetry"
    learned = {(time, float(report.sum())) for time, report in zip(seen["time_s"][mine], seen["l1_rsrp_dbm"][mine], strict=True)}
    assert learned and not learned & held_back


def test_it_goes_on_from_the_last_weights_and_makes_nothing_again_that_did_not_change(loop: Loop) -> None:
    assert loop.second["ssl_weights"].skipped == "the teacher goes on from its last weights"
    inputs = {step: loop.second[step].manifest["inputs"] for step in ("corpus", "teacher", "student")}
    assert inputs["corpus"]["base_corpus"]["recipe"] == loop.first["corpus"].recipe
    assert inputs["teacher"]["last_teacher"]["recipe"] == loop.first["teacher"].recipe
    assert inputs["student"]["last_student"]["recipe"] == loop.first["student"].recipe
    assert len(list(loop.store.artifacts(PIPELINE, "corpus"))) == 2
    for step in STEPS:
        assert run_step(step, loop.spec, loop.store, loop.home).cached
    assert resolve("deployment", SPEC, loop.store) is not None, "the plain chain is still there"


def test_a_trial_is_compared_and_refused(loop: Loop) -> None:
    entries = loop.ledger.entries()
    decided = entries[-1]
    assert decided.version == 2 and decided.event == "refused" and decided.reason.startswith("smoke scale: a trial")
    assert loop.shadow.metrics["reason"] in decided.reason
    artifact, again = challenge(loop.spec, loop.store, loop.home, "run-3")
    assert artifact.cached and again == decided and loop.ledger.entries() == entries
    metrics = loop.shadow.metrics
    assert set(metrics["recent"]) == {"challenger", "champion", "classical"} and metrics["failed"] == 0
    assert metrics["sessions"] >= 20 and metrics["general_ci95"][0] < metrics["general_gain"] < metrics["general_ci95"][1]
    assert json.loads(loop.shadow.file("decision.json").read_text())["bound"] == metrics["bound"]


def test_the_bundle_leads_back_to_the_telemetry_and_to_both_generations(loop: Loop) -> None:
    found = lineage_of(loop.second["deployment"].file("bundle"), loop.store)
    assert found.intact, found.problems
    steps = [item.step for item in found.made.values()]
    assert steps.count("corpus") == 2 and steps.count("teacher") == 2 and "telemetry" in steps
    assert set(found.sites) == set(loop.second["corpus"].metrics["sites"])
    (rows,) = found.field
    assert rows.telemetry == loop.site.telemetry and rows.windows == loop.site.windows
    assert rows.sites == loop.second["corpus"].metrics["site"]["sites"]


def test_which_models_a_site_s_data_touched(loop: Loop) -> None:
    touched = models_of_site(loop.store, "market_square")
    by_recipe = {item.recipe: item for item in touched}
    plain, again = (by_recipe[made["deployment"].recipe] for made in (loop.first, loop.second))
    assert plain.general_rows == again.general_rows == loop.first["corpus"].metrics["sites"]["market_square"]
    assert plain.field == () and again.field[0].windows == loop.site.windows
    assert models_of_site(loop.store, "nowhere") == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKD_HOME", str(loop.home.home))
        result = CliRunner().invoke(rankd, ["lineage", "--site", "market_square"], catch_exceptions=False)
        unknown = CliRunner().invoke(rankd, ["lineage", "--site", "nowhere"], catch_exceptions=False)
    assert "v1 (serves now)" in result.output and "v2 (never served)" in result.output and "of telemetry" in result.output
    assert result.output.rstrip().endswith("2 model(s) were touched by data of market_square.")
    assert unknown.output.startswith("0 model(s) were touched by data of nowhere.\nSites that models of this store have seen: ")
    assert "market_square" in unknown.output
