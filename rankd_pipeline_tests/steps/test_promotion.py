"""Who serves after a re-distillation: planted deployments and shadow runs, the real ledger; also when a decision is cut short."""

from typing import Any

import pytest

from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineSpec, SiteData, load_pipeline
from rankd_pipeline.steps.promotion import challenge, promote
from rankd_pipeline.steps.runner import open_store, resolve
from rankd_pipeline.store.artifact import Artifact, Recipe
from rankd_pipeline.store.ledger import Ledger, open_ledger
from rankd_pipeline_tests.orchestration.planted import plant, plant_redistilled, plant_shadow_run

PIPELINE = "beam_management"
CONFIG = load_pipeline(PIPELINE)
WINDOWS = ((0.0, 3600.0),)


def served(home: Settings) -> Artifact:
    """Version 1 serves."""
    artifact = plant(CONFIG.at(), home)["deployment"]
    promote(CONFIG.at(), artifact, open_store(home), home, "run-1")
    return artifact


def redistilled(home: Settings, number: int = 0) -> PipelineSpec:
    """A planted re-distillation of version 1 on telemetry of its own, with everything but its shadow run."""
    store = open_store(home)
    start = resolve("deployment", CONFIG.at(), store)
    assert start is not None
    draft = store.draft(Recipe(PIPELINE, "telemetry", "1", {"number": number}, "laptop", 0, "default", {}, {}))
    (draft.out / "windows.json").write_text("[]")
    telemetry = store.publish(draft, {})
    spec = CONFIG.at(site=SiteData(telemetry=telemetry.recipe, windows=WINDOWS, start=start.recipe))
    plant_redistilled(spec, home, number + 2, 0.7 + number / 100)
    return spec


def events(ledger: Ledger) -> list[tuple[str, int]]:
    return [(entry.event, entry.version) for entry in ledger.entries()]


def test_a_redistilled_deployment_waits_for_its_shadow_run(home: Settings) -> None:
    served(home)
    spec = redistilled(home)
    deployment = resolve("deployment", spec, open_store(home))
    assert deployment is not None and promote(spec, deployment, open_store(home), home, "run-2").event == "registered"
    champion = open_ledger(home, PIPELINE).champion()
    assert champion is not None and champion.version == 1


@pytest.mark.parametrize("better", [True, False])
def test_better_is_promoted_and_anything_else_refused_with_its_reason(home: Settings, better: bool) -> None:
    first = served(home)
    spec = redistilled(home)
    plant_shadow_run(spec, home, first, promote=better, reason="because of this")
    artifact, entry = challenge(spec, open_store(home), home, "run-2")
    ledger = open_ledger(home, PIPELINE)
    assert (entry.event, entry.reason, entry.version) == ("champion" if better else "refused", "because of this", 2)
    champion = ledger.champion()
    assert artifact.cached and champion is not None and champion.version == (2 if better else 1)
    assert ledger.bundle is not None and f"v000{champion.version}-" in ledger.bundle.name


def test_the_decision_is_made_once_however_often_it_is_asked(home: Settings) -> None:
    first = served(home)
    spec = redistilled(home)
    plant_shadow_run(spec, home, first)
    for _ in range(3):
        assert challenge(spec, open_store(home), home, "again")[1].event == "champion"
    assert events(open_ledger(home, PIPELINE)) == [("registered", 1), ("champion", 1), ("registered", 2), ("champion", 2)]


def test_each_refused_challenger_makes_the_next_look_dearer(home: Settings) -> None:
    first = served(home)
    ledger = open_ledger(home, PIPELINE)
    for number in range(2):
        assert ledger.look() == number + 1
        spec = redistilled(home, number)
        plant_shadow_run(spec, home, first, look=number + 1, promote=False, reason="not proven better")
        challenge(spec, open_store(home), home, None)
    assert ledger.look() == 3
    spec = redistilled(home, 2)
    plant_shadow_run(spec, home, first, look=3)
    assert challenge(spec, open_store(home), home, None)[1].event == "champion"
    assert ledger.look() == 1, "a new champion is looked at for the first time"


def test_a_challenger_is_not_promoted_over_a_champion_that_it_was_not_compared_with(
    home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = served(home)
    older = plant(CONFIG.at("laptop", 5), home, score=0.9)["deployment"]
    ledger = open_ledger(home, PIPELINE)
    spec = redistilled(home)
    plant_shadow_run(spec, home, first)
    decide = Ledger.decide

    def meanwhile(self: Ledger, *arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(Ledger, "decide", decide)
        other = ledger.register(older.recipe, str(older.path / "bundle"), "laptop", 0.9, "t", None)
        ledger.decide(other, "champion", "someone else was faster")
        return decide(self, *arguments, **options)

    monkeypatch.setattr(Ledger, "decide", meanwhile)
    with pytest.raises(RankdError, match="was compared with v1, but v3 serves by now; nothing was changed"):
        challenge(spec, open_store(home), home, None)
    assert ("champion", 2) not in events(ledger)


def test_without_a_champion_or_site_data_there_is_nothing_to_challenge(home: Settings) -> None:
    with pytest.raises(RankdError, match="no re-distilled deployment and champion to compare"):
        challenge(CONFIG.at(), open_store(home), home, None)
