"""How much of what a shift costs could any beam student regain? Networks trained in the shifted world itself, every row labelled.

`python -m benchmarks.beam_ceiling broken_beam` simulates 60,000 rows of the world under that shift, labels all of them with the
genie's beam, trains the student's and the teacher's network on them from scratch, and prints their Top-1 on the 12,000 rows that
`benchmarks.demo_drift` measures on. A re-distillation has fewer rows, fewer labels and a general test set to keep, and comes below.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.demo_drift import MEASURE_SEED
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.telemetry.field import known_shifts, simulated
from rankd_pipeline.training.fit import FitConfig, fit

FUNCTION = load_function("beam_management")
FITS = {
    "student": FitConfig(epochs=24, batch_size=512, lr=2e-2, warmup_share=0.1, validate_every=24),
    "teacher": FitConfig(epochs=6, batch_size=512, lr=2e-3, warmup_share=0.1, clip_norm=1.0, validate_every=6),
}


def world(cfg: Any, shift: str, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs of the networks, and the genie's beam as `label`, of the rows that have one."""
    features, truth, _, _ = simulated(FUNCTION, cfg, frozenset({shift}), rows, seed)
    label = truth["best_beam"].astype(np.int64)
    columns = {**FUNCTION.model_inputs(features), "label": label}
    return {name: values[label >= 0] for name, values in columns.items()}


def top1(network: torch.nn.Module, columns: dict[str, np.ndarray]) -> float:
    inputs = [torch.from_numpy(np.ascontiguousarray(values)) for name, values in columns.items() if name != "label"]
    with torch.inference_mode():
        return float((network(*inputs).argmax(1).numpy() == columns["label"]).mean())


def loss_on(inputs: list[str]) -> Any:
    return lambda model, batch: torch.nn.functional.cross_entropy(model(*(batch[name] for name in inputs)), batch["label"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shift", choices=sorted(known_shifts(FUNCTION)))
    parser.add_argument("--variant", default="n78")
    parser.add_argument("--rows", type=int, default=60_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = load_pipeline("beam_management").at("laptop", variant=options.variant)
    cfg = FUNCTION.corpus_config(spec.steps.corpus.simulation)
    sizes = ((options.rows, 777), (6_000, 778), (12_000, MEASURE_SEED))
    train, val, test = (world(cfg, options.shift, rows, seed) for rows, seed in sizes)
    inputs = [name for name in train if name != "label"]
    shapes = {"student": spec.steps.student.network, "teacher": spec.steps.teacher.network}
    for name, config in FITS.items():
        torch.manual_seed(0)
        network = getattr(FUNCTION, name)(cfg, shapes[name])
        FUNCTION.set_statistics(network, {key: train[key] for key in inputs})
        with tempfile.TemporaryDirectory() as work:
            fit(
                network, train, loss_on(inputs), lambda model: -top1(model, val), config, 0, Path(work),
            )  # fmt: skip
        parameters = sum(item.numel() for item in network.parameters())
        print(f"{name}, {parameters:,} parameters: Top-1 {top1(network.eval(), test):.4f}", flush=True)


if __name__ == "__main__":
    main()
