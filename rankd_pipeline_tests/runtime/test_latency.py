"""The race: its statistics on planted distributions, its verdicts, its lock, and whole small races of both toys.

No figure of this host is asserted: only what must hold on any host.
"""

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rankd_pipeline.errors import Busy, RankdError
from rankd_pipeline.runtime import latency, profile_script
from rankd_pipeline.runtime.c_export import CForm, compiler
from rankd_pipeline.runtime.latency import Candidate, CandidateResult, LatencyConfig, judge_times, line_up, pick, profile
from rankd_pipeline.runtime.onnx_export import export_onnx
from rankd_pipeline.runtime.profile_script import judge, summarise, tail_interval
from rankd_pipeline_tests.runtime.toys import HandoverGru

BUDGET_US = 100.0
QUICK = LatencyConfig(paced_runs=60, winner_runs=80, back_to_back_runs=40, warmup_runs=5, max_seconds=20, rest_ms=1.0)


def call_times(median_us: float, tail_us: float, share: float, count: int = 10_000) -> np.ndarray:
    """Times whose upper `share` takes `tail_us`; a known p99.9."""
    times = np.full(count, median_us)
    times[: int(count * share)] = tail_us
    return np.random.default_rng(0).permutation(times)


CALM = summarise(call_times(5, 6, 0.01))
NOISY = summarise(call_times(5, 400, 0.01))


@pytest.mark.parametrize(
    ("times", "control", "verdict", "word"),
    [
        (call_times(5, 50, 0.01), CALM, "pass", "within"),
        (call_times(5, 300, 0.0), NOISY, "pass", "within"),
        (call_times(150, 160, 0.01), CALM, "fail", "median"),
        (call_times(150, 160, 0.01), NOISY, "fail", "median"),
        (call_times(5, 300, 0.01), CALM, "fail", "at least"),
        (call_times(5, 300, 0.01), NOISY, "inconclusive", "host alone adds"),
        (call_times(5, 300, 0.001), CALM, "inconclusive", "interval"),
        (call_times(5, 6, 0.01, count=300), CALM, "inconclusive", "too few"),
        (call_times(5, 900, 0.01), NOISY, "fail", "the host adds"),
    ],
)
def test_verdict_on_planted_distributions(times, control, verdict, word):
    """pass, fail and inconclusive, each for its reason."""
    found, why = judge(summarise(times), control, BUDGET_US)
    assert found == verdict
    assert word in why


@given(
    median=st.floats(1, 200), tail=st.floats(1, 1000), share=st.floats(0, 0.02), host=st.floats(0, 1000),
    more=st.floats(0, 500),
)  # fmt: skip
def test_verdict_is_monotone_in_the_budget(median, tail, share, host, more):
    """A larger budget never makes a verdict worse."""
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    call = summarise(call_times(median, median + tail, share, count=5000))
    control = summarise(call_times(5, 5 + host, 0.01))
    assert order[judge(call, control, 100 + more)[0]] >= order[judge(call, control, 100)[0]]


def test_interval_covers_the_true_quantile():
    """95 % order-statistic interval of p99.9: it holds the true value in about 95 % of 400 exponential samples."""
    generator = np.random.default_rng(1)
    truth = -math.log(0.001)
    hits = 0
    for _ in range(400):
        low, high = tail_interval(np.sort(generator.exponential(size=10_000)))
        hits += high is not None and low <= truth <= high
    assert 0.93 <= hits / 400 <= 0.99


@given(count=st.integers(1, 6000))
@settings(max_examples=60)
def test_interval_brackets_the_estimate_and_needs_enough_calls(count):
    """low <= p99.9 <= high; the upper bound appears from RUNS_FOR_INTERVAL calls on, not before."""
    tail = summarise(np.random.default_rng(count).exponential(size=count))
    low, high = tail["p999_ci95_us"]
    assert low <= tail["p999_us"] <= tail["max_us"]
    assert (high is not None) == (count >= profile_script.RUNS_FOR_INTERVAL)
    if high is not None:
        assert tail["p999_us"] <= high


