"""Profile one ONNX model on this machine: how long one call takes, with its tail, against a time budget.

Needs only numpy and onnxruntime:   python profile_model.py model.onnx --budget-us 100

What is measured, and why so:
- one thread, pinned to one core, memory locked, garbage collector off, real-time priority in bursts where permitted
  (rests between bursts keep the kernel's real-time throttle away; without rests it tears holes of 45-85 ms);
- `back to back`, and `paced`: one call a slot with the caches dirtied in between, as a DU calls it. The paced
  figures are judged, because back to back flatters;
- a `control` of fixed arithmetic of like length in every slot. It touches no memory, so its tail is the host's own.

rankd runs this very file as its worker, and a bundle carries a copy of it for the target machine
(not called profile.py, which would shadow a module of the standard library).
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

Verdict = Literal["pass", "fail", "inconclusive"]

PROOF_STEPS = 16
TAIL = 0.001  # p99.9 leaves one call in a thousand above it
RUNS_FOR_INTERVAL = 3688  # below ln(0.025) / ln(0.999) calls no order statistic bounds p99.9 from above


# --- what the numbers say ------------------------------------------------------------------------------------------


def tail_interval(sorted_us: np.ndarray, tail: float = TAIL) -> tuple[float, float | None]:
    """95 % interval of the `1 - tail` quantile from order statistics (distribution-free, binomial).

    The number of calls above the true quantile is Binomial(n, tail); the bounds are the calls with those ranks from the
    top. The upper bound is None when n is too small for one. Calls are taken as independent; bursts of host noise are
    not, so on a noisy host the true interval is wider.
    """
    count = len(sorted_us)
    above, cumulated, upper_rank, lower_rank = 0, 0.0, 0, 0
    while cumulated < 0.975 and above <= count:
        log_p = (
            math.lgamma(count + 1)
            - math.lgamma(above + 1)
            - math.lgamma(count - above + 1)
            + above * math.log(tail)
            + (count - above) * math.log1p(-tail)
        )
        cumulated += math.exp(log_p)
        if cumulated <= 0.025:
            upper_rank = above + 1
        above += 1
    lower_rank = min(above, count)
    low = float(sorted_us[count - lower_rank])
    return low, float(sorted_us[count - upper_rank]) if upper_rank else None


def summarise(times_us: np.ndarray) -> dict[str, Any]:
    """p50, p99, p99.9 with its 95 % interval, max of call times in us. Raises ValueError without calls."""
    if not len(times_us):
        raise ValueError("no calls were timed")
    ordered = np.sort(np.asarray(times_us, dtype=np.float64))

    def quantile(level: float) -> float:
        return float(ordered[min(math.ceil(level * len(ordered)), len(ordered)) - 1])

    return {
        "runs": len(ordered),
        "p50_us": quantile(0.5),
        "p99_us": quantile(0.99),
        "p999_us": quantile(1 - TAIL),
        "p999_ci95_us": tail_interval(ordered),
        "max_us": float(ordered[-1]),
    }


def judge(call: dict[str, Any], control: dict[str, Any], budget_us: float) -> tuple[Verdict, str]:
    """Verdict on the paced p99.9 against the budget, and why: ("pass" | "fail" | "inconclusive", one sentence).

    pass: the whole interval is within the budget. fail: the median is over it, or the whole interval is over it by more
    than the host's own tail (control p99.9 - control p50, what the host adds to fixed work). Otherwise inconclusive.
    """
    low, high = call["p999_ci95_us"]
    host_us = control["p999_us"] - control["p50_us"]
    if high is not None and high <= budget_us:
        return "pass", f"p99.9 is at most {high:.1f} us (95 %), within {budget_us:g} us"
    if call["p50_us"] > budget_us:
        return "fail", f"already the median, {call['p50_us']:.1f} us, is over {budget_us:g} us"
    if low > budget_us:
        if low - host_us <= budget_us:
            return "inconclusive", (
                f"p99.9 is at least {low:.1f} us, over {budget_us:g} us, but the host alone adds {host_us:.1f} us"
            )
        return "fail", f"p99.9 is at least {low:.1f} us (95 %), over {budget_us:g} us; the host adds {host_us:.1f} us"
    if high is None:
        return "inconclusive", f"{call['runs']} calls are too few to bound p99.9; {RUNS_FOR_INTERVAL} are needed"
    return "inconclusive", f"{budget_us:g} us lies inside the interval of p99.9, {low:.1f} to {high:.1f} us"


# --- the host ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def host_lock(wait_s: float, on_wait: Callable[[str], None] = lambda message: None) -> Iterator[int | None]:
    """Hold the host-wide lock, so that never two profiles run beside each other. Raises TimeoutError after `wait_s`.

    Yields the lock's descriptor: a child that inherits it keeps the lock should this process be killed.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no lock, no real-time priority, but figures
        yield None
        return
    path = Path(tempfile.gettempdir()) / "rankd-profile.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.suppress(OSError):
        os.chmod(path, 0o666)  # another user's profile must be able to wait for it
    try:
        started, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    on_wait("waiting for another latency profile on this host")
                    told = True
                if time.monotonic() - started > wait_s:
                    raise TimeoutError(f"another latency profile held {path} for {wait_s:g} s") from None
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)  # closing releases the lock


