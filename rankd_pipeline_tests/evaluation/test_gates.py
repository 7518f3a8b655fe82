"""Gates: planted good, bad and inconclusive cases, what they refuse, and that they are monotone."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.gates import Gate, GateResult, best_baseline, evaluate_gate, judge, verdict_of
from rankd_pipeline.evaluation.table import concat_tables
from rankd_pipeline_tests.evaluation.planted import planted_table

BASELINES = ["best_of_set_b", "hierarchical", "interpolation"]
ORDER = {"pass": 0, "inconclusive": 1, "fail": 2}


def margin(**changes) -> Gate:
    return Gate(**{
        "name": "margin", "metric": "top1", "plus": ["teacher@test"], "minus": ["best_baseline@test"],
        "comparator": ">=", "threshold": 0.05, "unit": "fraction", "next_step": "More labels.", **changes,
    })  # fmt: skip


def table(teacher: float, drops: int = 2000, **more: float):
    rates = {"teacher@test": teacher, "best_of_set_b@test": 0.40, "hierarchical@test": 0.45, **more}
    return planted_table(rates, drops=drops)


@pytest.mark.parametrize(("teacher", "drops", "verdict"), [(0.60, 2000, "pass"), (0.46, 2000, "fail"), (0.505, 30, "inconclusive")])
def test_planted_margins(teacher, drops, verdict):
    result = evaluate_gate(margin(), table(teacher, drops), BASELINES, higher_is_better=True)
    assert result.verdict == verdict
    assert result.resolved["best_baseline@test"] == "hierarchical@test"
    assert result.ci95[0] < result.value < result.ci95[1]


def test_a_worse_teacher_never_passes_by_luck():
    verdicts = [evaluate_gate(margin(), planted_table({"teacher@test": 0.50, "hierarchical@test": 0.46}, drops=150, seed=s),
                              BASELINES, True).verdict for s in range(40)]  # fmt: skip
    assert verdicts.count("pass") <= 3  # 2.5 % of 40 is 1; the true margin of 0.04 lies below the threshold


@pytest.mark.parametrize(("drop", "verdict"), [(0.20, "pass"), (0.35, "fail"), (0.23, "inconclusive")])
def test_planted_gap_to_a_held_out_site(drop, verdict):
    gate = margin(
        name="gap_site", comparator="<", threshold=0.03,
        plus=["teacher@test", "best_of_set_b@heldout_site"], minus=["best_of_set_b@test", "teacher@heldout_site"],
    )  # fmt: skip
    data = planted_table(
        {"teacher@test": 0.8, "best_of_set_b@test": 0.6, "best_of_set_b@heldout_site": 0.4, "teacher@heldout_site": 0.8 - drop},
        drops=3000,
    )
    result = evaluate_gate(gate, data, BASELINES, higher_is_better=True)
    assert result.verdict == verdict and result.value == pytest.approx(drop - 0.2, abs=0.015)


@pytest.mark.parametrize(("gap", "drops", "verdict"), [(0.02, 1500, "pass"), (0.09, 1500, "fail"), (0.05, 20, "inconclusive")])
def test_planted_calibration(gap, drops, verdict):
    rng = np.random.default_rng(1)
    parts = []
    for b in range(3):
        part = planted_table({"teacher@test": 0.5}, metric=f"ece_bin_{b:02d}", drops=drops)
        parts.append(part.assign(value=gap + rng.normal(0, 0.15, drops)))
    gate = margin(name="ece", aggregate="ece", metric="ece", minus=[], comparator="<")
    assert evaluate_gate(gate, concat_tables(parts), [], higher_is_better=False).verdict == verdict


def test_where_narrows_the_gate_to_a_cell():
    data = concat_tables(
        [
            planted_table({"teacher@test": 0.9, "hierarchical@test": 0.5}, cell="site=a|link=los", drops=400),
            planted_table({"teacher@test": 0.5, "hierarchical@test": 0.5}, cell="site=a|link=nlos", drops=400, seed=1),
        ]
    )
    verdicts = [evaluate_gate(margin(where={"link": link}), data, BASELINES, True).verdict for link in ("los", "nlos")]
    assert verdicts == ["pass", "fail"]


def test_one_drop_is_inconclusive_not_a_pass():
    result = evaluate_gate(margin(), table(0.95, drops=1), BASELINES, higher_is_better=True)
    assert result.ci95 is None and result.verdict == "inconclusive"


def test_lower_is_better_picks_the_lowest_baseline():
    data = planted_table({"best_of_set_b@test": 0.3, "hierarchical@test": 0.2})
    assert best_baseline(data, "test", BASELINES, metric="top1", higher_is_better=False)[0] == "hierarchical"
    assert best_baseline(data, "test", BASELINES, metric="top1", higher_is_better=True)[0] == "best_of_set_b"
    with pytest.raises(RankdError, match="No baseline"):
        best_baseline(data, "heldout_site", BASELINES, metric="top1", higher_is_better=True)


@given(
    ci=st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(lambda c: (min(c), max(c))),
    thresholds=st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5)),
    comparator=st.sampled_from([">=", ">", "<=", "<"]),
)
def test_a_stricter_threshold_never_gives_a_better_verdict(ci, thresholds, comparator):
    strict, loose = (max, min) if comparator in (">=", ">") else (min, max)
    assert ORDER[judge(ci, comparator, strict(thresholds))] >= ORDER[judge(ci, comparator, loose(thresholds))]


@given(st.lists(st.sampled_from(["pass", "inconclusive", "fail"]), max_size=5))
def test_the_verdict_of_many_is_the_worst(verdicts):
    results = [
        GateResult(name="g", metric="m", value=0.0, ci95=None, threshold=0.0, comparator="<", unit="1", verdict=v, resolved={},
                   n_units=1, next_step="x")
        for v in verdicts
    ]  # fmt: skip
    assert ORDER[verdict_of(results)] == max((ORDER[v] for v in verdicts), default=0)


def test_results_survive_json_and_print_their_miss():
    result = evaluate_gate(margin(), table(0.46), BASELINES, higher_is_better=True, seed=3)
    assert GateResult.model_validate_json(result.model_dump_json()) == result
    assert evaluate_gate(margin(), table(0.46), BASELINES, higher_is_better=True, seed=3) == result
    assert result.sentence().endswith("MISS") and ">= 0.05 fraction" in result.sentence()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plus": ["teacher"]}, "model@split"),
        ({"plus": []}, "at least 1"),
        ({"comparator": "=="}, "comparator"),
        ({"aggregate": "median"}, "unknown"),
        ({"aggregate": "quantile(1.5)"}, "unknown"),
        ({"aggregate": "mean(site)"}, "unknown"),
        ({"treshold": 0.05}, "treshold"),
        ({"threshold": float("nan")}, "finite"),
    ],
)
def test_a_gate_with_a_mistake_is_refused_by_its_key(change, message):
    with pytest.raises(ValidationError, match=message):
        margin(**change)


def test_the_module_stays_light_for_the_code_location():
    code = "import sys, rankd_pipeline.evaluation.gates; print([m for m in ('numpy','pandas','scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