def blank(runtime: str = "toy", shippable: bool = True) -> CandidateResult:
    """A candidate without figures."""
    return CandidateResult(runtime=runtime, precision="fp32", shippable=shippable)


def planted(runtime: str, times_us: np.ndarray, cases: tuple[str, ...] = ("samples",)) -> CandidateResult:
    """A candidate with planted paced times and a calm control."""
    times = {"paced": times_us * 1000, "control": call_times(5, 6, 0.01) * 1000, "back_to_back": times_us[:100] * 1000}
    return judge_times(blank(runtime), times, list(cases), BUDGET_US)


def test_worst_case_counts():
    """Case B is slow in every other call: it is on top and decides, though case A is well within the budget."""
    times = np.full(20_000, 5.0)
    times[1::2] = call_times(5, 300, 0.01)
    result = planted("toy", times, ("all reported", "few reported"))
    assert [case.name for case in result.cases] == ["few reported", "all reported"]
    assert result.verdict == "fail"
    assert "few reported" in result.why
    assert [case.verdict for case in result.cases] == ["fail", "pass"]
    assert sum(result.histogram.paced) == 20_000


def test_best_tail_wins_not_best_median():
    """A lower median with a worse tail loses; where tails cannot be told apart the lower p99 wins."""
    steady, erratic = planted("steady", call_times(8, 9, 0.01)), planted("erratic", call_times(2, 80, 0.01))
    assert pick([steady, erratic]) == "steady"
    fast = planted("fast", call_times(2, 60, 0.001))
    slow = planted("slow", call_times(20, 61, 0.001))
    assert pick([slow, fast]) == "fast"
    assert pick([blank()]) is None


def test_of_several_students_the_best_within_the_limit_wins():
    """Score decides among those whose tail is proven within the limit, the tail among runtimes of one student."""

    def of(model: str, runtime: str, us: float) -> CandidateResult:
        return planted(f"{model}-{runtime}", call_times(us, 1.1 * us, 0.01)).model_copy(update={"model": model})

    race = [of("cnn", "c-fp32", 60), of("cnn", "onnxruntime-fp32", 30), of("mlp", "c-fp32", 4), of("mlp", "onnxruntime-fp32", 9)]
    scores = {"cnn": 0.9, "mlp": 0.8}
    assert pick(race, scores, 40.0) == "cnn-onnxruntime-fp32"
    assert pick(race, scores, 20.0) == "mlp-c-fp32"
    assert pick(race, {"cnn": 0.7, "mlp": 0.8}, 40.0) == "mlp-c-fp32"
    assert pick(race, scores, 1.0) == "mlp-c-fp32"


@pytest.mark.needs_compiler
def test_whole_race(toy, tmp_path):
    """Both toys: every runtime measured, figures ordered, cases and JSON complete, nothing left at real-time priority."""
    messages: list[str] = []
    candidates = line_up(toy.fp32, toy.int8, {"fp32": CForm(toy.c_fp32), "int8": CForm(toy.c_int8)}, native=True)
    report = profile(candidates, toy.signature, QUICK, toy.inputs(40), tmp_path, lambda text, share: messages.append(text))
    measured = {item.runtime: item for item in report.candidates if not item.reason}
    assert {"onnxruntime-fp32", "onnxruntime-int8", "c-fp32", "c-int8", "c-fp32-native"} <= set(measured)
    for item in measured.values():
        assert item.paced.p50_us <= item.paced.p99_us <= item.paced.p999_us <= item.paced.max_us
        assert item.paced.runs == item.control.runs
        assert item.back_to_back.runs > 0
        assert {case.name for case in item.cases} == {"all reported", "few reported"}
        assert item.verdict in ("inconclusive", "fail")  # 60 calls prove no p99.9
    assert report.winner in measured
    assert measured[report.winner].shippable
    assert measured[report.winner].paced.runs == QUICK.winner_runs
    again = json.loads(report.to_json())
    assert again["winner"] == report.winner
    headline = json.loads(json.dumps(report.headline()))
    assert headline["runtime"] == report.winner
    assert headline["p999_us"] == headline["cases"][0]["p999_us"]
    assert len(headline["candidates"]) == len(candidates)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert any("winner" in text for text in messages)
    assert report.seconds < 2 * QUICK.max_seconds + 30


