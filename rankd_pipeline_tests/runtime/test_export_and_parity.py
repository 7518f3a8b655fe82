"""From torch to ONNX and C: same bytes, same numbers, clear refusals; carried state goes round."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rankd_pipeline.errors import RankdError
from rankd_pipeline.runtime import parity as bounds
from rankd_pipeline.runtime.c_export import CModel, build_shared, compiler, generate_all, generate_c
from rankd_pipeline.runtime.latency import line_up
from rankd_pipeline.runtime.onnx_export import (
    IR_VERSION_MAX,
    export_onnx,
    lint,
    load_session,
    read_metadata,
    read_signature,
    run_batches,
    verify_onnx,
)
from rankd_pipeline.runtime.parity import onnx_runner, parity, torch_runner
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec
from rankd_pipeline_tests.runtime import toys


def test_signature_refuses_what_does_not_fit():
    """Masks and states must name tensors of the model, and a state may not change its shape."""
    fields = toys.GRU_SIGNATURE.model_dump()
    for broken in (
        {"masks": {"cell_rsrp_dbm": "nothing"}},
        {"state": {"state": "cell_score"}},
        {"state": {"nothing": "next_state"}},
        {"budget_us": 0},
    ):
        with pytest.raises(ValidationError):
            ModelSignature.model_validate({**fields, **broken})
    assert toys.GRU_SIGNATURE.decision.name == "cell_score"
    with pytest.raises(ValidationError):
        TensorSpec(name="x", axes=("a", "b"), shape=(3,), unit="1")


def test_torch_and_onnx_agree(toy):
    """FP32 within the contract's bound, at any batch size, and equal decisions."""
    inputs = toy.inputs(1500)
    found = parity(torch_runner(toy.module, toy.signature), onnx_runner(toy.fp32), inputs)
    assert found.n == 1500
    assert found.max_abs <= bounds.ONNX_MAX_ABS
    assert found.argmax_agreement == 1.0
    session = load_session(toy.fp32)
    one_by_one = run_batches(session, {name: values[:7] for name, values in inputs.items()}, batch=1)
    together = run_batches(session, {name: values[:7] for name, values in inputs.items()})
    for name in together:
        np.testing.assert_allclose(one_by_one[name], together[name], atol=1e-6)


