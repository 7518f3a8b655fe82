"""Static INT8 of a deployed ONNX file: per-channel weights, streamed calibration, everything else left in float.

Only the inputs and weights of Gemm, MatMul and Conv are quantized (QDQ); a product of two activations has no weights.
Their outputs stay float, because eight-bit logits tie and a tie decides the argmax by chance; so do feature scaling (dBm spans
more than 256 useful steps once missing values are filled), temperature and softmax.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    create_calibrator,
    quantize_static,
)
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

from rankd_pipeline.errors import RankdError
from rankd_pipeline.runtime.onnx_export import IR_VERSION_MAX, lint, save, verify_onnx, write_metadata

QUANTIZED_OPS = ("Gemm", "MatMul", "Conv")


def quantize_int8(
    fp32_path: Path,
    int8_path: Path,
    calibration: Iterable[Mapping[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write the INT8 form of `fp32_path`; ranges come from `calibration`, batches of `{input: [n, *shape]}`.

    One batch is held at a time, so memory does not grow with the corpus. The FP32 file's metadata (lineage, signature)
    is kept and `metadata` added. The same inputs give the same bytes. Raises RankdError for a batch with NaN or
    infinity, for an empty calibration set, and if a range came out unusable.
    """
    fp32 = verify_onnx(fp32_path)
    if not any(node.op_type in QUANTIZED_OPS for node in fp32.graph.node):
        raise RankdError(f"{fp32_path} has no Gemm, MatMul or Conv to quantize; deploy the FP32 file.")
    with _quiet_quantizer(), tempfile.TemporaryDirectory(prefix="rankd-int8-") as scratch:
        ranges = Path(scratch) / "ranges.json"
        save_tensors_data(_ranges(fp32_path, calibration, Path(scratch)), str(ranges))
        quantize_static(
            str(fp32_path),
            str(int8_path),
            None,
            calibration_cache_path=str(ranges),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED_OPS),
            nodes_to_exclude=_without_weights(fp32),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": list(QUANTIZED_OPS)},
        )
    int8 = onnx.load(int8_path)
    _check_ranges(int8, int8_path)
    _restore_identity(int8, fp32)
    write_metadata(int8, {**{entry.key: entry.value for entry in fp32.metadata_props}, **metadata})
    lint(int8)
    save(int8, int8_path)


def _without_weights(model: onnx.ModelProto) -> list[str]:
    """Names of the products that have no weights on their right (onnxruntime's MatMulConstBOnly is not heeded for QDQ, 1.31)."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type in QUANTIZED_OPS and node.input[1] not in weights]


def _ranges(fp32_path: Path, calibration: Iterable[Mapping[str, np.ndarray]], scratch: Path) -> TensorsData:
    """Smallest and largest value of each tensor to quantize, folded batch by batch.

    onnxruntime's own option for this (CalibMaxIntermediateOutputs) drops the batches it should fold (1.31), so each
    batch is given as a stream of its own, after which the calibrator merges its ranges and forgets it.
    """
    calibrator = create_calibrator(
        fp32_path,
        list(QUANTIZED_OPS),
        augmented_model_path=str(scratch / "augmented.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
    )
    ranges = None
    for number, batch in enumerate(calibration):
        for name, values in batch.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise RankdError(
                    f"INT8 calibration batch {number}, input {name}: NaN or infinity; "
                    "missing values are told by the mask, with any finite number in their place."
                )
        calibrator.collect_data(_OneBatch(batch))
        ranges = calibrator.compute_data()
    if ranges is None:
        raise RankdError("INT8 calibration got no samples; give at least one batch of training features.")
    return ranges


class _OneBatch(CalibrationDataReader):
    """A stream of one batch, the only one in memory."""

    def __init__(self, batch: Mapping[str, np.ndarray]) -> None:
        self._batch = dict(batch)

    def get_next(self) -> dict[str, np.ndarray]:
        """The batch, then an empty one, which ends the stream."""
        batch, self._batch = self._batch, {}
        return batch


def _check_ranges(model: onnx.ModelProto, path: Path) -> None:
    """Every scale must be finite and positive: a NaN or zero range silently kills the layer."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in weights:
            scale = numpy_helper.to_array(weights[node.input[1]])
            if not np.isfinite(scale).all() or (scale <= 0).any():
                raise RankdError(f"{path}: the range of {node.input[0]} is not finite and positive after calibration.")


def _restore_identity(int8: onnx.ModelProto, fp32: onnx.ModelProto) -> None:
    """Undo what the quantizer changes beside the graph: names, versions, unused operator domains."""
    int8.ir_version = min(fp32.ir_version, IR_VERSION_MAX)
    int8.producer_name, int8.producer_version = fp32.producer_name, fp32.producer_version
    int8.graph.name = fp32.graph.name
    del int8.graph.value_info[:]
    used = {node.domain for node in int8.graph.node}
    kept = [entry for entry in int8.opset_import if entry.domain in used or entry.domain == ""]
    del int8.opset_import[:]
    int8.opset_import.extend(kept)


@contextlib.contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """The quantizer recommends a preprocessing that these exports do not need, on the root logger."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
