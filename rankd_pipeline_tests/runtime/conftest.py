"""The toy models, exported, quantized and written as C once for all runtime tests."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rankd_pipeline.compression.quantization import quantize_int8
from rankd_pipeline.runtime.c_export import CSource, compiler, generate_c
from rankd_pipeline.runtime.onnx_export import export_onnx
from rankd_pipeline.runtime.signature import ModelSignature
from rankd_pipeline_tests.runtime import toys


@dataclass
class Toy:
    """One exported toy: module, signature and its files."""

    module: torch.nn.Module
    signature: ModelSignature
    fp32: Path
    int8: Path
    inputs: object
    c_fp32: CSource | None = None
    c_int8: CSource | None = None


def _make(folder: Path, module: torch.nn.Module, signature: ModelSignature, inputs) -> Toy:
    fp32, int8 = folder / f"{signature.name}_fp32.onnx", folder / f"{signature.name}_int8.onnx"
    export_onnx(module, signature, fp32, {"rankd.recipe": "abc"})
    quantize_int8(fp32, int8, (inputs(128, seed) for seed in range(100, 108)), {"rankd.precision": "int8"})
    toy = Toy(module, signature, fp32, int8, inputs)
    if compiler():
        toy.c_fp32 = generate_c(fp32, folder, fp32.stem)
        toy.c_int8 = generate_c(int8, folder, int8.stem)
    return toy


@pytest.fixture(scope="session")
def mlp_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The masked beam picker."""
    return _make(tmp_path_factory.mktemp("mlp"), toys.mlp(), toys.MLP_SIGNATURE, toys.mlp_inputs)


@pytest.fixture(scope="session")
def gru_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The stateful GRU with two tensors and a mask."""
    return _make(tmp_path_factory.mktemp("gru"), toys.gru(), toys.GRU_SIGNATURE, toys.gru_inputs)


@pytest.fixture(params=["mlp", "gru"])
def toy(request: pytest.FixtureRequest) -> Toy:
    """Each toy in turn."""
    return request.getfixturevalue(f"{request.param}_toy")