class Corners(torch.nn.Module):
    """Cuts along two axes, of which the first is looked at on its own where `shared`."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x[:, 1:3]
        corner = rows[:, :, :2] * 2.0
        return corner + rows[:, :, 2:4] if self.shared else corner + x[:, 2:4, 1:3]


@pytest.mark.parametrize(("shared", "slices"), [(False, 2), (True, 3)])
def test_slices_in_a_row_become_one_where_nothing_else_reads_between_them(shared, slices, tmp_path):
    """One operator a corner instead of one an axis; what is read twice is cut once; the numbers are the same."""
    signature = ModelSignature(
        name="corners",
        budget_us=100,
        inputs=(TensorSpec(name="x", axes=("row", "column"), shape=(4, 5), unit="1"),),
        outputs=(TensorSpec(name="y", axes=("row", "column"), shape=(2, 2), unit="1"),),
    )
    module = Corners(shared)
    export_onnx(module, signature, tmp_path / "corners.onnx", {})
    graph = verify_onnx(tmp_path / "corners.onnx").graph
    assert sum(node.op_type == "Slice" for node in graph.node) == slices
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    found = run_batches(load_session(tmp_path / "corners.onnx"), {"x": x})["y"]
    np.testing.assert_array_equal(found, module(torch.from_numpy(x)).numpy())


def test_file_is_deterministic_and_carries_its_identity(toy, tmp_path):
    """Same weights, same bytes; metadata and signature come back; nothing of this machine is inside."""
    again = tmp_path / "again.onnx"
    export_onnx(toy.module, toy.signature, again, {"rankd.recipe": "abc"})
    assert again.read_bytes() == toy.fp32.read_bytes()
    assert read_metadata(again)["rankd.recipe"] == "abc"
    assert read_signature(again) == toy.signature
    assert read_signature(again, budget_us=7).budget_us == 7
    model = onnx.load(again)
    assert model.ir_version <= IR_VERSION_MAX
    for trace in (b"site-packages", b"/work", b"stack_trace", b".py"):
        assert trace not in again.read_bytes()


@pytest.mark.needs_compiler
def test_c_agrees_with_onnxruntime(toy, tmp_path):
    """FP32 C within 1e-5 of onnxruntime, INT8 C decides as INT8 onnxruntime does."""
    inputs = toy.inputs(3000, seed=3)
    fp32 = CModel(build_shared(toy.c_fp32, tmp_path), toy.signature)
    assert parity(onnx_runner(toy.fp32), fp32, inputs).max_abs <= bounds.C_MAX_ABS
    int8 = CModel(build_shared(toy.c_int8, tmp_path), toy.signature)
    assert parity(onnx_runner(toy.int8), int8, inputs).argmax_agreement >= bounds.INT8_AGREEMENT


@pytest.mark.needs_compiler
def test_carried_state_goes_round_alike_in_all_runtimes(gru_toy, tmp_path):
    """Fifty steps fed back: torch, onnxruntime and C end in the same state."""
    runners = [
        torch_runner(gru_toy.module, gru_toy.signature),
        onnx_runner(gru_toy.fp32),
        CModel(build_shared(gru_toy.c_fp32, tmp_path), gru_toy.signature),
    ]
    track = gru_toy.inputs(50, seed=5)
    ends = []
    for run in runners:
        state = np.zeros((1, 8), np.float32)
        for step in range(50):
            outputs = run({**{name: values[step : step + 1] for name, values in track.items()}, "state": state})
            state = outputs["next_state"]
        ends.append(outputs["cell_score"])
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-4)
    np.testing.assert_allclose(ends[2], ends[1], atol=1e-5)
    stateless = runners[1]({name: values[-1:] for name, values in track.items()})["cell_score"]
    assert np.abs(stateless - ends[1]).max() > 1e-3


@pytest.mark.needs_compiler
def test_c_source_is_clean_and_stable_across_processes(mlp_toy, tmp_path):
    """Same file, same C in another process with another hash seed; one symbol; no allocation; header compiles alone."""
    code = (
        "import sys; from pathlib import Path; from rankd_pipeline.runtime.c_export import generate_c;"
        "generate_c(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(mlp_toy.fp32), str(tmp_path), mlp_toy.c_fp32.name],
        check=True,
        env={"PYTHONHASHSEED": "77", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (tmp_path / mlp_toy.c_fp32.source.name).read_bytes() == mlp_toy.c_fp32.source.read_bytes()
    library = build_shared(mlp_toy.c_fp32, tmp_path)
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    assert re.findall(r" [TDBR] (\w+)", symbols) == [mlp_toy.c_fp32.name]
    assert "malloc" not in mlp_toy.c_fp32.source.read_text()
    assert str(tmp_path) not in mlp_toy.c_fp32.source.read_text()
    alone = tmp_path / "alone.c"
    alone.write_text(f'#include "{mlp_toy.c_fp32.header.name}"\nint unused_{mlp_toy.c_fp32.name};\n')
    subprocess.run(
        [compiler(), "-std=c11", "-Wall", "-Wextra", "-Werror", "-c", alone, f"-I{mlp_toy.c_fp32.header.parent}", "-o",
         tmp_path / "alone.o"],
        check=True,
    )  # fmt: skip


@pytest.mark.needs_compiler
def test_one_generator_writes_each_of_several_models_as_if_it_were_alone(mlp_toy, gru_toy, tmp_path):
    """In either order, with one that cannot be written between them."""
    toys = {toy.c_fp32.name: toy for toy in (mlp_toy, gru_toy)}
    models = {name: toy.fp32 for name, toy in toys.items()}
    for order in (list(models), list(reversed(models))):
        forms = generate_all({order[0]: models[order[0]], "absent": tmp_path / "absent.onnx", order[1]: models[order[1]]}, tmp_path)
        assert "absent.onnx" in forms.pop("absent").reason
        for name, form in forms.items():
            assert form.source is not None, form.reason
            assert form.source.source.read_bytes() == toys[name].c_fp32.source.read_bytes()
            assert form.source.header.read_bytes() == toys[name].c_fp32.header.read_bytes()


def test_no_compiler_and_too_large_are_said_not_raised(mlp_toy, tmp_path, monkeypatch):
    """What cannot be built as C is listed with its reason; C is written where none can compile it, for hosts that can."""
    monkeypatch.setattr("rankd_pipeline.runtime.c_export.shutil.which", lambda name: None)
    form = generate_all({"model": mlp_toy.fp32}, tmp_path)["model"]
    assert form.source is not None and form.source.source.is_file()
    reasons = {item.runtime: item.reason for item in line_up(mlp_toy.fp32, None, {"fp32": form})}
    assert reasons["c-fp32"] == "not built: no C compiler on this host" and reasons["onnxruntime-fp32"] == ""
    monkeypatch.setattr("rankd_pipeline.runtime.c_export.WEIGHTS_MAX_BYTES", 1000)
    form = generate_all({"model": mlp_toy.fp32}, tmp_path)["model"]
    assert form.source is None
    assert "too much for C" in form.reason
    with pytest.raises(RankdError, match="too much"):
        generate_c(mlp_toy.fp32, tmp_path, "model")


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file\n", b"\x08\x0a", b"PK\x03\x04" * 30])
def test_what_is_no_onnx_is_refused_in_one_sentence(tmp_path, content):
    """Text, emptiness, archives: RankdError naming the file."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    for use in (verify_onnx, load_session, read_metadata):
        with pytest.raises(RankdError, match=re.escape(str(path))):
            use(path)
    with pytest.raises(RankdError, match="not a file"):
        verify_onnx(tmp_path / "nothing.onnx")


