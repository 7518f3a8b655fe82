"""Do two runtimes say the same? The largest difference and how often the decision agrees, over any callables."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from rankd_pipeline.errors import RankdError
from rankd_pipeline.runtime.onnx_export import load_session, run_batches
from rankd_pipeline.runtime.signature import ModelSignature

if TYPE_CHECKING:
    import torch

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]

ONNX_MAX_ABS = 1e-4  # torch against onnxruntime, FP32
C_MAX_ABS = 1e-5  # C against onnxruntime, FP32
INT8_AGREEMENT = 0.999  # INT8 in C against INT8 in onnxruntime: share of equal decisions, or of equal estimates
CLOSE = 0.02  # RMS difference over RMS output that counts as the same estimate: INT8 steps are about 0.01 of the range


class Parity(BaseModel):
    """Largest absolute difference over all outputs; over the first output, the share of samples with the same argmax, and the
    share whose difference is at most CLOSE of the output's RMS; number of samples."""

    model_config = ConfigDict(frozen=True)

    max_abs: float
    argmax_agreement: float
    close_agreement: float
    n: int


def parity(reference: Runner, candidate: Runner, inputs: Mapping[str, np.ndarray]) -> Parity:
    """Compare two runners on `inputs` (`[n, *shape]` each), output by output.

    argmax is taken over the last axis of the first output that both give and that has one (a single value per sample
    always agrees). Raises RankdError if names, shapes or finiteness differ.
    """
    expected, found = reference(inputs), candidate(inputs)
    if set(expected) != set(found):
        raise RankdError(f"Parity: outputs differ by name: {sorted(expected)} against {sorted(found)}.")
    max_abs = 0.0
    for name, values in expected.items():
        other = found[name]
        if values.shape != other.shape:
            raise RankdError(f"Parity: output {name} has shape {values.shape} against {other.shape}.")
        difference = np.abs(values.astype(np.float64) - other.astype(np.float64))
        if not np.isfinite(difference).all():
            raise RankdError(f"Parity: output {name} is not finite on every sample.")
        max_abs = max(max_abs, float(difference.max(initial=0.0)))
    first = next(iter(expected))
    same = np.ones(len(expected[first]), dtype=bool)
    if expected[first].ndim > 1:
        same = (expected[first].argmax(-1) == found[first].argmax(-1)).reshape(len(same), -1).all(axis=1)
    flat, other = (values[first].reshape(len(same), -1).astype(np.float64) for values in (expected, found))
    close = np.linalg.norm(flat - other, axis=1) <= CLOSE * np.maximum(np.linalg.norm(flat, axis=1), 1e-12)
    return Parity(max_abs=max_abs, argmax_agreement=float(same.mean()), close_agreement=float(close.mean()), n=len(same))


def onnx_runner(path: Path) -> Runner:
    """`path` on onnxruntime, one thread."""
    session = load_session(path)
    return lambda inputs: run_batches(session, inputs)


def torch_runner(module: "torch.nn.Module", signature: ModelSignature) -> Runner:
    """`module` in PyTorch eager, inputs and outputs named by `signature`."""
    import torch

    module = module.eval()

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(np.ascontiguousarray(inputs[n])) for n in signature.input_names))
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return {name: value.numpy() for name, value in zip(signature.output_names, outputs, strict=True)}

    return run
