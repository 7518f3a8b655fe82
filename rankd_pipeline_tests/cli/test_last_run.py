"""Which run `rankd report` speaks of: the last one that has ended, however it ended."""

import json
from pathlib import Path

import dagster as dg
import pytest

from rankd_pipeline.cli.reports import last_recipes, summary_of
from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.liveness import PROCESS_TAG, process_tag
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.runner import open_store
from rankd_pipeline_tests.orchestration.planted import plant

CONFIG = load_pipeline("beam_management")


def begin(current: Settings, run_id: str, tags: dict[str, str]) -> None:
    """Dagster's record of a run that has started and has not told its end."""
    with dg.DagsterInstance.from_config(str(current.dagster_home)) as instance:
        instance.add_run(dg.DagsterRun("beam_management", run_id=run_id, status=dg.DagsterRunStatus.STARTED, tags=tags))


def test_a_run_under_way_is_not_yet_reported_and_a_killed_one_is(home: Settings) -> None:
    store = open_store(home)
    first = plant(CONFIG.at("smoke", seed=1), home, upto="corpus")
    store.note_use(first["corpus"], "11111111-0000-4000-8000-000000000000")
    now = plant(CONFIG.at("smoke"), home, upto="audit_report")
    running, killed = "22222222-0000-4000-8000-000000000000", "33333333-0000-4000-8000-000000000000"
    store.note_use(now["corpus"], running)
    begin(home, running, process_tag())
    assert last_recipes("beam_management", None, store, home) == {"corpus": first["corpus"].recipe}
    for artifact in now.values():
        store.note_use(artifact, killed)
    begin(home, killed, {PROCESS_TAG: json.dumps({**json.loads(process_tag()[PROCESS_TAG]), "pid": 2**22 - 1})})
    assert last_recipes("beam_management", None, store, home) == {step: item.recipe for step, item in now.items()}
    card = summary_of(CONFIG, last_recipes("beam_management", "smoke", store, home), home).scorecard
    assert card["seconds"]["audit_report"] == 1.5 and card["seconds"]["teacher"] is None and card["teacher"] is None


def test_a_run_of_one_step_is_reported_with_what_it_was_made_from(home: Settings) -> None:
    store = open_store(home)
    made = plant(CONFIG.at("smoke"), home, upto="teacher")
    store.note_use(made["teacher"], "44444444-0000-4000-8000-000000000000")
    assert set(last_recipes("beam_management", None, store, home)) == {
        "corpus",
        "audit_report",
        "ssl_weights",
        "oracle_labels",
        "teacher",
    }


def test_a_run_whose_artifacts_are_gone_is_one_sentence(home: Settings, tmp_path: Path) -> None:
    store = open_store(home)
    made = plant(CONFIG.at("smoke"), home, upto="corpus")
    store.note_use(made["corpus"], "55555555-0000-4000-8000-000000000000")
    store.remove(made["corpus"])
    with pytest.raises(RankdError, match=r"no longer in .*store; run `rankd run beam_management` again"):
        summary_of(CONFIG, last_recipes("beam_management", None, store, home), home)
