"""The race: time every runtime of one model as a DU would call it, judge each tail against the budget, name a winner.

Parameter count predicts nothing, so candidates are measured: onnxruntime and OpenVINO by `profile_script.py` in a
process of its own, generated C inside a compiled harness, so that no Python overhead is in the figure. Both
measure alike: one pinned thread, warmed up, back to back and paced (one call a slot, caches dirtied between), a
control of fixed work in each slot for the host's own tail. Only paced figures are judged, on the worst input case.
The onnxruntime figures include its Python binding call (1.5 us on the reference host), the C figures nothing.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from rankd_pipeline.errors import Busy, RankdError
from rankd_pipeline.runtime import profile_script
from rankd_pipeline.runtime.c_export import (
    NO_COMPILER,
    CForm,
    CSource,
    compile_c,
    compiler,
    declared_shape,
    generate_all,
    parameters,
)
from rankd_pipeline.runtime.onnx_export import read_signature, verify_onnx
from rankd_pipeline.runtime.signature import ModelSignature

Verdict = profile_script.Verdict
HARNESS = Path(__file__).with_name("latency_harness.c")
PACE_MAX_US = 500.0  # a slower slot is paced at this: what matters is the work between calls, not the wait
PROOF_RTOL, PROOF_ATOL = 1e-3, 1e-4  # rounding, carried over a few steps of state
Arrays = dict[str, np.ndarray]
VERDICT_ORDER = {"fail": 0, "inconclusive": 1, "pass": 2}


class LatencyConfig(BaseModel):
    """How long to measure. The runs are upper limits: the deadline `max_seconds` for the whole race wins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paced_runs: int = Field(default=10_000, ge=1)
    winner_runs: int = Field(default=50_000, ge=1)
    back_to_back_runs: int = Field(default=10_000, ge=1)
    warmup_runs: int = Field(default=500, ge=0)
    max_seconds: float = Field(default=60.0, gt=0)
    burst_ms: float = Field(default=90.0, gt=0)
    rest_ms: float = Field(default=8.0, ge=0)
    lock_wait_s: float = Field(default=600.0, ge=0)


class Candidate(BaseModel):
    """One way to run a model: `runtime` names it in reports; `path` is the ONNX file, `csource` its C form.

    `model` tells students apart where several race. A candidate with `reason` could not be built here and
    is only listed. `shippable` is False for labelled options (native flags): measured, never the winner.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    runtime: str
    model: str = ""
    engine: Literal["onnxruntime", "openvino", "c"]
    precision: Literal["fp32", "int8"] = "fp32"
    path: Path
    csource: CSource | None = None
    native: bool = False
    shippable: bool = True
    reason: str = ""


class Tail(BaseModel):
    """One distribution of call times in us; the interval is of p99.9 (its upper end None with too few calls)."""

    runs: int
    p50_us: float
    p99_us: float
    p999_us: float
    p999_ci95_us: tuple[float, float | None]
    max_us: float


class CaseResult(BaseModel):
    """Paced figures of one named input set."""

    name: str
    paced: Tail
    verdict: Verdict
    why: str


class Histogram(BaseModel):
    """Counts of call times between `edges_us` (log-spaced), for plots."""

    edges_us: list[float]
    paced: list[int]
    back_to_back: list[int]
    control: list[int]


class CandidateResult(BaseModel):
    """What one candidate reached; without figures, `reason` says why it was not measured."""

    runtime: str
    model: str = ""
    engine: str = ""
    precision: str
    shippable: bool
    reason: str = ""
    verdict: Verdict | None = None
    why: str = ""
    paced: Tail | None = None
    back_to_back: Tail | None = None
    control: Tail | None = None
    cases: list[CaseResult] = []
    histogram: Histogram | None = None


class LatencyReport(BaseModel):
    """The race of one model; `winner` names the runtime with the best paced tail, measured last and longest."""

    model: str
    budget_us: float
    slot_us: float
    paced_slot_us: float
    host: dict[str, Any]
    candidates: list[CandidateResult]
    winner: str | None
    verdict: Verdict
    why: str
    seconds: float

    def to_json(self) -> str:
        """The whole report as JSON."""
        return self.model_dump_json(indent=1)

    def headline(self) -> dict[str, Any]:
        """The `latency` object of `rankd report --json`: the winner's worst case, paced, and all candidates in short."""
        best = next((item for item in self.candidates if item.runtime == self.winner), None)
        paced = best.cases[0].paced if best and best.cases else None
        return {
            "budget_us": self.budget_us,
            "runtime": self.winner,
            "p50_us": paced and paced.p50_us,
            "p99_us": paced and paced.p99_us,
            "p999_us": paced and paced.p999_us,
            "p999_ci95_us": paced and paced.p999_ci95_us,
            "max_us": paced and paced.max_us,
            "control_p999_us": best.control.p999_us if best and best.control else None,
            "verdict": self.verdict,
            "cases": [
                {"name": case.name, "verdict": case.verdict, **case.paced.model_dump()} for case in (best.cases if best else [])
            ],
            "candidates": [_short(item) for item in self.candidates],
        }


