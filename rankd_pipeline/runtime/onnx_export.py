"""From a trained torch module to one deterministic ONNX file that carries its signature and lineage, and back to a session.

The file has a dynamic batch axis: evaluation runs thousands of samples through it at once, the DU one, and the C
generator pins the axis to 1, so the file that is profiled is byte for byte the file that is deployed. On onnxruntime
the dynamic axis costs nothing (measured); the weights of linear layers are stored transposed (K x N), because the
compiler can then vectorise over N without reordering a sum: 3.1 -> 1.5 us for a 33-32-32-64 MLP with gcc -O3.
"""

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from rankd_pipeline.errors import RankdError
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec

if TYPE_CHECKING:
    import torch

IR_VERSION_MAX = 13  # onnxruntime 1.31 loads no later one
OPSETS_ALLOWED = range(17, 22)
SIGNATURE_KEY = "rankd.signature"
CARRIED = "Carries: "
"""Opens the doc string that names the metadata of a file: written before the graph, it tells a file that was cut behind it."""
BATCH_AXIS = "batch"


def export_onnx(
    module: "torch.nn.Module",
    signature: ModelSignature,
    path: Path,
    metadata: Mapping[str, str],
    opset: int = 20,
) -> None:
    """Export `module` to `path`; the same weights, signature and metadata give the same bytes.

    `module` takes the signature's inputs by position, each `[batch, *shape]`, and returns its outputs, as one tensor or
    a tuple, each `[batch, *shape]`. Scaling, masking, temperature and softmax belong inside it. `metadata` (lineage) and
    the signature itself are written as `metadata_props`. Raises RankdError if the module does not fit its signature or
    the graph holds what the runtimes here do not run.
    """
    import torch  # here, so that opening and profiling a file does not load PyTorch

    module = module.eval()
    for spec in (*signature.inputs, *signature.outputs):
        if not spec.name.isidentifier():  # the name becomes a C parameter
            raise RankdError(f"Model {signature.name}: tensor name {spec.name!r} is no identifier; use letters and _.")
    example = tuple(_example(spec) for spec in signature.inputs)
    _check_outputs(module, example, signature)
    batch = torch.export.Dim(BATCH_AXIS)
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=opset,
            input_names=signature.input_names,
            output_names=signature.output_names,
            dynamic_shapes=tuple({0: batch} for _ in example),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise RankdError(f"Model {signature.name}: the ONNX exporter returned nothing; try a simpler module.")
    model = program.model_proto
    _transpose_gemm_weights(model)
    _merge_slices(model)
    _strip(model, signature)
    write_metadata(model, {**metadata, SIGNATURE_KEY: signature.model_dump_json()})
    lint(model)
    save(model, path)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write `model` as deterministic bytes."""
    path.write_bytes(model.SerializeToString(deterministic=True))


def write_metadata(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Replace the model's `metadata_props` by `metadata`, in key order, and name its keys in the doc string.

    The entries stand last in the file, and each alone is a whole field: cut between two, it would still be valid ONNX.
    """
    del model.metadata_props[:]
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])
    model.doc_string = CARRIED + ", ".join(sorted(metadata))