@given(cut=st.floats(min_value=0.02, max_value=0.98))
def test_truncated_model_is_refused(mlp_toy, tmp_path_factory, cut):
    """A file that lost its end never opens."""
    path = tmp_path_factory.getbasetemp() / "cut.onnx"
    whole = mlp_toy.fp32.read_bytes()
    path.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(RankdError):
        load_session(path)


def test_model_cut_between_two_fields_is_refused(mlp_toy, tmp_path):
    """Each field of the file is whole there, and the graph too: only what the doc string names tells that the end is lost."""
    model = onnx.load(mlp_toy.fp32)
    path, whole = tmp_path / "cut.onnx", mlp_toy.fp32.read_bytes()
    entries = [entry.SerializeToString() for entry in model.metadata_props]
    ends = [whole.rindex(entry) + len(entry) for entry in entries]
    ends = [whole.rindex(b"\x72", 0, whole.rindex(entries[0])), *ends]  # the first entry's tag, then the end of each
    assert len(ends) > 2 and ends[-1] == len(whole)
    for end in ends[:-1]:
        path.write_bytes(whole[:end])
        onnx.checker.check_model(onnx.load(path))
        for use in (verify_onnx, load_session):
            with pytest.raises(RankdError, match="its end is missing"):
                use(path)


def test_export_refuses_a_module_that_does_not_fit(tmp_path):
    """Wrong output shape is told before the exporter runs; a name that C cannot have is refused."""
    wrong = toys.MLP_SIGNATURE.model_copy(update={"outputs": (TensorSpec(name="beam", axes=("beam",), shape=(63,), unit="1"),)})
    with pytest.raises(RankdError, match="its signature says"):
        export_onnx(toys.mlp(), wrong, tmp_path / "m.onnx", {})
    dotted = toys.MLP_SIGNATURE.model_copy(update={"outputs": (TensorSpec(name="beam.p", axes=("beam",), shape=(64,), unit="1"),)})
    with pytest.raises(RankdError, match="no identifier"):
        export_onnx(toys.mlp(), dotted, tmp_path / "m.onnx", {})


def test_lint_refuses_complex_foreign_and_late_graphs(mlp_toy):
    """The exported file passes; each fault is named."""
    good = onnx.load(mlp_toy.fp32)
    lint(good)

    def broken(change) -> onnx.ModelProto:
        model = onnx.ModelProto.FromString(good.SerializeToString())
        change(model)
        return model

    faults = {
        "complex": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.COMPLEX64),
        "domain": lambda m: m.opset_import.add(domain="com.microsoft", version=1),
        "opset": lambda m: setattr(m.opset_import[0], "version", 99),
        "IR version": lambda m: setattr(m, "ir_version", IR_VERSION_MAX + 1),
    }
    for word, change in faults.items():
        with pytest.raises(RankdError, match=word):
            lint(broken(change))


def test_parity_sees_what_differs(mlp_toy):
    """A planted difference is measured, a missing output and NaN are refused."""
    run = onnx_runner(mlp_toy.fp32)
    inputs = mlp_toy.inputs(100)

    def shifted(batch):
        outputs = run(batch)
        outputs["beam_probability"] = np.roll(outputs["beam_probability"], 1, axis=-1)
        return outputs

    assert parity(run, shifted, inputs).argmax_agreement == 0.0
    assert parity(run, lambda b: {"beam_probability": run(b)["beam_probability"] + 0.5}, inputs).max_abs == pytest.approx(0.5)
    with pytest.raises(RankdError, match="by name"):
        parity(run, lambda b: {"other": run(b)["beam_probability"]}, inputs)
    with pytest.raises(RankdError, match="not finite"):
        parity(run, lambda b: {"beam_probability": run(b)["beam_probability"] * np.nan}, inputs)


def test_opening_a_file_does_not_load_torch():
    """`rankd profile` and a bundle on a small machine must not need or load PyTorch."""
    code = (
        "import sys, rankd_pipeline.runtime.bundle, rankd_pipeline.runtime.latency;"
        "sys.exit('torch' in sys.modules or 'dagster' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def test_module_is_left_as_it_was(tmp_path):
    """Export runs in evaluation mode and does not touch the weights."""
    module = toys.mlp()
    before = [parameter.clone() for parameter in module.parameters()]
    export_onnx(module, toys.MLP_SIGNATURE, tmp_path / "m.onnx", {})
    assert all(torch.equal(one, two) for one, two in zip(before, module.parameters(), strict=True))