def _short(item: CandidateResult) -> dict[str, Any]:
    return {
        "runtime": item.runtime,
        "verdict": item.verdict,
        "reason": item.reason or None,
        "paced": item.paced and item.paced.model_dump(),
        "back_to_back": item.back_to_back and item.back_to_back.model_dump(),
        "control_p999_us": item.control and item.control.p999_us,
    }


def line_up(
    fp32: Path, int8: Path | None, c_forms: Mapping[str, CForm], native: bool = False, model: str = ""
) -> list[Candidate]:  # fmt: skip
    """The candidates this host can race: onnxruntime and portable C of each precision, OpenVINO where installed.

    c_forms: the C by precision; a precision without an entry does not race as C. `native` adds the FP32 C
    with -march=native as a labelled option. What cannot be built is listed with its reason. `model` goes before the
    runtimes' names where several students race.
    """
    before = f"{model}-" if model else ""
    files: list[tuple[Literal["fp32", "int8"], Path]] = [("fp32", fp32)]
    if int8 is not None:
        files.append(("int8", int8))
    found = []
    for precision, path in files:
        found.append(
            Candidate(runtime=f"{before}onnxruntime-{precision}", model=model, engine="onnxruntime", precision=precision, path=path)
        )
    for precision, path in files:
        if precision not in c_forms:
            continue
        form = c_forms[precision]
        common = {
            "model": model,
            "engine": "c",
            "precision": precision,
            "path": path,
            "csource": form.source,
            "reason": form.reason or ("" if compiler() else NO_COMPILER),
        }
        found.append(Candidate(runtime=f"{before}c-{precision}", **common))
        if native and precision == "fp32":
            found.append(Candidate(runtime=f"{before}c-fp32-native", native=True, shippable=False, **common))
    if _installed("openvino"):
        found.append(Candidate(runtime=f"{before}openvino-fp32", model=model, engine="openvino", path=fp32))
    return found


