"""Channel prediction at smoke scale through every step: groups of two shapes, a self-labelled corpus, an online teacher."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.table import read_table
from rankd_pipeline.ran_functions.channel_prediction.patches import visible_patches, wanted_patches
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import settings
from rankd_pipeline.spec import Ablation, load_pipeline, validated
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.grid import grid
from rankd_pipeline.steps.runner import open_store, run_step
from rankd_pipeline.steps.summary import reached, summarise, tables_of
from rankd_pipeline.steps.watch import report_drift, take_telemetry
from rankd_pipeline.store.tensors import read_columns
from rankd_pipeline.telemetry.contract import Unusable, read_file, table_of, telemetry_schema
from rankd_pipeline.telemetry.field import Play, play
from rankd_pipeline.telemetry.rows import columns_of_files
from rankd_pipeline.telemetry.windows import HOUR_S
from rankd_pipeline_tests.steps.field_site import spec_with_site

pytestmark = pytest.mark.xdist_group("channel_chain")


@pytest.fixture(scope="module")
def made(template_home, tmp_path_factory):
    """(settings, spec, artifacts) of a finished smoke chain, run in this process."""
    home = tmp_path_factory.mktemp("channel-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKD_HOME", str(home))
        current = settings()
        store, spec = open_store(current), load_pipeline("channel_prediction").at("smoke")
        for step in STEPS:
            run_step(step, spec, store, current)
        yield current, spec, reached(spec, store)


def test_every_step_is_made_and_what_does_not_apply_says_why(made):
    _, _, artifacts = made
    assert list(artifacts) == list(STEPS)
    skipped = {name: artifact.skipped for name, artifact in artifacts.items() if artifact.skipped}
    assert set(skipped) == {"oracle_labels", "ssl_weights", "soft_labels"}
    assert "part of itself" in skipped["oracle_labels"] and "beside the student" in skipped["soft_labels"]
    for artifact in artifacts.values():
        artifact.verify()


def test_the_audit_accepts_groups_of_different_shape(made):
    audit = json.loads((made[2]["audit_report"].path / "audit.json").read_text())
    assert audit["verdict"] == "pass", [item for item in audit["findings"] if item["severity"] == "fail"]


def test_the_score_is_in_db_and_better_than_saying_nothing(made):
    _, spec, artifacts = made
    card = summarise(spec, artifacts).scorecard
    assert card["metric"] == {"name": "nmse", "unit": "dB", "higher_is_better": False}
    for part in ("teacher", "student"):
        assert -20.1 < card[part]["score"] < -0.2
    assert card["teacher"]["baseline"]["name"] in ("hold", "ar", "wiener")
    assert {"hold", "ar", "ar_cleaned", "wiener", "lstm"} <= set(artifacts["calibration_scorecard"].metrics["rivals"])
    assert abs(card["quantized"]["drop"]) < 0.2


def test_the_deployed_file_answers_its_shape_and_all_models_are_held_against_it_on_the_same_rows(made):
    table = read_table(made[2]["deployment"].path / "evaluation.parquet")
    rows = table[(table["metric"] == "nmse") & (table["split"] == "test")]
    by_model = rows.groupby("model", observed=True)["unit"].apply(lambda units: tuple(sorted(units)))
    assert len(set(by_model)) == 1 and set(by_model.index) == {"shipped", "hold", "ar", "ar_cleaned", "wiener"}
    sets = {cell.split("|")[0] for cell in rows["cell"].astype(str)}
    assert sets == {"set=D3-s", "set=D8-s"}  # D15-s has another grid


def test_the_distilled_arm_says_when_it_asked_its_teacher(made):
    comparison = json.loads((made[2]["student"].path / "student" / "comparison.json").read_text())
    jobs = {(job["arm"], job["seed"]): job for job in comparison["paired"]}
    rows = made[2]["corpus"].metrics["samples_by_split"]["train"]
    for (arm, _), job in jobs.items():
        record = job["distillation"]
        if arm == "scratch":
            assert record is None
            continue
        phases = [turn["phase"] for turn in record["phases"]]
        assert len(phases) == len(job["history"]) and phases[0] == "AL" and "PL" in phases
        assert record["teacher_passes"] == 3 * rows * phases.count("PL")
        assert {name: len(set(slots)) for name, slots in record["selection"].items()} == {
            "embedding": 16, "encoder": 16, "decoder": 16}  # fmt: skip


def test_latency_is_held_against_the_coherence_time_of_each_set(made):
    _, spec, artifacts = made
    metrics = artifacts["latency_profile"].metrics
    deadlines = {item["name"]: item for item in metrics["deadlines"]}
    assert set(deadlines) == {item["name"] for item in spec.steps.corpus.simulation["sets"]}
    assert deadlines["D19-s"]["deadline_us"] == pytest.approx(1e6 * 0.423 / (100 / 3.6 * 28e9 / 299792458), rel=1e-6)
    for item in deadlines.values():
        assert item["late"] == (metrics["p999_us"] > item["deadline_us"])
    shown = tables_of(artifacts)
    assert any("in time" in title for title in shown)


def test_intervals_cover_what_they_promise_on_seen_sets(made):
    table = read_table(made[2]["calibration_scorecard"].path / "evaluation.parquet")
    rows = table[(table["metric"] == "covered") & (table["model"] == "teacher") & (table["split"] == "test")]
    assert np.mean(rows["value"]) == pytest.approx(0.9, abs=0.05)


def test_the_report_has_the_pictures_that_the_function_draws(made):
    names = {path.stem for step in ("calibration_scorecard", "student") for path in (made[2][step].path / "figures").glob("*.png")}
    assert {"channel_true_and_predicted", "nmse_over_horizon", "nmse_over_speed", "attention_maps", "selected_dimensions",
            "phases", "nmse_by_set", "nmse_by_task", "nmse_by_speed"} <= names  # fmt: skip
    for step in ("calibration_scorecard", "student"):
        for path in (made[2][step].path / "figures").glob("*.png"):
            assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000


def test_a_grid_is_refused_before_it_trains_if_its_tables_name_what_nobody_judged(made):
    current, spec, _ = made
    told = []
    wrong = spec.model_copy(update={"ablation": spec.ablation.model_copy(update={"tables": {"I": ("mcakd", "transformer")}})})
    with pytest.raises(RankdError, match="ablation.tables.I: 'transformer' is neither an arm nor a model of the scorecard"):
        grid(wrong, open_store(current), current, told.append)
    assert not any("validation score" in text for text in told)


def test_the_tables_of_the_yaml_name_arms_and_models_that_the_scorecard_judges(made):
    _, spec, artifacts = made
    judged = set(read_table(artifacts["calibration_scorecard"].file("evaluation.parquet"))["model"].astype(str))
    for names in spec.ablation.tables.values():
        assert set(names) <= set(spec.ablation.arms) | judged
    larger = load_pipeline("channel_prediction").at("laptop")
    more = judged | set(larger.steps.calibration_scorecard.learned_baselines)
    for names in larger.ablation.tables.values():
        assert set(names) <= set(larger.ablation.arms) | more


def test_a_grid_that_was_stopped_goes_on_and_writes_the_papers_tables(made):
    current, spec, _ = made
    arms = {name: spec.ablation.arms[name] for name in ("mcakd", "no_kd", "lmkd", "without_alpl", "version_3")}
    tables = {"I: accuracy": ("mcakd", "no_kd", "lmkd", "teacher", "lstm", "ar"), "III: size": ("teacher", "mcakd", "version_3")}
    columns = {name: spec.ablation.columns[name] for name in ("seen time", "D19-s frequency")}
    brief = spec.steps.student.model_copy(update={"fit": {**spec.steps.student.fit, "epochs": 3}})
    small = spec.model_copy(
        update={
            "ablation": spec.ablation.model_copy(update={"arms": arms, "tables": tables, "columns": columns}),
            "steps": spec.steps.model_copy(update={"student": brief}),
        }
    )
    store, told = open_store(current), []

    def stop(text: str) -> None:
        told.append(text)
        if " 3 of 10" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid(small, store, current, stop)
    weights = sorted((current.home / "store").rglob("ablate_grid/**/students/*.safetensors"))
    before = {path.name: path.stat().st_mtime_ns for path in weights}
    assert len(before) >= 3
    told.clear()
    found = grid(small, store, current, told.append)
    assert sum("validation score" in text for text in told) == 10
    assert [table["title"].split(":")[0] for table in found["tables"]][:2] == ["I", "III"]
    assert [row["model"] for row in found["tables"][0]["rows"]] == list(tables["I: accuracy"])
    assert list(found["tables"][0]["rows"][0]) == ["model", *small.ablation.columns]  # in the order of the YAML
    lead, costs = found["tables"][2], found["tables"][3]
    assert {row["arm"] for row in lead["rows"]} == set(arms) - {"mcakd"} and "paired" in lead["title"]
    passes = {row["model"]: row["teacher passes"] for row in costs["rows"]}
    assert passes["no_kd"] == "–" and 0 < passes["mcakd"] < passes["without_alpl"]
    sizes = {row["model"]: row["parameters"] for row in costs["rows"]}
    assert sizes["teacher"] > sizes["mcakd"] > sizes["version_3"]
    table = read_table(Path(found["path"]) / "evaluation.parquet")
    assert {f"{name}#{seed}" for name in arms for seed in (0, 1)} <= set(table["model"].astype(str))
    told.clear()
    assert grid(small, store, current, told.append) == found
    assert not any("validation score" in text for text in told)  # stored: nothing is trained again


def test_a_grid_names_an_arm_that_is_not_there(made):
    current, spec, _ = made
    with pytest.raises(RankdError, match="names no arms"):
        grid(spec.model_copy(update={"ablation": Ablation()}), open_store(current), current, lambda text: None)
    with pytest.raises(RankdError, match="reference 'nobody' is not one of the arms"):
        validated(Ablation, {"arms": {"a": {}}, "reference": "nobody"}, "here")


def test_the_field_is_played_and_faster_users_are_told(made):
    """The bundle of the chain on new channels of its set: whole telemetry, and a change of speed is the Doppler's."""
    current, spec, artifacts = made
    small = spec.model_copy(
        update={
            "steps": spec.steps.model_copy(
                update={
                    "telemetry": spec.steps.telemetry.model_copy(update={"min_rows": 150}),
                    "drift_report": spec.steps.drift_report.model_copy(update={"reference_windows": 2, "min_labelled": 20}),
                }
            )
        }
    )
    function, store, steps = load_function(spec.function), open_store(current), small.steps
    budget_us, folder = steps.latency_profile.budget_us, current.telemetry_dir(spec.pipeline)
    start_s = (time.time() // HOUR_S - 24) * HOUR_S
    for hour, shifts in enumerate((frozenset(), frozenset(), frozenset({"speed_60"}))):
        wanted = Play(artifacts["deployment"].file("bundle"), shifts, 1, 150, 0.4, 3, start_s + hour * HOUR_S)
        play(function, steps.corpus.simulation, budget_us, wanted, folder, workers=1)
    cfg = function.corpus_config(steps.corpus.simulation)
    rows, left_out = read_file(sorted(folder.glob("*.parquet"))[0], telemetry_schema(function, cfg, budget_us))
    assert left_out == 0 and len(rows["time_s"]) == 150 and rows["output"].shape == (150, 2, 8, 128)
    labelled, hidden = rows["has_label"], wanted_patches(rows["grid"][0], "time")
    assert 20 < labelled.sum() < 150 and np.abs(rows["label"][labelled]).mean() > 0.1 and not rows["label"][~labelled].any()
    assert not rows["csi"][:, hidden].any() and not rows["csi_mask"][:, hidden].any(), "it holds what the model was given"
    seen = visible_patches(rows["grid"][0], "time")
    assert np.abs(rows["csi"][:, seen]).mean() > 0.1 and rows["csi_mask"][:, seen].all()
    assert set(rows["task"]) == {"time"} and set(rows["site"]) == {"D3-s"}
    take_telemetry(small, store, current)
    report = report_drift(small, store, current)
    windows = json.loads(report.file("drift.json").read_text())["windows"]
    assert [window["state"] for window in windows] == ["reference", "reference", "judged"]
    assert windows[-1]["causes"][0]["cause"] == "doppler", windows[-1]["why"]
    assert windows[-1]["quality"]["score"] < windows[0]["quality"]["score"] - 3.0  # dB, with the sign of a score
    assert windows[0]["quality"]["baseline"] > 1.0, "the classical method was fitted on whole samples"


def test_labelled_rows_of_the_field_join_the_group_of_their_shape_as_whole_samples(made):
    current, spec, artifacts = made
    function, store = load_function(spec.function), open_store(current)
    again = spec_with_site(current, spec, artifacts, 150, 0.4)
    assert again.site is not None
    telemetry = store.get(spec.pipeline, "telemetry", again.site.telemetry)
    corpus = run_step("corpus", again, store, current)
    features = read_columns(corpus.file("features"), ["group", "grid", "site", "source", "labelled", "csi", "csi_mask", "task"])
    field = features["source"].astype(str) == "telemetry"
    told = corpus.metrics["site"]
    assert field.sum() == told["labelled"] > 0 and features["labelled"].all()
    assert told["rows"] == 150 > field.sum() + told["held_back"]
    for group in np.unique(features["group"].astype(str)):
        grids = np.unique(features["grid"][features["group"].astype(str) == group], axis=0)
        assert ["x".join(map(str, grid)) for grid in grids.tolist()] == [group], "a batch is of one group, so of one shape"
    assert features["csi_mask"][field].all() and told["silent"] == []
    delivered = columns_of_files(
        telemetry, telemetry_schema(function, function.corpus_config(spec.steps.corpus.simulation), 1000.0), again.site.windows
    )
    labels = {label.tobytes() for label in delivered["label"][delivered["has_label"]]}
    joined = function.own_labels({name: values[field] for name, values in features.items()})
    assert {label.tobytes() for label in joined} <= labels
    second = {step: run_step(step, again, store, current) for step in STEPS}
    assert second["teacher"].metrics["labelled_samples"] >= corpus.metrics["samples_by_split"]["train"]


def test_what_no_row_can_be_learned_from_is_one_sentence(made):
    """Without labels nothing of a self-labelled function's telemetry is a whole sample."""
    current, spec, artifacts = made
    again = spec_with_site(current, spec, artifacts, 150, 0.0, hours_ago=6)
    with pytest.raises(RankdError, match="none of the 150 telemetry rows .* deliver more labels"):
        run_step("corpus", again, open_store(current), current)


def test_telemetry_of_another_grid_or_label_is_set_aside_with_the_reason(made, tmp_path):
    current, spec, artifacts = made
    spec_with_site(current, spec, artifacts, 150, 0.4, hours_ago=3)
    function = load_function(spec.function)
    schema = telemetry_schema(function, function.corpus_config(spec.steps.corpus.simulation), 1000.0)
    columns, _ = read_file(sorted(current.telemetry_dir(spec.pipeline).glob("*.parquet"))[0], schema)
    for change, why in (
        (
            {"grid": columns["grid"] * 4},
            "row 1: columns 'grid' and 'task': the deployed model answers 2x2x4 patches and 'time' only",
        ),
        ({"task": np.full(len(columns["task"]), "frequency", dtype=object)}, "row 1: columns 'grid' and 'task'"),
        ({"label": columns["label"][:, :4]}, r"column 'label': shape \(4, 128\), expected \(8, 128\)"),
        ({"grid": None}, "column 'grid' is missing"),
    ):
        table = table_of({name: values for name, values in {**columns, **change}.items() if values is not None}, schema)
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(Unusable, match=why):
            read_file(tmp_path / "a.parquet", schema)