@pytest.mark.needs_compiler
def test_a_build_that_computes_something_else_is_not_timed(mlp_toy, gru_toy, tmp_path):
    """The proof: C of other weights (planted) is refused, and so is a model that ignores its carried state."""
    source = mlp_toy.c_fp32.source.read_text()
    planted_dir = tmp_path / "planted"
    planted_dir.mkdir()
    wrong = type(mlp_toy.c_fp32)(
        mlp_toy.c_fp32.name, planted_dir / mlp_toy.c_fp32.source.name, planted_dir / mlp_toy.c_fp32.header.name
    )
    wrong.source.write_text(source.replace("0x1.", "0x1.1", 40))
    wrong.header.write_text(mlp_toy.c_fp32.header.read_text())
    candidates = [
        Candidate(runtime="onnxruntime-fp32", engine="onnxruntime", path=mlp_toy.fp32),
        Candidate(runtime="c-fp32", engine="c", path=mlp_toy.fp32, csource=wrong),
    ]
    report = profile(candidates, mlp_toy.signature, QUICK, mlp_toy.inputs(20), tmp_path)
    assert "computes another" in next(item for item in report.candidates if item.runtime == "c-fp32").reason
    assert report.winner == "onnxruntime-fp32"
    forgetful = gru_toy.signature.model_copy(update={"state": {}})
    proof = profile_script.ort_caller(str(gru_toy.fp32), gru_toy.inputs(20), {}).proof({})
    carried = profile_script.ort_caller(str(gru_toy.fp32), gru_toy.inputs(20), gru_toy.signature.state)
    assert np.abs(carried.proof(gru_toy.signature.state)["cell_score"] - proof["cell_score"]).max() > 1e-4
    assert forgetful.state == {}


def test_students_with_states_of_their_own_race_each_by_its_signature(gru_toy, tmp_path):
    """A GRU of 8 and one of 4 hidden units: both are timed on the same reports, each with a state of its own size."""

    def smaller(specs):
        return tuple(spec.model_copy(update={"shape": (4,)}) if "state" in spec.name else spec for spec in specs)

    own = gru_toy.signature
    small = own.model_copy(update={"inputs": smaller(own.inputs), "outputs": smaller(own.outputs)})
    export_onnx(HandoverGru(hidden=4), small, tmp_path / "small.onnx", {})
    candidates = [
        Candidate(runtime=f"{model}-onnxruntime-fp32", model=model, engine="onnxruntime", path=path)
        for model, path in (("large", gru_toy.fp32), ("small", tmp_path / "small.onnx"))
    ]
    reports = {name: values for name, values in gru_toy.inputs(20).items() if name != "state"}
    report = profile(candidates, gru_toy.signature, QUICK, reports, tmp_path, scores={"large": 0.2, "small": 0.1}, limit_us=1e6)
    assert [item.reason for item in report.candidates] == ["", ""]
    assert report.winner == "large-onnxruntime-fp32" and report.budget_us == gru_toy.signature.budget_us


def test_nothing_measurable_is_said(mlp_toy, tmp_path):
    """Only unbuilt candidates: one sentence with the reasons."""
    missing = Candidate(runtime="c-fp32", engine="c", path=mlp_toy.fp32, reason="not built: no C compiler on this host")
    with pytest.raises(RankdError, match="no C compiler"):
        profile([missing], mlp_toy.signature, QUICK, mlp_toy.inputs(5), tmp_path)
    with pytest.raises(RankdError, match="lack input"):
        profile([missing], mlp_toy.signature, QUICK, {"l1_rsrp_mask": np.ones((3, 16), np.uint8)}, tmp_path, cases={
            "one": {"l1_rsrp_mask": np.ones((3, 16), np.uint8)}})  # fmt: skip


