"""Bundles: whole or absent, every byte guarded, callers that run, a predictor that refuses bad input."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.errors import ArtifactDamaged, RankdError
from rankd_pipeline.runtime.bundle import SLOTS, load_bundle, verify_bundle, write_bundle
from rankd_pipeline.runtime.c_export import compiler
from rankd_pipeline.runtime.parity import onnx_runner


def make(toy, out: Path) -> Path:
    """A bundle of a toy, with C where this host has a compiler."""
    files = {"model.onnx": toy.fp32}
    if toy.c_fp32 is not None:
        files |= {toy.c_fp32.source.name: toy.c_fp32.source, toy.c_fp32.header.name: toy.c_fp32.header}
    write_bundle(out, files, {"version": 3, "stamp": "smoke, not deployable"}, "<html>model card</html>")
    return out


@pytest.fixture(scope="module")
def bundle(mlp_toy, tmp_path_factory) -> Path:
    """The beam picker's bundle."""
    return make(mlp_toy, tmp_path_factory.mktemp("bundle") / "beam-3")


def test_bundle_is_whole_and_predicts_as_the_file(bundle, mlp_toy):
    """The model inside is the exported file, byte for byte; predictions are its own."""
    manifest = verify_bundle(bundle)
    assert manifest.about["stamp"] == "smoke, not deployable"
    assert set(manifest.files) == {path.name for path in bundle.iterdir()} - {"manifest.json"}
    assert {"model.onnx", "caller.py", "profile_model.py", "model_card.html"} <= set(manifest.files)
    assert (bundle / "model.onnx").read_bytes() == mlp_toy.fp32.read_bytes()
    inputs = mlp_toy.inputs(33)
    expected = onnx_runner(mlp_toy.fp32)(inputs)["beam_probability"]
    np.testing.assert_array_equal(load_bundle(bundle)(inputs)["beam_probability"], expected)


@given(data=st.data())
@settings(max_examples=150)
def test_any_flipped_byte_is_caught(bundle, data):
    """One byte of any file, manifest included, changed in any way: refused before anything is loaded."""
    path = data.draw(st.sampled_from(sorted(bundle.iterdir())))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = bytearray(whole)
    changed[position] ^= flip
    try:
        path.write_bytes(bytes(changed))
        with pytest.raises(ArtifactDamaged, match=re.escape(str(bundle))):
            load_bundle(bundle)
    finally:
        path.write_bytes(whole)
    verify_bundle(bundle)


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest", "escape"])
def test_lost_and_shifted_files_are_caught(bundle, tmp_path, damage):
    """Truncated, missing, or pointing outside: one sentence."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    if damage == "truncate":
        (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes()[:-1])
    elif damage == "remove":
        (copy / "caller.py").unlink()
    elif damage == "no manifest":
        (copy / "manifest.json").unlink()
    else:
        text = (copy / "manifest.json").read_text()
        (copy / "manifest.json").write_text(text.replace('"caller.py"', '"../../etc/passwd"'))
    with pytest.raises(RankdError):
        verify_bundle(copy)


def test_bundle_is_never_overwritten_and_needs_its_model(mlp_toy, bundle, tmp_path):
    """An existing folder, a missing file, a path as a name, a model that is none: refused, and nothing is left behind."""
    with pytest.raises(RankdError, match="exists already"):
        make(mlp_toy, bundle)
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    for files in ({}, {"model.onnx": tmp_path / "no"}, {"model.onnx": mlp_toy.fp32, "../x": mlp_toy.fp32}, {"model.onnx": text}):
        with pytest.raises(RankdError):
            write_bundle(tmp_path / "new", files, {}, "")
    assert [path.name for path in tmp_path.iterdir()] == ["text.onnx"]


def test_callers_run_with_onnxruntime_or_a_compiler_alone(toy, tmp_path):
    """caller.py prints outputs without rankd on its path; caller.c compiles with -Wall -Werror and agrees with it on zeros.

    A stateful model is called in a slot loop: every slot sees the state that the one before has left.
    """
    out = make(toy, tmp_path / "bundle")
    assert len((out / "caller.py").read_text().splitlines()) <= 18
    done = subprocess.run([sys.executable, "-I", str(out / "caller.py")], capture_output=True, text=True, check=True, cwd=tmp_path)
    decision, fed = toy.signature.decision.name, toy.signature.state
    assert decision in done.stdout
    ones = {spec.name: np.ones((SLOTS, *spec.shape), spec.dtype) for spec in toy.signature.inputs if spec.name not in fed}
    if fed:
        last = np.array([float(x) for x in re.findall(r"-?\d+\.\d*(?:e[+-]\d+)?", done.stdout.split(f"{SLOTS - 1} {decision}")[1])])
        np.testing.assert_allclose(last, load_bundle(out).in_order(ones)[decision][-1], rtol=1e-4)
    if compiler() is None:
        return
    program = tmp_path / "caller"
    sources = [out / "caller.c", out / toy.c_fp32.source.name]
    subprocess.run([compiler(), "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", *sources, "-o", program, "-lm"], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    zeros = {name: np.zeros_like(values) for name, values in ones.items()}
    expected = (load_bundle(out).in_order(zeros) if fed else onnx_runner(toy.fp32)(zeros))[decision]
    expected = expected.ravel() if fed else expected[0]
    np.testing.assert_allclose([float(line) for line in printed.split()], expected, rtol=1e-4, atol=1e-5)


def test_predictor_refuses_bad_input_and_starts_state_at_zero(gru_toy, tmp_path):
    """Missing, unknown, misshapen, NaN: one sentence each; an absent state is zero."""
    predict = load_bundle(make(gru_toy, tmp_path / "bundle"))
    inputs = gru_toy.inputs(5)
    without_state = {name: values for name, values in inputs.items() if name != "state"}
    zero = {**inputs, "state": np.zeros((5, 8), np.float32)}
    np.testing.assert_array_equal(predict(without_state)["cell_score"], predict(zero)["cell_score"])
    stepped = predict.in_order(inputs)
    state = np.zeros((1, 8), np.float32)
    for row in range(5):
        one = predict({**{name: values[row : row + 1] for name, values in inputs.items()}, "state": state})
        np.testing.assert_array_equal(stepped["cell_score"][row], one["cell_score"][0])
        state = one["next_state"]
    nan = {**inputs, "cell_rsrp_dbm": np.full((5, 6), np.nan, np.float32)}
    for bad, word in (
        ({"cell_mask": inputs["cell_mask"]}, "missing"),
        ({**inputs, "colour": inputs["state"]}, "colour"),
        ({**inputs, "state": np.zeros((5, 9), np.float32)}, "shape"),
        (nan, "NaN"),
        ({}, "expected"),
    ):
        with pytest.raises(RankdError, match=word):
            predict(bad)
