"""`rankd doctor`: what is installed, what is missing, whether the home is sound, and how noisy this host is."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from rankd_pipeline.settings import Settings, settings

NEEDED = (
    "dagster", "dagster-webserver", "mlflow", "torch", "sionna-no-rt", "onnx", "onnxscript", "onnxruntime", "emx-onnx-cgen",
    "numpy", "scipy", "scikit-learn", "pandas", "pyarrow", "pydantic", "safetensors", "fsspec", "matplotlib",
)  # fmt: skip
OPTIONAL = {
    "openvino": "one more runtime in the race",
    "dagster-postgres": "Dagster's storage on a server",
    "psycopg2-binary": "the same",
}
JITTER_US, JITTER_RUNS = 20.0, 40_000
Line = tuple[str, str, str]
"""(ok, note or MISSING; what; finding)"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
def doctor(as_json: bool) -> int:
    """What is installed, what is missing, and how noisy this host is. Exit code 2 if something needed is missing."""
    current = settings()
    parts = {
        "packages": list(_packages()),
        "tools": list(_tools()),
        "home": list(_home(current)),
        "databases": list(_databases(current)),
    }
    jitter = None if any(status == "MISSING" for status, *_ in parts["packages"]) else measure_jitter()
    bad = any(status == "MISSING" for lines in parts.values() for status, *_ in lines)
    if as_json:
        click.echo(
            json.dumps({**{name: [list(line) for line in lines] for name, lines in parts.items()}, "jitter": jitter}, indent=1)
        )
        return 2 if bad else 0
    for name, lines in parts.items():
        click.secho(name, bold=True)
        for status, what, finding in lines:
            click.echo(f"  {status:8s}{what:22s}{finding}")
    if jitter is not None:
        _print_jitter(jitter)
    return 2 if bad else 0


def _packages() -> Iterator[Line]:
    yield "ok" if sys.version_info >= (3, 11) else "MISSING", "python", platform.python_version()
    for name in NEEDED:
        found = _version(name)
        yield ("ok", name, found) if found else ("MISSING", name, f"install it: pip install {name}")
    for name, use in OPTIONAL.items():
        found = _version(name)
        yield ("ok", name, found) if found else ("note", name, f"not installed; {use}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _tools() -> Iterator[Line]:
    compiler = next((found for name in (os.environ.get("CC") or "cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        yield "note", "C compiler", "none (cc, gcc or clang): generated C is 'not built' and onnxruntime is raced alone"
    else:
        first = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
        yield "ok", "C compiler", f"{compiler}: {first[0] if first else 'version unknown'}"
    cores = len(os.sched_getaffinity(0))
    yield "ok" if cores >= 2 else "note", "cores", f"{cores} usable, load {os.getloadavg()[0]:.1f}"


def _home(current: Settings) -> Iterator[Line]:
    from rankd_pipeline.steps.runner import open_store

    yield (
        ("ok" if current.initialised else "note"),
        "home",
        f"{current.home}" + ("" if current.initialised else " (`rankd init` makes it)"),
    )
    there = next(path for path in (current.home, *current.home.parents) if path.exists())
    free_gb = shutil.disk_usage(there).free / 1e9
    yield ("ok" if free_gb > 2 else "note"), "free disk", f"{free_gb:.1f} GB" + ("" if free_gb > 2 else ": a laptop run wants 2 GB")
    yield ("ok" if os.access(there, os.W_OK) else "MISSING"), "writable", str(there)
    if current.initialised:
        count = sum(1 for _ in open_store(current).artifacts())
        yield "ok", "store", f"{current.store_uri}: {count} artifacts"


def _databases(current: Settings) -> Iterator[Line]:
    """SQLite files by their own integrity check; servers by whether they answer."""
    if current.postgres_url:
        yield _answers("Dagster", current.postgres_url)
    else:
        for path in sorted(current.dagster_home.glob("history/*.db")) + sorted(current.dagster_home.glob("schedules/*.db")):
            yield _sqlite(f"Dagster {path.parent.name}", str(path))
    if current.mlflow_uri.startswith("sqlite:///"):
        yield _sqlite("MLflow", current.mlflow_uri.removeprefix("sqlite:///"))
    else:
        yield _answers("MLflow", current.mlflow_uri)


def _sqlite(what: str, path: str) -> Line:
    import sqlite3

    if not os.path.exists(path):
        return "note", what, f"{path}: not made yet (`rankd init`)"
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5) as connection:
            answer = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        answer = str(error)
    return ("ok" if answer == "ok" else "MISSING"), what, f"{path}: {answer}"


def _answers(what: str, url: str) -> Line:
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    port = parts.port or {"postgresql": 5432, "https": 443}.get(parts.scheme, 80)
    where = f"{parts.hostname}:{port}"
    try:
        socket.create_connection((parts.hostname or "localhost", port), timeout=2).close()
    except OSError as error:
        return "MISSING", what, f"{where} does not answer ({error})"
    return "ok", what, f"{where} answers"


def measure_jitter() -> dict[str, Any]:
    """Time fixed arithmetic of about 20 us over and over, in a process of its own, pinned as the latency race is."""
    code = (
        "import json,sys,time,numpy as np;from rankd_pipeline.runtime import profile_script as p;"
        "host=p.prepare_host();work=p.control_work(float(sys.argv[1]));runs=int(sys.argv[2]);t=np.zeros(runs,np.int64);\n"
        "for i in range(runs):\n a=time.perf_counter_ns();work();t[i]=time.perf_counter_ns()-a\n"
        "us=t/1000;edges=np.quantile(us,0.5)*np.array([0,1.1,1.5,2,5,10,100,1e9]);"
        "print(json.dumps({**p.summarise(us),'histogram':np.histogram(us,edges)[0].tolist(),'host':host}))"
    )
    command = [sys.executable, "-c", code, str(JITTER_US), str(JITTER_RUNS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip().splitlines()[-1]}


def _print_jitter(jitter: dict[str, Any]) -> None:
    click.secho("noise of this host", bold=True)
    if "error" in jitter:
        click.echo(f"  could not be measured: {jitter['error']}")
        return
    host = jitter["host"]
    click.echo(f"  {host['cpu']}, core {host['core']}, real-time priority {'permitted' if host['realtime'] else 'not permitted'}")
    figures = ", ".join(f"{name} {jitter[key]:.1f}" for name, key in
                        (("p50", "p50_us"), ("p99", "p99_us"), ("p99.9", "p999_us"), ("max", "max_us")))  # fmt: skip
    click.echo(f"  {jitter['runs']} turns of the same arithmetic, us: {figures}")
    names = ("up to 1.1 x p50", "to 1.5 x", "to 2 x", "to 5 x", "to 10 x", "to 100 x", "more")
    for name, count in zip(names, jitter["histogram"], strict=True):
        share = count / jitter["runs"]
        click.echo(f"  {name:>16s} {share:8.3%} {'#' * round(40 * share)}")
    added = jitter["p999_us"] - jitter["p50_us"]
    quiet = (
        "quiet enough to prove a 100 us budget"
        if added < 20
        else "a tail below that cannot be told from the host's: expect 'inconclusive'"
    )
    click.echo(f"  one call in a thousand is delayed by {added:.1f} us or more by the host itself: {quiet}.")