def test_deadline_ends_a_slow_model():
    """Whatever the runs asked for, measuring stops soon after its deadline with the calls it has."""
    import time

    caller = profile_script.Caller(lambda index: None, lambda: time.sleep(0.02), dict)
    started = time.monotonic()
    times = profile_script.measure(
        caller, paced_runs=10**6, back_to_back_runs=10**6, slot_us=500, deadline_s=0.5, warmup_runs=10**6
    )
    assert time.monotonic() - started < 10
    assert 0 < len(times["paced"]) < 10**6
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def _hold(held, release) -> None:
    with profile_script.host_lock(5):
        held.set()
        release.wait(30)


def test_two_profiles_never_run_beside_each_other(mlp_toy, tmp_path):
    """While another process holds the lock a profile waits, says so, and gives up as Busy."""
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(held, release))
    other.start()
    try:
        assert held.wait(20)
        said: list[str] = []
        candidates = [Candidate(runtime="onnxruntime-fp32", engine="onnxruntime", path=mlp_toy.fp32)]
        with pytest.raises(Busy):
            profile(
                candidates, mlp_toy.signature, QUICK.model_copy(update={"lock_wait_s": 0.3}), mlp_toy.inputs(5),
                tmp_path, lambda text, share: said.append(text),
            )  # fmt: skip
        assert "waiting for another latency profile on this host" in said
    finally:
        release.set()
        other.join()


@pytest.fixture
def foreign_model(tmp_path) -> Path:
    """A model rankd did not make: dotted names, integer indices, static batch, two outputs, no signature."""
    nodes = [
        helper.make_node("Gather", ["table.1", "ids/0"], ["rows"]),
        helper.make_node("Add", ["rows", "x.in"], ["y.out"]),
        helper.make_node("ReduceSum", ["y.out"], ["total"], keepdims=0),
    ]
    table = helper.make_tensor("table.1", TensorProto.FLOAT, [2, 3], np.arange(6, dtype=np.float32))
    graph = helper.make_graph(
        nodes,
        "foreign",
        [
            helper.make_tensor_value_info("ids/0", TensorProto.INT64, [5]),
            helper.make_tensor_value_info("x.in", TensorProto.FLOAT, [5, "width"]),
        ],
        [
            helper.make_tensor_value_info("y.out", TensorProto.FLOAT, [5, "any"]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, []),
        ],
        [table],
    )
    path = tmp_path / "foreign.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_any_onnx_file_can_be_profiled(foreign_model):
    """Foreign names, integers, a dynamic inner axis: measured all the same; what C cannot do is listed."""
    report = latency.profile_onnx(foreign_model, budget_us=1e6, runs=30, slot_us=100)
    assert report.winner is not None
    assert report.budget_us == 1e6
    reasons = {item.runtime: item.reason for item in report.candidates}
    assert reasons["onnxruntime-fp32"] == ""
    if compiler():
        assert reasons["c-fp32"] == ""  # and so its outputs, of a shape the graph leaves open, equal onnxruntime's


def test_script_alone_measures_and_judges(mlp_toy, tmp_path):
    """The script as a bundle carries it, in a bare folder: figures for people, JSON for programs, exit code 3 on a miss."""
    script = tmp_path / "profile_model.py"
    script.write_bytes(Path(profile_script.__file__).read_bytes())
    text = script.read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= set(sys.stdlib_module_names) | {"numpy", "onnxruntime"}
    command = [sys.executable, str(script), str(mlp_toy.fp32), "--runs", "30", "--back-to-back-runs", "30"]
    table = subprocess.run([*command, "--budget-us", "1e6"], capture_output=True, text=True, check=True).stdout
    assert "p99.9" in table
    assert "inconclusive" in table
    missed = subprocess.run([*command, "--budget-us", "0.001", "--json"], capture_output=True, text=True, check=False)
    assert missed.returncode == 3
    assert json.loads(missed.stdout)["verdict"] == "fail"
