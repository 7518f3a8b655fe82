"""INT8: close to FP32, the same bytes each time, calibrated from a stream, poisoned batches refused."""

import gc
import weakref

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from rankd_pipeline.compression.quantization import quantize_int8
from rankd_pipeline.errors import RankdError
from rankd_pipeline.runtime.onnx_export import SIGNATURE_KEY, export_onnx, read_metadata
from rankd_pipeline.runtime.parity import onnx_runner, parity
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec
from rankd_pipeline_tests.runtime import toys


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    """The exported beam picker."""
    path = tmp_path_factory.mktemp("int8") / "fp32.onnx"
    export_onnx(toys.mlp(), toys.MLP_SIGNATURE, path, {"rankd.recipe": "abc"})
    return path


def batches(count: int = 6, size: int = 256):
    """A stream of calibration batches."""
    return (toys.mlp_inputs(size, seed) for seed in range(count))


def test_int8_decides_nearly_as_fp32_and_is_quantized(fp32, tmp_path):
    """Most decisions stay; weights are int8 per channel; head, scaling and logits stay float; lineage is kept."""
    int8 = tmp_path / "int8.onnx"
    quantize_int8(fp32, int8, batches(), {"rankd.precision": "int8"})
    assert parity(onnx_runner(fp32), onnx_runner(int8), toys.mlp_inputs(4000, 99)).argmax_agreement > 0.9
    model = onnx.load(int8)
    weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert {w.shape for w in weights if w.dtype == np.int8 and w.ndim == 2} == {(33, 32), (32, 32), (32, 64)}
    scales = [w for w in weights if w.dtype == np.float32 and w.shape in ((32,), (64,))]
    assert len(scales) >= 3
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    assert {producers[name] for name in quantized} == {"Concat", "Relu"}
    metadata = read_metadata(int8)
    assert metadata["rankd.recipe"] == "abc"
    assert metadata["rankd.precision"] == "int8"
    assert SIGNATURE_KEY in metadata


class Correlation(torch.nn.Module):
    """A layer, then weights from the left, then the product of what came out with itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.left = torch.nn.Linear(8, 8, bias=False), torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.left @ self.layer(x)
        return y @ y.transpose(-1, -2)


def test_products_of_activations_and_weights_on_the_left_stay_float(tmp_path):
    signature = ModelSignature(
        name="correlation", budget_us=1000.0, inputs=(TensorSpec(name="x", axes=("row", "column"), shape=(4, 8), unit="1"),),
        outputs=(TensorSpec(name="square", axes=("row", "other"), shape=(4, 4), unit="1"),),
    )  # fmt: skip
    export_onnx(Correlation(), signature, tmp_path / "fp32.onnx", {})
    stream = [{"x": np.random.default_rng(seed).standard_normal((64, 4, 8)).astype(np.float32)} for seed in range(2)]
    quantize_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", stream, {})
    model = onnx.load(tmp_path / "int8.onnx")
    by_output = {output: node.op_type for node in model.graph.node for output in node.output}
    products = [[by_output.get(name) for name in node.input] for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) == 3 and products.count(["DequantizeLinear", "DequantizeLinear"]) == 1
    assert sum("DequantizeLinear" in product for product in products) == 1


def test_same_stream_same_bytes_and_batching_does_not_matter(fp32, tmp_path):
    """Ranges folded over many small batches equal those of one large batch: no batch is dropped."""
    first, again, whole = (tmp_path / name for name in ("a.onnx", "b.onnx", "c.onnx"))
    quantize_int8(fp32, first, batches(), {})
    quantize_int8(fp32, again, batches(), {})
    parts = list(batches())
    quantize_int8(fp32, whole, [{name: np.concatenate([p[name] for p in parts]) for name in parts[0]}], {})
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() == whole.read_bytes()


def test_calibration_holds_one_batch_at_a_time(fp32, tmp_path):
    """While the stream gives batch k, no batch before k - 1 is alive any more."""
    alive: list[weakref.ref] = []
    most = 0

    def stream():
        nonlocal most
        for seed in range(8):
            batch = toys.mlp_inputs(64, seed)
            alive.append(weakref.ref(batch["l1_rsrp_dbm"]))
            yield batch
            del batch
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))

    quantize_int8(fp32, tmp_path / "int8.onnx", stream(), {})
    assert len(alive) == 8
    assert most <= 2


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poisoned_and_empty_calibration_is_refused(fp32, tmp_path, poison):
    """NaN or infinity is named by batch and input; nothing at all is refused too, and no file is left."""

    def stream():
        yield toys.mlp_inputs(32, 0)
        bad = toys.mlp_inputs(32, 1)
        bad["l1_rsrp_dbm"][3, 4] = poison
        yield bad

    target = tmp_path / "int8.onnx"
    with pytest.raises(RankdError, match="batch 1, input l1_rsrp_dbm"):
        quantize_int8(fp32, target, stream(), {})
    with pytest.raises(RankdError, match="no samples"):
        quantize_int8(fp32, target, [], {})
    assert not target.exists()