def lint(model: onnx.ModelProto) -> None:
    """Refuse graphs the runtimes here cannot run: complex tensors, foreign operators, other opsets, external data."""
    name = model.graph.name
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            raise RankdError(f"Model {name} uses operators of domain {entry.domain!r}; only standard ONNX is deployed.")
        if entry.version not in OPSETS_ALLOWED:
            raise RankdError(f"Model {name} has opset {entry.version}; expected {OPSETS_ALLOWED[0]} to {OPSETS_ALLOWED[-1]}.")
    if model.ir_version > IR_VERSION_MAX:
        raise RankdError(f"Model {name} has IR version {model.ir_version}; expected at most {IR_VERSION_MAX}.")
    complex_types = {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type in complex_types:
            raise RankdError(f"Model {name}: tensor {value.name} is complex; give real and imaginary parts as two axes.")
    for tensor in model.graph.initializer:
        if tensor.data_type in complex_types or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise RankdError(f"Model {name}: weight {tensor.name} is complex or lies outside the file.")


def verify_onnx(path: Path) -> onnx.ModelProto:
    """Return the model in `path`, or raise RankdError saying why the file is not a whole ONNX model."""
    path = Path(path)
    if not path.is_file():
        raise RankdError(f"{path} is not a file; expected an ONNX model.")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf raises its own DecodeError, which is not public API
        raise RankdError(f"{path} is not an ONNX model or is damaged: it cannot be parsed. Export it again.") from error
    if not model.graph.node or not model.graph.output:
        raise RankdError(f"{path} is not an ONNX model: it holds no graph. Export it again.")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, UnicodeDecodeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise RankdError(f"{path} is a damaged ONNX model ({first_line}). Export it again.") from error
    _check_end(path, model.doc_string, {entry.key for entry in model.metadata_props})
    return model


def _check_end(path: Path, doc_string: str, found: Collection[str]) -> None:
    """Refuse a file that lost metadata that its doc string names; other people's files name none."""
    named = doc_string.removeprefix(CARRIED).split(", ") if doc_string.startswith(CARRIED) else []
    lost = [key for key in named if key and key not in found]
    if lost:
        raise RankdError(f"{path} is a damaged ONNX model (its end is missing: no {lost[0]}). Export it again.")


def load_session(path: Path, threads: int = 1) -> ort.InferenceSession:
    """Open `path` for the CPU with `threads` compute threads, spinning off; raises RankdError for an unusable file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # A spinning pool burns the core that the DU's next task waits for.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes are not public API
        verify_onnx(path)
        first_line = str(error).strip().splitlines()[0]
        raise RankdError(f"{path} is ONNX, but onnxruntime cannot run it: {first_line}") from error
    meta = session.get_modelmeta()
    _check_end(path, meta.description, meta.custom_metadata_map)
    return session


def read_metadata(path: Path) -> dict[str, str]:
    """The `metadata_props` of the model in `path`: its lineage, and its signature under `rankd.signature`."""
    return {entry.key: entry.value for entry in verify_onnx(path).metadata_props}


def read_signature(path: Path, budget_us: float | None = None, slot_us: float | None = None) -> ModelSignature:
    """The signature of any ONNX file: the one it carries, or one made from its graph (dynamic axes taken as 1).

    `budget_us` and `slot_us` replace the carried values; a file without a signature needs `budget_us`.
    """
    model = verify_onnx(path)
    carried = next((entry.value for entry in model.metadata_props if entry.key == SIGNATURE_KEY), None)
    if carried is not None:
        signature = ModelSignature.model_validate_json(carried)
    elif budget_us is not None:
        signature = _signature_from_graph(model, budget_us)
    else:
        raise RankdError(f"{path} carries no rankd signature; give its budget in us.")
    changes = {"budget_us": budget_us, "slot_us": slot_us}
    return signature.model_copy(update={key: value for key, value in changes.items() if value is not None})


def run_batches(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray], batch: int = 1024) -> dict[str, np.ndarray]:
    """Run `inputs` (`[n, *shape]` each) through `session` in slices of `batch`; returns outputs `[n, *shape]`."""
    static = session.get_inputs()[0].shape[0] if session.get_inputs()[0].shape else None
    step = static if isinstance(static, int) else batch
    count = len(next(iter(inputs.values())))
    if count == 0 or count % (step if isinstance(static, int) else 1):
        raise RankdError(f"{count} samples given; the model's batch of {step} needs a positive multiple of it.")
    names = [output.name for output in session.get_outputs()]
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in range(0, count, step):
        outputs = session.run(names, {name: values[start : start + step] for name, values in inputs.items()})
        for name, values in zip(names, outputs, strict=True):
            pieces[name].append(np.asarray(values))
    return {name: np.concatenate(parts) for name, parts in pieces.items()}


def pin_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` whose dynamic axes are all 1: the form for one call a slot."""
    pinned = onnx.ModelProto()
    pinned.CopyFrom(model)
    for value in (*pinned.graph.input, *pinned.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param or not axis.HasField("dim_value"):
                axis.dim_value = 1
    del pinned.graph.value_info[:]  # shapes between nodes are inferred again from the pinned inputs
    return pinned


def _example(spec: TensorSpec) -> "torch.Tensor":
    """Two samples that trace cleanly: ones, so that a mask says "reported"."""
    import torch

    return torch.ones((2, *spec.shape), dtype=getattr(torch, spec.dtype))


def _check_outputs(module: "torch.nn.Module", example: "tuple[torch.Tensor, ...]", signature: ModelSignature) -> None:
    import torch

    with torch.no_grad():
        outputs = module(*example)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    found = [(tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch.")) for tensor in outputs]
    expected = [(spec.shape, spec.dtype) for spec in signature.outputs]
    if found != expected:
        raise RankdError(f"Model {signature.name} returns {found}; its signature says {expected}.")


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns about packages that rankd does not use (torchvision) and about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _transpose_gemm_weights(model: onnx.ModelProto) -> None:
    """Store every Gemm weight K x N (transB = 0); shared or computed weights stay as they are."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for node in model.graph.node:
        trans_b = next((a for a in node.attribute if a.name == "transB" and a.i == 1), None)
        if node.op_type != "Gemm" or trans_b is None:
            continue
        name = node.input[1]
        if name in weights and readers[name] == 1:
            values = numpy_helper.to_array(weights[name])
            weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values.T), name))
            trans_b.i = 0


def _merge_slices(model: onnx.ModelProto) -> None:
    """One Slice for several in a row along axes of their own: the exporter writes one for each axis."""
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    slices = {node.output[0]: node for node in graph.node if node.op_type == "Slice" and len(node.input) == 5}
    slices = {name: node for name, node in slices.items() if all(setting in constants for setting in node.input[1:])}
    for name, node in slices.items():
        before = slices.get(node.input[0])
        if before is None or readers[node.input[0]] != 1:
            continue
        first, second = ([constants[setting] for setting in item.input[1:]] for item in (before, node))
        if set(first[2].tolist()) & set(second[2].tolist()):  # the axes
            continue
        settings = {f"{name}_{i}": np.concatenate(both) for i, both in enumerate(zip(first, second, strict=True))}
        constants |= settings
        graph.initializer.extend(numpy_helper.from_array(values, setting) for setting, values in settings.items())
        node.input[:] = [before.input[0], *settings]
        graph.node.remove(before)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _strip(model: onnx.ModelProto, signature: ModelSignature) -> None:
    """Remove what differs between machines and runs: stack traces, doc strings, paths, inferred value names."""
    model.ir_version = min(model.ir_version, IR_VERSION_MAX)
    model.producer_name, model.producer_version = "rankd", ""
    model.doc_string = model.graph.doc_string = ""
    model.graph.name = signature.name
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for item in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH_AXIS


def _signature_from_graph(model: onnx.ModelProto, budget_us: float) -> ModelSignature:
    """Tensors as the graph declares them; a leading axis that is dynamic or 1 is the batch."""
    weights = {tensor.name for tensor in model.graph.initializer}

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        sizes = [axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim]
        sizes = sizes[1:] if sizes[:1] == [1] else sizes
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        axes = tuple(f"axis_{index}" for index in range(len(sizes)))
        return TensorSpec.model_validate(
            {"name": value.name, "axes": axes, "shape": tuple(sizes), "unit": "unknown", "dtype": dtype}
        )

    inputs = tuple(spec(value) for value in model.graph.input if value.name not in weights)
    outputs = tuple(spec(value) for value in model.graph.output)
    return ModelSignature(name="model", budget_us=budget_us, inputs=inputs, outputs=outputs)
