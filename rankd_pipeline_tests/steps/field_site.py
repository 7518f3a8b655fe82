"""A field of one hour, played with the bundle of a finished smoke chain, as the site data of a re-distillation."""

import time
from collections.abc import Mapping

from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineSpec, SiteData, load_pipeline
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.runner import open_store, run_step
from rankd_pipeline.steps.watch import take_telemetry
from rankd_pipeline.store.artifact import Artifact
from rankd_pipeline.store.tensors import iter_tables, read_columns
from rankd_pipeline.telemetry.field import Play, play
from rankd_pipeline.telemetry.windows import HOUR_S


def spec_with_site(
    current: Settings, spec: PipelineSpec, artifacts: Mapping[str, Artifact], rows: int, labelled: float, hours_ago: int = 12
) -> PipelineSpec:
    """The smoke chain of `spec` again, on its corpus and an hour of its own field."""
    start_s = (time.time() // HOUR_S - hours_ago) * HOUR_S
    wanted = Play(artifacts["deployment"].file("bundle"), frozenset(), 1, rows, labelled, 5, start_s)
    budget_us, folder = spec.steps.latency_profile.budget_us, current.telemetry_dir(spec.pipeline)
    play(load_function(spec.function), spec.steps.corpus.simulation, budget_us, wanted, folder, workers=1)
    telemetry = take_telemetry(spec, open_store(current), current)
    site = SiteData(telemetry=telemetry.recipe, windows=((start_s, start_s + HOUR_S),), start=artifacts["deployment"].recipe)
    return load_pipeline(spec.pipeline).at("smoke", site=site)


def assert_labels_of_the_field_are_learned_from(
    current: Settings, spec: PipelineSpec, artifacts: Mapping[str, Artifact], rows: int
) -> None:
    """The whole chain again, with an hour of the field in its corpus: labels of one type, as many as were delivered."""
    store, again = open_store(current), spec_with_site(current, spec, artifacts, rows, 0.6)
    second = {step: run_step(step, again, store, current) for step in STEPS}
    corpus = second["corpus"]
    told, ids = corpus.metrics["site"], read_columns(corpus.file("labels"), ["sample_id"])["sample_id"]
    assert (ids >= told["first_id"]).sum() == told["labelled"] > 0 and told["held_back"] > 0
    assert len({table.schema.field("label").type for table in iter_tables(corpus.file("labels"))}) == 1
    labels = second["oracle_labels"].metrics["by_provenance"]
    assert labels["classical_sweep"] == told["labelled"] and second["teacher"].recipe != artifacts["teacher"].recipe
