"""A change of what a step does without a new code version would serve stale artifacts: this fails before that."""

import json

from rankd_pipeline_tests.steps import code_versions


def test_a_changed_step_has_a_new_version():
    record = json.loads(code_versions.RECORD.read_text())
    now = code_versions.current()
    stale = code_versions.unbumped(record, now)
    assert not stale, (
        f"{stale}: the source changed and the version did not; bump it (steps/chain.py or the function's code_versions), then run "
        "python -m rankd_pipeline_tests.steps.code_versions"
    )
    assert record == now, "versions were bumped; run python -m rankd_pipeline_tests.steps.code_versions"


def test_unbumped_sees_a_change_and_accepts_a_bump():
    old = {"step a": {"version": "1", "hash": "x"}}
    assert code_versions.unbumped(old, {"step a": {"version": "1", "hash": "y"}}) == ["step a"]
    assert code_versions.unbumped(old, {"step a": {"version": "2", "hash": "y"}}) == []


def test_the_closure_follows_lazy_imports_and_stops_at_facets():
    reached = code_versions.closure("rankd_pipeline.steps.teacher", code_versions.PLUMBING)
    assert "rankd_pipeline.training.fit" in reached
    assert "rankd_pipeline.distillation.response" in reached
    assert not any("beam_management" in name for name in reached)
