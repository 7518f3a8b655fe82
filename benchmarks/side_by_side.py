"""rankd against the plain way of doing the same, side by side in one run: `python -m benchmarks.side_by_side [NAME ...]`.

Each comparison alternates the two sides (A B A B ...) and prints the median of the paired ratios, so that what else the
host does hits both alike. `--write` puts the rows with machine and date into benchmarks/results/side_by_side.md.
"""

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "side_by_side.md"


@dataclass(frozen=True)
class Row:
    """One comparison. ratio: ours / reference of the stated figure; target: what it should reach."""

    name: str
    ours: str
    reference: str
    ratio: float
    target: str
    met: bool | None


def alternate(ours: Callable[[], float], reference: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Medians of both sides and of the ratio, over alternating rounds; the first round warms up and is not counted."""
    pairs = [(ours(), reference()) for _ in range(rounds + 1)][1:]
    return tuple(statistics.median(values) for values in (  # type: ignore[return-value]
        [a for a, _ in pairs], [b for _, b in pairs], [a / b for a, b in pairs]
    ))  # fmt: skip


def training() -> list[Row]:
    """Samples/s of `fit` against a bare PyTorch loop: same network, data, optimizer, batch; one thread."""
    import torch

    from rankd_pipeline.ran_functions.beam_management.networks import BeamMLP
    from rankd_pipeline.training.fit import FitConfig, fit

    rows, batch, epochs = 24_000, 256, 6
    generator = np.random.default_rng(0)
    rsrp = generator.normal(-95, 12, (rows, 1, 16)).astype(np.float32)
    mask = (generator.random((rows, 1, 16)) < 0.8).astype(np.uint8)
    label = generator.integers(0, 64, rows)

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        model = BeamMLP(set_b_rows=2, set_b_cols=8, set_a_rows=4, set_a_cols=16, history=1, hidden=(16, 12))
        model.normalizer.learn(rsrp, mask)
        return model

    def ours() -> float:
        with tempfile.TemporaryDirectory() as work:
            result = fit(
                network(), {"rsrp": rsrp, "mask": mask, "label": label},
                lambda model, b: torch.nn.functional.cross_entropy(model(b["rsrp"], b["mask"]), b["label"]), lambda model: 0.0,
                FitConfig(epochs=epochs, batch_size=batch, lr=1e-3), 0, Path(work),
            )  # fmt: skip
        return result.samples_per_s

    def bare() -> float:
        torch.set_num_threads(1)
        model, tensors = network(), [torch.from_numpy(value) for value in (rsrp, mask, label)]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        started = time.perf_counter()
        for _ in range(epochs):
            order = torch.randperm(rows)
            for start in range(0, rows, batch):
                x, m, y = (tensor[order[start : start + batch]] for tensor in tensors)
                loss = torch.nn.functional.cross_entropy(model(x, m), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return rows * epochs / (time.perf_counter() - started)

    a, b, ratio = alternate(ours, bare, 5)
    return [Row("training, samples/s", f"{a:,.0f} (fit)", f"{b:,.0f} (bare loop)", ratio, ">= 0.9", ratio >= 0.9)]


def corpus() -> list[Row]:
    """Samples/s of the corpus against plain Sionna at its best batch: same band, scenario, users, one thread each."""
    import torch
    from sionna.phy.channel import gen_single_sector_topology
    from sionna.phy.channel.tr38901 import PanelArray, UMi

    from rankd_pipeline.radio import codebooks
    from rankd_pipeline.ran_functions.beam_management.config import BandConfig, BeamCorpusConfig, SiteConfig
    from rankd_pipeline.ran_functions.beam_management.simulate import plan_shards, simulate_shard

    torch.set_num_threads(1)
    band = BandConfig(ghz=28.0, scs_khz=120.0, resource_blocks=66, eirp_dbm=62.0)
    site = SiteConfig(name="a", scenario="UMi", isd_m=200.0, bs_height_m=10.0, indoor_share=0.3, speed_kmh=(0.0, 3.0))
    config = BeamCorpusConfig(
        sites=(site,), bands=(band,), seen_samples=1024, heldout_site_samples=0, heldout_band_samples=0, shard_samples=1024
    )  # fmt: skip
    shards = plan_shards(config, 0)
    array = PanelArray(4, 16, "single", "V", "38.901", 28e9)
    user = PanelArray(1, 1, "single", "V", "omni", 28e9)
    beams = torch.from_numpy(np.concatenate([codebooks.dft_codebook(4, 16), codebooks.wide_beams(4, 16, 2, 8)]))

    def ours() -> float:
        started = time.perf_counter()
        samples = sum(simulate_shard(config, shard).features.num_rows for shard in shards)
        return samples / (time.perf_counter() - started)

    def plain(batch: int) -> float:
        """Sionna's own coefficients of every antenna, then the beams' power summed over paths: the textbook way."""
        model = UMi(28e9, "low", user, array, "downlink")
        count = max(1, 512 // batch)
        started = time.perf_counter()
        for _ in range(count):
            model.set_topology(*gen_single_sector_topology(batch, 4, "umi"))
            gains, _ = model(1, 1.0)
            paths = gains[:, :, 0, 0].squeeze(-1)  # [batch, users, antennas, paths]
            torch.einsum("na,buap->bunp", beams, paths).abs().square().sum(-1)
        return batch * 4 * count / (time.perf_counter() - started)

    best = max((8, 16, 32, 64), key=plain)
    a, b, ratio = alternate(ours, lambda: plain(best), 3)
    return [
        Row("corpus, samples/s", f"{a:,.0f} (beamspace)", f"{b:,.0f} (plain Sionna, {best} drops of 4)", ratio, ">= 1", ratio >= 1)
    ]


def chain(scale: str = "laptop") -> list[Row]:
    """Wall time of `rankd run` in a fresh home against its step functions called directly in another."""
    import subprocess
    import sys

    def timed(command: list[str], home: str) -> float:
        environment = {**os.environ, "RANKD_HOME": home}
        subprocess.run([sys.executable, "-m", "rankd_pipeline.cli", "init"], env=environment, check=True, capture_output=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", *command], env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        ours = timed(["rankd_pipeline.cli", "run", "beam_management", "--scale", scale], one)
        direct = timed(["rankd_pipeline_tests.steps.run_chain", scale], other)
    ratio = ours / direct
    return [
        Row(
            f"chain at {scale}, s",
            f"{ours:.0f} (through Dagster)",
            f"{direct:.0f} (steps called directly)",
            ratio,
            "<= 1.15",
            ratio <= 1.15,
        )
    ]


def latency() -> list[Row]:
    """The student's generated C against PyTorch eager and against a C MLP written by hand, by p50 of one call."""
    import torch

    from benchmarks.handwritten import handwritten_c
    from rankd_pipeline.ran_functions.beam_management.function import BeamManagement
    from rankd_pipeline.runtime.c_export import generate_c
    from rankd_pipeline.runtime.latency import Candidate, LatencyConfig, profile
    from rankd_pipeline.runtime.onnx_export import export_onnx

    function = BeamManagement()
    config = function.corpus_config({})
    torch.manual_seed(0)
    student = function.student(config, {"hidden": [32, 24]})
    generator = np.random.default_rng(0)
    samples = {
        "l1_rsrp_dbm": generator.normal(-95, 12, (512, 1, 16)).astype(np.float32),
        "l1_rsrp_mask": (generator.random((512, 1, 16)) < 0.8).astype(np.uint8),
    }
    function.set_statistics(student, samples)
    module = function.deployable(student, {"temperature": 1.1}).eval()
    signature = function.signatures(config, 100.0)[0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        export_onnx(module, signature, work / "m.onnx", {})
        generated = generate_c(work / "m.onnx", work / "g", "generated")
        byhand = handwritten_c(module, work / "h")
        race = profile(
            [Candidate(runtime=name, engine="c", path=work / "m.onnx", csource=source) for name, source in
             (("generated", generated), ("by hand", byhand))],
            signature, LatencyConfig(paced_runs=10_000, winner_runs=10_000, max_seconds=60), samples, work / "race",
        )  # fmt: skip
    figures = {item.runtime: item for item in race.candidates}
    for kind in ("back_to_back", "paced"):
        tails = {name: getattr(item, kind) for name, item in figures.items()}
        a, b = tails["generated"].p50_us, tails["by hand"].p50_us
        rows.append(
            Row(
                f"student call, {kind.replace('_', ' ')} p50, us", f"{a:.2f} (generated C)", f"{b:.2f} (C by hand)", a / b, "", None
            )
        )
    eager = eager_p50_us(module, samples)
    ours = figures["generated"].back_to_back.p50_us if figures["generated"].back_to_back else float("nan")
    rows.append(
        Row(
            "student call, back to back p50, us",
            f"{ours:.2f} (generated C)",
            f"{eager:.1f} (PyTorch eager)",
            ours / eager,
            "< 1",
            ours < eager,
        )
    )
    return rows


def eager_p50_us(module, samples: dict[str, np.ndarray], calls: int = 3000) -> float:
    """Median time of one call of a PyTorch module, samples one by one, one thread."""
    import torch

    torch.set_num_threads(1)
    count = len(next(iter(samples.values())))
    inputs = [{name: torch.from_numpy(value[i : i + 1]) for name, value in samples.items()} for i in range(count)]
    times = []
    with torch.inference_mode():
        for i in range(calls):
            started = time.perf_counter_ns()
            module(**inputs[i % count])
            times.append(time.perf_counter_ns() - started)
    return statistics.median(times[calls // 5 :]) / 1000


def estimation() -> list[Row]:
    """Channel estimation: its corpus against plain Sionna, and the student's generated C against PyTorch eager at 4 and 24 PRB."""
    return [_estimation_corpus(), *(_estimation_call(variant, blocks) for variant, blocks in (("default", 4), ("prb24", 24)))]


def _estimation_corpus(slots: int = 1024) -> Row:
    """Slots/s on one thread, TDL-C, one antenna: ours gives every user a delay spread and speed of its own, and the bound's
    statistics; plain Sionna draws all from one model, as its tutorial on PUSCH does."""
    import torch
    from sionna.phy.channel import OFDMChannel
    from sionna.phy.channel.tr38901 import TDL
    from sionna.phy.nr import PUSCHConfig, PUSCHLSChannelEstimator, PUSCHTransmitter

    from rankd_pipeline.ran_functions.channel_estimation.config import BandConfig, ChannelCorpusConfig, ProfileConfig
    from rankd_pipeline.ran_functions.channel_estimation.simulate import plan_shards, simulate_shard

    torch.set_num_threads(1)
    ours_cfg = ChannelCorpusConfig(
        profiles=(ProfileConfig(name="a", model="TDL-C"),), bands=(BandConfig(ghz=3.5),), receive_antennas=(1, 1),
        seen_slots=slots, heldout_profile_slots=0, heldout_band_slots=0,
    )  # fmt: skip
    shards = plan_shards(ours_cfg, 0)
    cfg = PUSCHConfig()
    cfg.carrier.n_size_grid, cfg.carrier.subcarrier_spacing = 4, 30
    cfg.dmrs.additional_position, cfg.dmrs.num_cdm_groups_without_data = 1, 2
    transmitter = PUSCHTransmitter(cfg)
    estimator = PUSCHLSChannelEstimator(transmitter.resource_grid, 1, 1, 2, interpolation_type="nn")
    model = TDL("C", 100e-9, 3.5e9, min_speed=1.0, max_speed=33.0)
    link = OFDMChannel(model, transmitter.resource_grid, normalize_channel=True, return_channel=True)

    def ours() -> float:
        started = time.perf_counter()
        made = sum(simulate_shard(ours_cfg, shard).features.num_rows for shard in shards)
        return made / (time.perf_counter() - started)

    def plain(batch: int) -> float:
        count = max(1, slots // batch)
        started = time.perf_counter()
        for _ in range(count):
            received, _ = link(transmitter(batch)[0], 0.1)
            estimator(received, 0.1)
        return batch * count / (time.perf_counter() - started)

    best = max((32, 128, 512), key=plain)
    a, b, ratio = alternate(ours, lambda: plain(best), 3)
    return Row(
        "channel estimation corpus, slots/s", f"{a:,.0f}", f"{b:,.0f} (plain Sionna, one model, batch {best})", ratio, "", None
    )


def _estimation_call(variant: str, blocks: int) -> Row:
    import torch

    from rankd_pipeline.ran_functions.channel_estimation.function import ChannelEstimation
    from rankd_pipeline.runtime.c_export import generate_c
    from rankd_pipeline.runtime.latency import Candidate, LatencyConfig, profile
    from rankd_pipeline.runtime.onnx_export import export_onnx
    from rankd_pipeline.spec import load_pipeline

    function, spec = ChannelEstimation(), load_pipeline("channel_estimation").at("laptop", variant=variant)
    config = function.corpus_config(spec.steps.corpus.simulation)
    torch.manual_seed(0)
    module = function.deployable(function.student(config, spec.students["filter_bank"].network), {"radius": 1.6449}).eval()
    signature = function.signatures(config, 100.0)[0]
    generator = np.random.default_rng(0)
    samples = {
        "ls": generator.normal(size=(512, *signature.inputs[0].shape)).astype(np.float32),
        "noise_variance": generator.uniform(0.01, 1.0, 512).astype(np.float32),
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        export_onnx(module, signature, work / "m.onnx", {})
        race = profile(
            [Candidate(runtime="c", engine="c", path=work / "m.onnx", csource=generate_c(work / "m.onnx", work / "g", "student"))],
            signature, LatencyConfig(paced_runs=4_000, winner_runs=4_000, back_to_back_runs=4_000, max_seconds=30), samples,
            work / "race",
        )  # fmt: skip
    tail = race.candidates[0].back_to_back
    ours, eager = tail.p50_us if tail else float("nan"), eager_p50_us(module, samples, 1000)
    name = f"channel student call, {blocks} PRB, back to back p50, us"
    return Row(name, f"{ours:.1f} (generated C)", f"{eager:.0f} (PyTorch eager)", ours / eager, "< 1", ours < eager)


def memory(times: int = 10, base_share: float = 0.3) -> list[Row]:
    """Peak resident memory of the whole process tree of `rankd run`, with a corpus and with ten times as large a one.

    One epoch of everything: how long a network trains does not change what it holds. base_share: samples of the smaller corpus over
    those of laptop scale; 0.3 is 33,000 against 330,000 and takes a quarter of an hour, 1 the better part of an hour.
    """
    import yaml

    from rankd_pipeline.spec import deep_merge, pipeline_files

    document = yaml.safe_load(pipeline_files()["beam_management"].read_text())
    sizes = document["attributes"]["steps"]["corpus"]["simulation"]
    brief = {
        "ssl_weights": {"fit": {"epochs": 1}}, "teacher": {"fit": {"epochs": 1, "validate_every": 1}},
        "student": {"fit": {"epochs": 1, "validate_every": 1}, "temperatures": [1], "paired_seeds": 2},
        "latency_profile": {"race": {"paced_runs": 300, "winner_runs": 600, "back_to_back_runs": 300, "max_seconds": 15}},
    }  # fmt: skip
    peaks = {}
    for factor in (1, times):
        large = {name: int(n * base_share) * factor if name.endswith("_samples") else n for name, n in sizes.items()}
        # Gates are no matter here, and one epoch does not pass them.
        document["attributes"] |= {"gates": {}, "scales": {"laptop": deep_merge(brief, {"corpus": {"simulation": large}})}}
        with tempfile.TemporaryDirectory() as home:
            (Path(home) / "defs.yaml").write_text(yaml.safe_dump(document))
            peaks[factor] = _peak_bytes(["run", f"{home}/defs.yaml", "--scale", "laptop"], home)
    ratio = peaks[times] / peaks[1]
    ours, reference = (f"{peaks[factor] / 2**30:.2f} GiB ({factor} x)" for factor in (times, 1))
    met = ratio <= 1.2 and peaks[1] < 4 * 2**30
    return [Row(f"peak memory of the chain, {times} times the corpus", ours, reference, ratio, "<= 1.2, < 4 GiB", met)]


def _peak_bytes(arguments: list[str], home: str) -> int:
    """The largest sum of resident memory over a `rankd` command's process tree, sampled five times a second."""
    import contextlib
    import subprocess
    import sys

    import psutil

    environment = {**os.environ, "RANKD_HOME": home}
    process = subprocess.Popen([sys.executable, "-m", "rankd_pipeline.cli", *arguments], env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for item in (parent := psutil.Process(process.pid)).children(recursive=True) + [parent]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += item.memory_info().rss
        peak = max(peak, total)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"rankd {' '.join(arguments)} ended with exit code {process.returncode}")
    return peak


def link() -> list[Row]:
    """Link adaptation: the slot loop, and one call of the student."""
    from benchmarks.link_adaptation import slot_loop, student_call

    return [*slot_loop(), *student_call()]


COMPARISONS: dict[str, Callable[[], list[Row]]] = {
    "training": training, "corpus": corpus, "latency": latency, "estimation": estimation, "link": link, "chain": chain,
    "memory": memory,
}  # fmt: skip


def machine() -> str:
    from rankd_pipeline.steps.runner import host_id

    return f"{host_id()}, load {os.getloadavg()[0]:.1f}, {datetime.date.today().isoformat()}"


HEAD = ("| part | comparison | rankd | reference | ratio | target | | measured on |", "|---|---|---|---|---|---|---|---|")


def lines(part: str, measured: str, rows: list[Row]) -> list[str]:
    """Rows of the table, as Markdown."""
    found = []
    for row in rows:
        verdict = "" if row.met is None else "met" if row.met else "MISS"
        cells = (part, row.name, row.ours, row.reference, f"{row.ratio:.2f}", row.target, verdict, measured)
        found.append(f"| {' | '.join(cells)} |")
    return found


def write(part: str, made: list[str]) -> None:
    """Put one part's rows into the table of results; what was measured of the others before stays."""
    known = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    of = {name: [line for line in known if line.startswith(f"| {name} |")] for name in COMPARISONS} | {part: made}
    text = "\n".join([*HEAD, *(line for name in COMPARISONS for line in of[name])])
    RESULTS.write_text(f"# rankd beside the plain way\n\n`python -m benchmarks.side_by_side --write`\n\n{text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(COMPARISONS)}; all by default")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/side_by_side.md too, part by part")
    arguments = parser.parse_args()
    print(*HEAD, sep="\n")
    for name in arguments.names or COMPARISONS:
        measured = machine()
        made = lines(name, measured, COMPARISONS[name]())
        print(*made, sep="\n", flush=True)
        if arguments.write:
            write(name, made)


if __name__ == "__main__":
    main()