def mask_cases(signature: ModelSignature, samples: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Input sets that may differ in time: all values reported, and few (about a quarter); one set without masks."""
    if not signature.masks:
        return {"samples": dict(samples)}
    everything, few = dict(samples), dict(samples)
    for mask in set(signature.masks.values()):
        everything[mask] = np.ones_like(samples[mask])
        some = np.random.default_rng(0).random(samples[mask].shape) < 0.25
        few[mask] = some.astype(samples[mask].dtype)
    return {"all reported": everything, "few reported": few}


def profile(
    candidates: list[Candidate],
    signature: ModelSignature,
    cfg: LatencyConfig,
    samples: Mapping[str, np.ndarray],
    work: Path,
    on_progress: Callable[[str, float], None] = lambda message, fraction: None,
    cases: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    scores: Mapping[str, float] | None = None,
    limit_us: float | None = None,
) -> LatencyReport:
    """Race `candidates` on this host and judge them.

    `samples` are real inputs, `[n, *shape]` each; calls cycle through them, so that no input is timed twice in a row.
    Carried state may be left out: it starts at zero and is fed back. Students whose file carries a signature are called
    by that one, so that they may differ in their state; `signature` sets the budget and the pace of all.
    `cases` are named input sets (default: `mask_cases`), interleaved call by call. `work` holds builds and raw times.
    The winner is the shippable candidate with the best tail, measured again with `cfg.winner_runs`; its verdict is the
    report's. Where several students race (`Candidate.model`), `scores` (larger is better) chooses among those whose tail is
    proven within `limit_us` (default: the budget). Never runs beside another profile on this host: raises Busy after
    `cfg.lock_wait_s`. Raises RankdError if no candidate could be measured.
    """
    work.mkdir(parents=True, exist_ok=True)
    named = dict(cases) if cases is not None else mask_cases(signature, samples)
    try:
        with profile_script.host_lock(cfg.lock_wait_s, lambda message: on_progress(message, 0.0)) as lock:
            return _Race(signature, cfg, named, work, on_progress, lock).run(candidates, scores or {}, limit_us)
    except TimeoutError as error:
        raise Busy(f"Latency was not measured: {error}. Try again when it is done.") from error


def profile_onnx(
    path: Path,
    budget_us: float,
    runs: int = 10_000,
    slot_us: float = 500.0,
    on_progress: Callable[[str, float], None] = lambda message, fraction: None,
) -> LatencyReport:
    """Profile any ONNX file against `budget_us`, on random inputs: onnxruntime, and C where this host can build it."""
    import tempfile

    verify_onnx(path)
    signature = read_signature(path, budget_us=budget_us, slot_us=slot_us)
    cfg = LatencyConfig(paced_runs=runs, winner_runs=runs, back_to_back_runs=runs)
    try:
        samples = profile_script.random_samples(str(path))
    except Exception as error:  # onnxruntime's exception classes are not public API
        raise RankdError(f"{path}: no random inputs can be made for it: {str(error).splitlines()[0]}") from error
    samples = {spec.name: samples[spec.name].reshape(-1, *spec.shape) for spec in signature.inputs}
    with tempfile.TemporaryDirectory(prefix="rankd-profile-") as scratch:
        folder = Path(scratch)
        forms = {"fp32": generate_all({"model": path}, folder)["model"]}
        return profile(line_up(path, None, forms), signature, cfg, samples, folder, on_progress)


class _Bench:
    """What the runtimes of one student are timed on: its signature, and its samples as files in `folder`."""

    def __init__(self, signature: ModelSignature, cases: Mapping[str, Mapping[str, np.ndarray]], folder: Path) -> None:
        self.signature, self.folder = signature, folder
        self.rows = _interleave(signature, cases)
        folder.mkdir(exist_ok=True)
        profile_script.save_arrays(folder / "samples.npz", self.rows)
        _write_flat(signature, self.rows, folder / "samples.bin")


class _Race:
    """One race: its inputs as files, its deadline, its results."""

    def __init__(
        self,
        signature: ModelSignature,
        cfg: LatencyConfig,
        cases: Mapping[str, Mapping[str, np.ndarray]],
        work: Path,
        on_progress: Callable[[str, float], None],
        lock: int | None,
    ) -> None:
        self.signature, self.cfg, self.work, self.on_progress = signature, cfg, work, on_progress
        self.lock = lock
        self.cases, self.case_names = cases, list(cases)
        self.benching = threading.Lock()
        self.builds: dict[str, Future[Path]] = {}
        self.benches = {"": _Bench(signature, cases, work)}
        self.started = time.monotonic()
        self.pace_us = min(signature.slot_us, PACE_MAX_US)
        self.host: dict[str, Any] = profile_script.describe_host()

    def bench(self, item: Candidate) -> "_Bench":
        """The samples that `item`'s student is called with."""
        with self.benching:
            if item.model not in self.benches:
                own = read_signature(item.path, self.signature.budget_us, self.signature.slot_us)
                self.benches[item.model] = _Bench(own, self.cases, self.work / item.model)
            return self.benches[item.model]

    def run(self, candidates: list[Candidate], scores: Mapping[str, float], limit_us: float | None) -> LatencyReport:
        """Screen all, then measure the best shippable one longest."""
        built = [item for item in candidates if not item.reason]
        self.compile([item for item in built if item.engine == "c"])
        results: dict[str, CandidateResult] = {}
        for number, item in enumerate(candidates):
            self.on_progress(f"{item.runtime} ({number + 1} of {len(candidates)})", number / (len(candidates) + 1))
            share_s = 0.55 * self.cfg.max_seconds / max(len(built), 1)
            results[item.runtime] = self.measure(item, self.cfg.paced_runs, share_s)
        timed = [result for result in results.values() if result.shippable and result.paced]
        winner = pick(timed, scores, limit_us or self.signature.budget_us)
        if winner is None:
            reasons = "; ".join(f"{result.runtime}: {result.reason}" for result in results.values())
            raise RankdError(f"No runtime could be timed for model {self.signature.name}: {reasons}")
        left_s = self.cfg.max_seconds - (time.monotonic() - self.started)
        screened = results[winner].paced
        if self.cfg.winner_runs > (screened.runs if screened else 0) and left_s > 1:
            self.on_progress(f"{winner}, the winner, {self.cfg.winner_runs} calls", 0.55)
            chosen = next(item for item in candidates if item.runtime == winner)
            again = self.measure(chosen, self.cfg.winner_runs, left_s)
            if again.paced and screened and again.paced.runs >= screened.runs:
                results[winner] = again
        self.on_progress("latency measured", 1.0)
        return self.report(list(results.values()), winner)

    def compile(self, candidates: list[Candidate]) -> None:
        """Build C candidates, all cores at work: before the race, which wants the host to itself. `builds` holds what came out."""
        self.on_progress(f"compiling {len(candidates)} C candidates", 0.0)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.builds = {item.runtime: pool.submit(self.build, item) for item in candidates}

    def build(self, item: Candidate) -> Path:
        """The generated C of a candidate, compiled into the measuring harness."""
        if item.csource is None:
            raise RankdError(f"candidate {item.runtime} has no C source")
        binary, adapter = self.work / item.runtime, self.work / f"{item.runtime}-adapter.c"
        adapter.write_text(_adapter(item.csource, self.bench(item).signature))
        compile_c([item.csource.source, adapter, HARNESS], binary, (f"-I{item.csource.header.parent}",), item.native)
        return binary

    def report(self, results: list[CandidateResult], winner: str) -> LatencyReport:
        """The results, best tail first, judged by the winner's verdict."""
        best = next(item for item in results if item.runtime == winner)
        results.sort(key=lambda item: (item.paced is None, item.paced.p999_us if item.paced else 0.0))
        return LatencyReport(
            model=self.signature.name,
            budget_us=self.signature.budget_us,
            slot_us=self.signature.slot_us,
            paced_slot_us=self.pace_us,
            host=self.host,
            candidates=results,
            winner=winner,
            verdict=best.verdict or "inconclusive",
            why=best.why,
            seconds=round(time.monotonic() - self.started, 1),
        )

    def measure(self, item: Candidate, runs: int, deadline_s: float) -> CandidateResult:
        """Time one candidate in a process of its own and judge it; a candidate that fails is reported, not raised."""
        blank = CandidateResult(
            runtime=item.runtime, model=item.model, engine=item.engine, precision=item.precision, shippable=item.shippable,
            reason=item.reason,
        )  # fmt: skip
        if item.reason:
            return blank
        try:
            measured = self.run_c if item.engine == "c" else self.run_script
            times, proof = measured(item, runs, deadline_s)
            self.check(item, proof)
        except (RankdError, subprocess.TimeoutExpired) as error:
            return blank.model_copy(update={"reason": f"not measured: {error}"})
        return judge_times(blank, times, self.case_names, self.signature.budget_us)

    def check(self, item: Candidate, proof: Mapping[str, np.ndarray]) -> None:
        """What was timed must compute the model: compare its last outputs with onnxruntime stepping through the samples.

        FP32 must agree; INT8 (where one rounding step is a whole quantum) must be finite, its parity is a gate elsewhere.
        """
        bench = self.bench(item)
        caller = profile_script.ort_caller(str(item.path), bench.rows, bench.signature.state)
        expected = caller.proof(bench.signature.state)
        for name, values in proof.items():
            wanted = expected[name].reshape(values.shape)
            if not np.isfinite(values).all() or (
                item.precision == "fp32" and not np.allclose(values, wanted, rtol=PROOF_RTOL, atol=PROOF_ATOL)
            ):
                raise RankdError(f"the timed build of {item.runtime} computes another {name} than onnxruntime")

    def run_script(self, item: Candidate, runs: int, deadline_s: float) -> tuple[Arrays, Arrays]:
        """Raw times and proof of onnxruntime or OpenVINO, measured by profile_script.py with nothing else in the process."""
        bench, raw = self.bench(item), self.work / f"{item.runtime}.npz"
        command = [sys.executable, str(Path(profile_script.__file__)), str(item.path), "--raw", str(raw)]
        command += ["--budget-us", str(self.signature.budget_us), "--slot-us", str(self.pace_us)]
        command += ["--runs", str(runs), "--back-to-back-runs", str(self.cfg.back_to_back_runs)]
        command += ["--deadline-s", str(deadline_s), "--samples", str(bench.folder / "samples.npz")]
        command += ["--state", json.dumps(bench.signature.state), "--engine", item.engine]
        command += ["--burst-ms", str(self.cfg.burst_ms), "--rest-ms", str(self.cfg.rest_ms)]
        command += ["--warmup", str(self.cfg.warmup_runs)]
        self.execute(command, deadline_s)
        with np.load(raw) as stored:
            self.host |= json.loads(str(stored["host"]))
            times = {name: stored[name] for name in ("back_to_back", "paced", "control")}
            proof = {name: stored[f"proof.{name}"] for name in bench.signature.output_names}
        return times, proof

    def run_c(self, item: Candidate, runs: int, deadline_s: float) -> tuple[Arrays, Arrays]:
        """Raw times and proof of generated C, measured inside a compiled harness."""
        bench, binary = self.bench(item), self.builds[item.runtime].result()
        assert item.csource is not None  # else there is no build
        raw = self.work / f"{item.runtime}.bin"
        core = profile_script.quiet_core()
        numbers = [runs, self.cfg.back_to_back_runs, self.pace_us * 1000, deadline_s * 1000, self.cfg.burst_ms]
        numbers += [self.cfg.rest_ms, self.cfg.warmup_runs, -1 if core is None else core, profile_script.cache_bytes()]
        command = [str(binary), str(bench.folder / "samples.bin"), str(raw), *(str(int(number)) for number in numbers)]
        self.execute(command, deadline_s)
        content = raw.read_bytes()
        back, paced, control, flags = (int(value) for value in np.frombuffer(content, np.int64, 4))
        self.host |= {"core": core, "memory_locked": bool(flags & 1), "realtime": bool(flags & 2)}
        values = np.frombuffer(content, np.int64, back + paced + control, offset=32)
        parts = np.split(values, np.cumsum([back, paced]))
        times = {"back_to_back": parts[0], "paced": parts[1], "control": parts[2]}
        offset, proof = 32 + values.nbytes, {}
        shapes = [declared_shape(text) for text in parameters(item.csource)[len(bench.signature.inputs) :]]
        for spec, shape in zip(bench.signature.outputs, shapes, strict=True):
            proof[spec.name] = np.frombuffer(content, spec.dtype, math.prod(shape), offset).reshape(shape)
            offset += proof[spec.name].nbytes
        return times, proof

    def execute(self, command: list[str], deadline_s: float) -> None:
        """Run a measuring process; it stops itself at its deadline, and is stopped if it does not."""
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=deadline_s * 2 + 30,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=() if self.lock is None else (self.lock,),  # the lock lives as long as what it guards
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RankdError(f"the measuring process stopped: {last[:300]}")


def judge_times(
    blank: CandidateResult, times: Mapping[str, np.ndarray], case_names: list[str], budget_us: float
) -> CandidateResult:
    """Figures and verdict of one candidate from raw times (int64 ns; call i belongs to case i modulo their number).

    A case with too few calls of its own for an interval is judged inconclusive, but the candidate's verdict then rests
    on all its calls together; otherwise on its worst case.
    """
    call_us, control_us = times["paced"] / 1000, times["control"] / 1000
    paced, control = profile_script.summarise(call_us), profile_script.summarise(control_us)
    verdict, why = profile_script.judge(paced, control, budget_us)
    cases = []
    for number, name in enumerate(case_names):
        own = call_us[number :: len(case_names)]
        if len(own):
            tail = profile_script.summarise(own)
            own_verdict, own_why = profile_script.judge(tail, control, budget_us)
            cases.append(CaseResult(name=name, paced=Tail(**tail), verdict=own_verdict, why=own_why))
    cases.sort(key=lambda case: (VERDICT_ORDER[case.verdict], -case.paced.p999_us))
    if cases and all(case.paced.runs >= profile_script.RUNS_FOR_INTERVAL for case in cases):
        verdict, why = cases[0].verdict, f"{cases[0].name}: {cases[0].why}" if len(cases) > 1 else cases[0].why
    back_us = times["back_to_back"] / 1000
    return blank.model_copy(
        update={
            "verdict": verdict,
            "why": why,
            "paced": Tail(**paced),
            "control": Tail(**control),
            "back_to_back": Tail(**profile_script.summarise(back_us)),
            "cases": cases,
            "histogram": _histogram(call_us, back_us, control_us),
        }
    )


def pick(results: list[CandidateResult], scores: Mapping[str, float] | None = None, limit_us: float = math.inf) -> str | None:
    """The runtime with the best paced tail: lowest p99.9; where intervals overlap the best one's, lowest p99, then p50.

    On a noisy host every p99.9 is the host's, and without the second rule chance would choose. Of several students the one
    with the best score wins whose best tail is proven within `limit_us`; if none is, the best tail of all.
    """
    timed = [item for item in results if item.paced is not None]
    if not timed:
        return None
    best_of = {model: _best_tail([item for item in timed if item.model == model]) for model in {item.model for item in timed}}
    fitting = [model for model, item in best_of.items() if item.paced and _proven_us(item.paced) <= limit_us]
    if len(best_of) > 1 and fitting:
        return best_of[max(sorted(fitting), key=lambda model: (scores or {}).get(model, -math.inf))].runtime
    return _best_tail(timed).runtime


def _best_tail(timed: list[CandidateResult]) -> CandidateResult:
    best = min(_proven_us(item.paced) for item in timed if item.paced)
    alike = [item for item in timed if item.paced and item.paced.p999_ci95_us[0] <= best]
    return min(alike, key=lambda item: (item.paced.p99_us, item.paced.p50_us) if item.paced else (0.0, 0.0))


def _proven_us(tail: Tail) -> float:
    """What p99.9 is at most, with 95 % confidence."""
    return tail.p999_ci95_us[1] or tail.max_us


def _histogram(paced: np.ndarray, back_to_back: np.ndarray, control: np.ndarray, bins: int = 120) -> Histogram:
    low = max(min(paced.min(), back_to_back.min(), control.min()), 0.01)
    high = max(paced.max(), back_to_back.max(), control.max(), low * 1.01)
    edges = np.geomspace(low * 0.99, high * 1.01, bins + 1)
    counts = [np.histogram(values, edges)[0].tolist() for values in (paced, back_to_back, control)]
    edges_us = [float(f"{edge:.4g}") for edge in edges]
    return Histogram(edges_us=edges_us, paced=counts[0], back_to_back=counts[1], control=counts[2])


def _interleave(signature: ModelSignature, cases: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One array per input whose row r belongs to case r modulo the number of cases; states start at zero."""
    count = min(len(values) for case in cases.values() for values in case.values())
    if count == 0:
        raise RankdError(f"Latency of model {signature.name}: no samples given.")
    count = min(count, 512)
    rows = {}
    for spec in signature.inputs:
        parts = []
        for case in cases.values():
            if spec.name in case:
                parts.append(np.asarray(case[spec.name][:count], dtype=spec.dtype).reshape(count, *spec.shape))
            elif spec.name in signature.state:
                parts.append(np.zeros((count, *spec.shape), dtype=spec.dtype))
            else:
                raise RankdError(f"Latency of model {signature.name}: samples lack input {spec.name}.")
        rows[spec.name] = np.stack(parts, axis=1).reshape(count * len(parts), *spec.shape)
    return rows


def _write_flat(signature: ModelSignature, rows: Mapping[str, np.ndarray], path: Path) -> None:
    """Sample after sample, each input after input: what latency_harness.c reads."""
    flat = [np.ascontiguousarray(rows[spec.name]).reshape(len(rows[spec.name]), -1).view(np.uint8) for spec in signature.inputs]
    np.concatenate(flat, axis=1).tofile(path)


def _adapter(csource: CSource, signature: ModelSignature) -> str:
    """C that gives the harness one calling convention: arrays of pointers, sizes, and which output feeds which input."""
    declared = parameters(csource)
    specs = (*signature.inputs, *signature.outputs)
    if len(declared) != len(specs):
        raise RankdError(f"{csource.header} declares {len(declared)} tensors; the signature has {len(specs)}.")
    inputs = len(signature.inputs)
    counts = [math.prod(declared_shape(text)) for text in declared]
    if counts[:inputs] != [spec.elements for spec in signature.inputs]:
        raise RankdError(f"{csource.header} declares inputs of {counts[:inputs]} values; the signature has others.")
    # Sizes of outputs are the C function's own: a foreign file's graph may leave them open.
    sizes = [count * np.dtype(spec.dtype).itemsize for count, spec in zip(counts, specs, strict=True)]
    state = [
        signature.output_names.index(signature.state[name]) if name in signature.state else -1 for name in signature.input_names
    ]
    # void pointers convert to any array parameter, so the call needs no casts.
    arguments = [f"inputs[{i}]" for i in range(inputs)] + [f"outputs[{i}]" for i in range(len(specs) - inputs)]
    return (
        f'#include <stddef.h>\n#include "{csource.header.name}"\n'
        f"const int rankd_inputs = {inputs}, rankd_outputs = {len(specs) - inputs};\n"
        f"const size_t rankd_input_bytes[] = {{{', '.join(map(str, sizes[:inputs]))}}};\n"
        f"const size_t rankd_output_bytes[] = {{{', '.join(map(str, sizes[inputs:]))}}};\n"
        f"const int rankd_state[] = {{{', '.join(map(str, state))}}};\n"
        f"void rankd_call(void **inputs, void **outputs);\n"
        f"void rankd_call(void **inputs, void **outputs)\n{{\n    {csource.name}({', '.join(arguments)});\n}}\n"
    )


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None
