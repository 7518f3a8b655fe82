"""Gates stop the chain above smoke scale, and every step past a gate reads its verdict again."""

import pytest

from rankd_pipeline.errors import GateStopped
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.runner import recipe_of, require_passed, run_with_inputs
from rankd_pipeline.store.artifact import Artifact, Store

GATE = {
    "name": "margin", "metric": "top1", "value": 0.02, "ci95": [0.01, 0.03], "threshold": 0.05, "comparator": ">=",
    "unit": "fraction", "verdict": "fail", "next_step": "more labels", "resolved": {}, "n_units": 9,
}  # fmt: skip


def planted(store: Store, scale: str, step: str, verdict: str, gates: list | None = None) -> Artifact:
    """A stored artifact of `step` with this verdict and no content."""
    spec = load_pipeline("beam_management").at(scale)
    draft = store.draft(recipe_of(step, spec, {}))
    draft.metrics.update(verdict=verdict, gates=gates or [], reason="planted")
    return store.publish(draft, {})


@pytest.mark.parametrize("gated", ["audit_report", "calibration_scorecard", "quantized_onnx"])
@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_only_a_pass_lets_the_chain_go_on(tmp_path, gated, verdict):
    artifact = planted(Store(tmp_path), "laptop", gated, verdict, [GATE])
    with pytest.raises(GateStopped) as caught:
        require_passed(artifact, enforced=True)
    assert caught.value.exit_code == 3
    for part in (gated, "margin", "0.02", "0.05", "more labels"):
        assert part in str(caught.value)
    require_passed(artifact, enforced=False)
    require_passed(planted(Store(tmp_path / "good"), "laptop", gated, "pass"), enforced=True)


def test_latency_stops_on_fail_and_goes_on_when_the_host_cannot_tell(tmp_path):
    with pytest.raises(GateStopped):
        require_passed(planted(Store(tmp_path / "a"), "laptop", "latency_profile", "fail"), enforced=True)
    require_passed(planted(Store(tmp_path / "b"), "laptop", "latency_profile", "inconclusive"), enforced=True)


@pytest.mark.parametrize(("gated", "step"), [(gate, name) for name, info in STEPS.items() for gate in info.needs_pass])
def test_each_step_past_a_gate_refuses_before_it_does_anything(home, gated, step):
    spec = load_pipeline("beam_management").at("laptop")
    store = Store(home.home / "gate-store" / f"{gated}-{step}")
    inputs = {name: planted(store, "laptop", name, "fail" if name == gated else "pass") for name in STEPS[step].inputs}
    with pytest.raises(GateStopped, match=gated):
        run_with_inputs(step, spec, inputs, store, home)
    assert not list(store.artifacts(spec.pipeline, step))


def test_a_gate_without_an_interval_is_still_one_sentence(tmp_path):
    gate = {**GATE, "ci95": None, "verdict": "inconclusive"}
    with pytest.raises(GateStopped, match="no interval"):
        require_passed(planted(Store(tmp_path), "laptop", "calibration_scorecard", "inconclusive", [gate]), enforced=True)