def quiet_core() -> int | None:
    """The core to pin to: the last allowed one, because core 0 takes most interrupts."""
    return max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def prepare_host() -> dict[str, Any]:
    """Pin, lock memory and try real-time priority; says what was permitted and describes the machine."""
    core = quiet_core()
    if core is not None:
        os.sched_setaffinity(0, {core})
    locked = False
    with contextlib.suppress(OSError, AttributeError):
        locked = ctypes.CDLL(None).mlockall(3) == 0  # MCL_CURRENT | MCL_FUTURE
    return {**describe_host(), "core": core, "memory_locked": locked, "realtime": realtime(False)}


def describe_host() -> dict[str, Any]:
    """What the figures belong to: processor, cores, kernel, load when measured."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "load_1min": load}


def realtime(on: bool) -> bool:
    """Switch SCHED_FIFO on or off; True if this host permits it. (Called with False it only asks: on, then off.)"""
    if not hasattr(os, "sched_setscheduler"):
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
        if not on:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except OSError:
        return False
    return True


def cache_bytes() -> int:
    """Twice the private L2 cache (1 to 4 MiB), so that writing this much leaves nothing of the model in it."""
    with contextlib.suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return min(max(2 * int(text.rstrip("K")) * 1024, 1 << 20), 4 << 20)
    return 2 << 20


# --- the measurement -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caller:
    """A model ready to be timed: `load(i)` writes sample i (and carried state) into its inputs, `call()` runs it."""

    load: Callable[[int], None]
    call: Callable[[], None]
    outputs: Callable[[], dict[str, np.ndarray]]

    def proof(self, state: dict[str, str]) -> dict[str, np.ndarray]:
        """The outputs after stepping through the first samples once from zero state: what is timed computes this."""
        for name in state.values():
            self.outputs()[name][...] = 0
        for index in range(PROOF_STEPS):
            self.load(index)
            self.call()
        return {name: np.array(values) for name, values in self.outputs().items()}


def ort_caller(model: str, samples: dict[str, np.ndarray], state: dict[str, str]) -> Caller:
    """onnxruntime with io-binding."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])
    rows = {name: values.reshape((len(values), *_static(session, name))) for name, values in samples.items()}
    inputs = {name: np.array(values[0]) for name, values in rows.items()}
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, (np.array(o, order="C") for o in session.run(names, inputs)), strict=True))
    # An inner axis that the graph leaves open may change with the data: then onnxruntime allocates the output.
    open_shape = any(not isinstance(size, int) for output in session.get_outputs() for size in output.shape[1:])
    binding = session.io_binding()
    for name, buffer in inputs.items():
        binding.bind_input(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
    for name, buffer in outputs.items():
        if open_shape and not state:
            binding.bind_output(name, "cpu")
            continue
        binding.bind_output(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
    count = len(next(iter(rows.values())))

    def load(index: int) -> None:
        for name, buffer in inputs.items():
            buffer[...] = outputs[state[name]] if name in state else rows[name][index % count]

    run = session.run_with_iobinding

    def call() -> None:
        run(binding)

    def read() -> dict[str, np.ndarray]:
        return outputs if state or not open_shape else dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    return Caller(load, call, read)


def openvino_caller(model: str, samples: dict[str, np.ndarray], state: dict[str, str]) -> Caller:
    """OpenVINO, one stream, one thread; only where the package is installed."""
    import openvino as ov  # pyright: ignore[reportMissingImports]  # an optional extra

    compiled = ov.Core().compile_model(
        model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": 1}
    )
    request = compiled.create_infer_request()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    rows = {name: values.reshape((len(values), *_static(session, name))) for name, values in samples.items()}
    inputs = {name: np.array(values[0]) for name, values in rows.items()}
    for name, buffer in inputs.items():
        request.set_tensor(name, ov.Tensor(buffer, shared_memory=True))
    request.infer()
    count = len(next(iter(rows.values())))

    def load(index: int) -> None:
        for name, buffer in inputs.items():
            fed_back = request.get_tensor(state[name]).data if name in state else None
            buffer[...] = rows[name][index % count] if fed_back is None else fed_back

    def call() -> None:
        request.infer()

    names = [output.get_any_name() for output in compiled.outputs]
    return Caller(load, call, lambda: {name: request.get_tensor(name).data for name in names})


def save_arrays(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` as npz without pickle."""
    np.savez(path, allow_pickle=False, **arrays)


def _static(session: ort.InferenceSession, name: str) -> tuple[int, ...]:
    """The input's shape for one call: a dynamic axis is 1."""
    shape = next(value.shape for value in session.get_inputs() if value.name == name)
    return tuple(size if isinstance(size, int) else 1 for size in shape)


def random_samples(model: str, count: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the right shape and dtype for any model: normal floats, integers and booleans 0 or 1."""
    dtypes = {"float": "float32", "double": "float64", "bool": "bool", "float16": "float16"}
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(seed)
    samples = {}
    for value in session.get_inputs():
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        dtype = np.dtype(dtypes.get(kind, kind))
        shape = (count, *_static(session, value.name))
        whole = generator.integers(0, 2, shape) if dtype.kind in "iub" else generator.standard_normal(shape)
        samples[value.name] = np.asarray(whole).astype(dtype)
    return samples


def control_work(target_us: float) -> Callable[[], None]:
    """Fixed arithmetic that takes about `target_us` on this core and touches no memory beyond the interpreter's own."""

    def work(turns: int) -> None:
        for _ in range(turns):
            pass

    turns = 4096
    best_ns = min(_timed(lambda: work(turns)) for _ in range(50))
    needed = max(1, int(turns * target_us * 1000 / best_ns))
    return lambda: work(needed)


def _timed(call: Callable[[], None]) -> int:
    started = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - started


def measure(
    caller: Caller,
    paced_runs: int,
    back_to_back_runs: int,
    slot_us: float,
    deadline_s: float,
    burst_ms: float = 90.0,
    rest_ms: float = 8.0,
    warmup_runs: int = 500,
) -> dict[str, np.ndarray]:
    """Time calls; returns int64 ns arrays `back_to_back`, `paced`, `control` (as many as fit before the deadline).

    Call i of each array ran on sample i. Real-time priority is on inside a burst only, and off when this returns.
    """
    ends = time.monotonic() + deadline_s
    for index in range(warmup_runs):
        caller.load(index)
        caller.call()
        if time.monotonic() > ends:
            break
    gc.collect()
    gc.disable()
    try:
        permitted = realtime(False)
        pace = _Pace(caller, slot_us, permitted, burst_ms, rest_ms)
        back_to_back = pace.run(back_to_back_runs, time.monotonic() + deadline_s / 4, paced=False)
        paced = pace.run(paced_runs, ends, paced=True)
    finally:
        gc.enable()
    return {"back_to_back": back_to_back[0], "paced": paced[0], "control": paced[1]}


class _Pace:
    """Runs calls in bursts: back to back, or one a slot with the caches dirtied and the control timed between."""

    def __init__(self, caller: Caller, slot_us: float, permitted: bool, burst_ms: float, rest_ms: float) -> None:
        self.load, self.call, self.slot_ns = caller.load, caller.call, int(slot_us * 1000)
        self.permitted, self.burst_ns, self.rest_s = permitted, int(burst_ms * 1e6), rest_ms / 1000
        self.dirt = np.zeros(cache_bytes() // 8, dtype=np.int64)
        self.control = control_work(min(_timed(caller.call) for _ in range(50)) / 1000)

    def run(self, runs: int, ends: float, paced: bool) -> tuple[np.ndarray, np.ndarray]:
        """Time up to `runs` calls until monotonic time `ends`; returns (call ns, control ns)."""
        calls, controls, done = np.zeros(runs, np.int64), np.zeros(runs, np.int64), 0
        while done < runs and (done == 0 or time.monotonic() < ends):
            if self.permitted:
                realtime(True)
            try:
                done = self._burst(calls, controls, done, paced)
            finally:
                if self.permitted:
                    realtime(False)
            time.sleep(self.rest_s)
        return calls[:done], controls[:done]

    def _burst(self, calls: np.ndarray, controls: np.ndarray, done: int, paced: bool) -> int:
        clock, call, control, load = time.perf_counter_ns, self.call, self.control, self.load
        stop = clock() + self.burst_ns
        slot = clock()
        while done < len(calls) and slot < stop:
            if paced:
                np.add(self.dirt[::8], 1, out=self.dirt[::8])  # one write a cache line
                controls[done] = _timed(control)
            load(done)
            slot = max(slot + self.slot_ns, clock()) if paced else clock()
            while clock() < slot:
                pass
            started = clock()
            call()
            calls[done] = clock() - started
            done += 1
        return done


def main(arguments: list[str] | None = None) -> int:
    """Command line: profile one model and print the figures; exit code 3 when it misses its budget."""
    parser = argparse.ArgumentParser(description="Time one call of an ONNX model on this machine.")
    parser.add_argument("model", help="ONNX file")
    parser.add_argument("--budget-us", type=float, required=True, help="time one call may take")
    parser.add_argument("--slot-us", type=float, default=500.0, help="one paced call every so often")
    parser.add_argument("--runs", type=int, default=10_000, help="paced calls")
    parser.add_argument("--back-to-back-runs", type=int, default=10_000)
    parser.add_argument("--deadline-s", type=float, default=60.0, help="stop measuring after so long")
    parser.add_argument("--burst-ms", type=float, default=90.0, help="real-time priority for so long at a time")
    parser.add_argument("--rest-ms", type=float, default=8.0, help="rest between bursts")
    parser.add_argument("--warmup", type=int, default=500, help="untimed calls first")
    parser.add_argument("--samples", help="npz with one array [n, ...] per input (default: random inputs)")
    parser.add_argument("--state", default="{}", help='JSON, carried state: {"input": "output"}')
    parser.add_argument("--engine", choices=["onnxruntime", "openvino"], default="onnxruntime")
    parser.add_argument("--raw", help="write all times to this npz; the caller then holds the host lock")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    samples = dict(np.load(options.samples)) if options.samples else random_samples(options.model)
    make = ort_caller if options.engine == "onnxruntime" else openvino_caller
    state = json.loads(options.state)
    caller = make(options.model, samples, state)
    lock = contextlib.nullcontext() if options.raw else host_lock(600.0, lambda text: print(text, file=sys.stderr))
    with lock:
        host = prepare_host()
        times = measure(
            caller,
            options.runs,
            options.back_to_back_runs,
            options.slot_us,
            options.deadline_s,
            options.burst_ms,
            options.rest_ms,
            options.warmup,
        )
    if options.raw:
        proof = {f"proof.{name}": values for name, values in caller.proof(state).items()}
        save_arrays(options.raw, {"host": np.array(json.dumps(host)), **times, **proof})
        return 0
    report = {name: summarise(values / 1000) for name, values in times.items()}
    verdict, why = judge(report["paced"], report["control"], options.budget_us)
    if options.json:
        print(json.dumps({**report, "host": host, "budget_us": options.budget_us, "verdict": verdict, "why": why}))
    else:
        _print_table(options.model, report, host, verdict, why)
    return 3 if verdict == "fail" else 0


def _print_table(model: str, report: dict[str, Any], host: dict[str, Any], verdict: str, why: str) -> None:
    permits = f"core {host['core']}, memory locked {host['memory_locked']}, real time {host['realtime']}"
    print(f"{model} on {host['cpu']} ({permits})")
    print(f"{'us':>14} {'runs':>7} {'p50':>9} {'p99':>9} {'p99.9':>9} {'max':>9}")
    for name, tail in report.items():
        figures = " ".join(f"{tail[key]:9.2f}" for key in ("p50_us", "p99_us", "p999_us", "max_us"))
        print(f"{name.replace('_', ' '):>14} {tail['runs']:7d} {figures}")
    print(f"{verdict}: {why}")


if __name__ == "__main__":
    sys.exit(main())
