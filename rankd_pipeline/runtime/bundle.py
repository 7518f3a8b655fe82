"""A deployable folder that proves itself: the model, its C source, callers, the profile script, all under one manifest.

`manifest.json` holds the sha256 of every file and of itself, so one flipped byte anywhere is caught, offline, before
anything is loaded. The model inside is the file that was profiled, byte for byte.
"""

import gc
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from rankd_pipeline.errors import ArtifactDamaged, RankdError
from rankd_pipeline.runtime import profile_script
from rankd_pipeline.runtime.c_export import CSource, parameters
from rankd_pipeline.runtime.onnx_export import load_session, read_signature, run_batches
from rankd_pipeline.runtime.signature import ModelSignature

MODEL, MANIFEST, CARD = "model.onnx", "manifest.json", "model_card.html"
PROFILE_SCRIPT = "profile_model.py"  # profile.py would shadow a module of the standard library


class Manifest(BaseModel):
    """What a bundle says of itself: its signature, the sha256 of each file, and what the deployer states in `about`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    signature: ModelSignature
    files: dict[str, str]
    about: dict[str, Any]


def write_bundle(out: Path, files: Mapping[str, Path], manifest: Mapping[str, Any], model_card: str) -> None:
    """Write the folder `out`, whole or not at all.

    `files` maps names in the bundle to what is copied: `model.onnx` (made by `export_onnx`) and, where C was chosen,
    `NAME.c` with `NAME.h`. `manifest` is any JSON object: version, runtime, stamp, lineage; it comes back as
    `Manifest.about`. `model_card` is HTML. Raises RankdError if `out` exists, a file is missing, or a name is a path.
    """
    if out.exists():
        raise RankdError(f"Bundle {out} exists already; a bundle is never overwritten.")
    if MODEL not in files:
        raise RankdError(f"A bundle needs {MODEL}; got {sorted(files)}.")
    for name, source in files.items():
        if Path(name).name != name or not source.is_file():
            raise RankdError(f"Bundle file {name!r}: expected a plain name and an existing file, got {source}.")
    signature = read_signature(files[MODEL])
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for name, source in files.items():
            shutil.copyfile(source, scratch / name)
        shutil.copyfile(Path(profile_script.__file__), scratch / PROFILE_SCRIPT)
        (scratch / CARD).write_text(model_card, encoding="utf-8")
        (scratch / "caller.py").write_text(python_caller(signature))
        for header in scratch.glob("*.h"):
            csource = CSource(name=header.stem, source=header.with_suffix(".c"), header=header)
            (scratch / "caller.c").write_text(c_caller(csource, signature))
        hashes = {path.name: _sha256(path) for path in sorted(scratch.iterdir())}
        content = Manifest(signature=signature, files=hashes, about=dict(manifest))
        (scratch / MANIFEST).write_bytes(_seal(content))
        scratch.chmod(0o755)
        os.rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def verify_bundle(path: Path) -> Manifest:
    """Check every byte of the bundle at `path` against its manifest and return it; raises ArtifactDamaged otherwise."""
    manifest_path = Path(path) / MANIFEST
    if not manifest_path.is_file():
        raise RankdError(f"{path} is not a bundle: it has no {MANIFEST}.")
    stored = manifest_path.read_bytes()
    try:
        content = json.loads(stored)
        content.pop("manifest_sha256")
        manifest = Manifest.model_validate(content)
        sealed = _seal(manifest)
    except (ValueError, ValidationError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactDamaged(f"{manifest_path} is damaged: it is no manifest any more. Deploy again.") from error
    if sealed != stored:
        raise ArtifactDamaged(f"{manifest_path} was edited: its own hash does not fit. Deploy again.")
    for name, expected in manifest.files.items():
        file = Path(path) / name
        if Path(name).name != name or not file.is_file():
            raise ArtifactDamaged(f"Bundle {path} lacks {name}. Deploy again.")
        found = _sha256(file)
        if found != expected:
            raise ArtifactDamaged(f"{file} was changed: sha256 {found[:12]}, manifest says {expected[:12]}. Deploy again.")
    if MODEL not in manifest.files:
        raise ArtifactDamaged(f"Bundle {path} lists no {MODEL}. Deploy again.")
    return manifest


class Predictor:
    """A verified bundle, ready to call: `predictor(inputs)` with `[n, *shape]` arrays, outputs by name."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.signature = manifest.signature
        self._session = load_session(Path(path) / MODEL)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a batch on onnxruntime. Carried state that is not given starts at zero.

        Raises RankdError if an input is missing or unknown, has another shape, or is not finite.
        """
        return run_batches(self._session, self._checked(inputs))

    def call_times_us(self, inputs: Mapping[str, np.ndarray], passes: int = 3) -> np.ndarray:
        """Time [n] of each sample in a call of its own, as a base station makes them.

        It is the CPU time of the calling thread, the least of some passes over all samples: a call costs that on a core of
        its own, whatever else this host does.
        """
        ready, names = self._checked(inputs), self.signature.output_names
        count = len(next(iter(ready.values())))
        feeds = [{name: values[row : row + 1] for name, values in ready.items()} for row in range(count)]
        elapsed_ns = np.zeros((passes, count), np.int64)
        collecting = gc.isenabled()
        gc.disable()
        try:
            for one in elapsed_ns:
                for row, feed in enumerate(feeds):
                    before = time.thread_time_ns()
                    self._session.run(names, feed)
                    one[row] = time.thread_time_ns() - before
        finally:
            if collecting:
                gc.enable()
        return elapsed_ns.min(axis=0) / 1e3

    def _checked(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's inputs, in type and shape, or a sentence why they are not."""
        unknown = set(inputs) - set(self.signature.input_names)
        if unknown or not inputs:
            raise RankdError(f"Inputs {sorted(unknown)} are unknown; expected {self.signature.input_names}.")
        count = len(next(iter(inputs.values())))
        ready = {}
        for spec in self.signature.inputs:
            if spec.name not in inputs and spec.name in self.signature.state:
                ready[spec.name] = np.zeros((count, *spec.shape), dtype=spec.dtype)
                continue
            if spec.name not in inputs:
                raise RankdError(f"Input {spec.name} [{spec.unit}] is missing; expected {self.signature.input_names}.")
            values = np.asarray(inputs[spec.name]).astype(spec.dtype)
            if values.shape != (count, *spec.shape):
                raise RankdError(f"Input {spec.name} has shape {values.shape}; expected {(count, *spec.shape)}.")
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise RankdError(f"Input {spec.name} holds NaN or infinity; tell missing values by the mask instead.")
            ready[spec.name] = values
        return ready

    def in_order(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run rows one after the other as one user's calls, the carried state fed back from each to the next.

        It starts at zero, whatever `inputs` say of it. Raises as a call does.
        """
        fed = self.signature.state
        rows = {name: values for name, values in inputs.items() if name not in fed}
        state: dict[str, np.ndarray] = {}
        said: list[dict[str, np.ndarray]] = []
        for row in range(len(next(iter(rows.values()), ()))):
            said.append(self({**{name: values[row : row + 1] for name, values in rows.items()}, **state}))
            state = {before: said[-1][after] for before, after in fed.items()}
        if not said:
            raise RankdError(f"No rows given; expected {self.signature.input_names}.")
        return {name: np.concatenate([one[name] for one in said]) for name in said[0]}


def load_bundle(path: Path) -> Predictor:
    """Verify the bundle at `path`, then open its model with onnxruntime. A link (to what serves) is followed once."""
    folder = Path(path).resolve()
    return Predictor(folder, verify_bundle(folder))


SLOTS = 3
"""Slots that the callers of a stateful model run through."""


def python_caller(signature: ModelSignature) -> str:
    """The few lines that call the model from Python with onnxruntime alone; a stateful one in a slot loop."""
    names, decision, state = json.dumps(signature.output_names), signature.decision.name, signature.state
    inputs = [
        f'"{spec.name}": np.ones({(1, *spec.shape)}, dtype="{spec.dtype}"),  # {_describe(spec)}'
        for spec in signature.inputs if spec.name not in state
    ]  # fmt: skip
    lines = [
        f'"""Call the model once{" a slot, its state carried on" if state else ""}. Needs numpy and onnxruntime."""',
        "from pathlib import Path",
        "import numpy as np",
        "import onnxruntime as ort",
        f'session = ort.InferenceSession(Path(__file__).with_name("{MODEL}"), providers=["CPUExecutionProvider"])',
    ]
    if not state:
        lines += ["inputs = {", *(f"    {line}" for line in inputs), "}"]
        lines += [f"outputs = dict(zip({names}, session.run({names}, inputs), strict=True))"]
        lines += [f'print("{decision}", outputs["{decision}"])']
        return "\n".join(lines) + "\n"
    zeros = [
        f'"{spec.name}": np.zeros({(1, *spec.shape)}, dtype="{spec.dtype}")' for spec in signature.inputs if spec.name in state
    ]  # fmt: skip
    fed = [f'"{before}": outputs["{after}"]' for before, after in state.items()]
    lines += [f"state = {{{', '.join(zeros)}}}  # a new user: nothing known yet", f"for slot in range({SLOTS}):"]
    lines += ["    inputs = {", *(f"        {line}" for line in inputs), "    }"]
    lines += [f"    outputs = dict(zip({names}, session.run({names}, inputs | state), strict=True))"]
    lines += [f"    state = {{{', '.join(fed)}}}", f'    print(slot, "{decision}", outputs["{decision}"])']
    return "\n".join(lines) + "\n"


def c_caller(csource: CSource, signature: ModelSignature) -> str:
    """The few lines that call the model from C; a stateful one in a slot loop."""
    declared = [text.removeprefix("const ") for text in parameters(csource)]
    specs = (*signature.inputs, *signature.outputs)
    if len(declared) != len(specs):
        raise RankdError(f"{csource.header} declares {len(declared)} tensors; the signature has {len(specs)}.")
    names = {spec.name: _declared_name(text) for spec, text in zip(specs, declared, strict=True)}
    decision, state = signature.decision, signature.state
    call = f"{csource.name}({', '.join(names.values())});"
    show = [
        f"for (int i = 0; i < {decision.elements}; i++)",
        f'    printf("%g\\n", (double)((const {_c_type(decision.dtype)} *){names[decision.name]})[i]);',
    ]
    if state:
        fed = [f"memcpy({names[before]}, {names[after]}, sizeof {names[before]});" for before, after in state.items()]
        body = [f"for (int slot = 0; slot < {SLOTS}; slot++) {{", "    /* here: this slot's report into the inputs */"]
        body += [f"    {line}" for line in (call, *fed, *show)] + ["}"]
    else:
        body = [call, *show]
    every = "once a slot, its state carried on" if state else "once"
    lines = [
        f"/* Call the model {every}: cc -O3 caller.c {csource.name}.c -lm && ./a.out */",
        "#include <stdio.h>",
        *(["#include <string.h>"] if state else []),
        f'#include "{csource.header.name}"',
        "int main(void)",
        "{",
        *(f"    static {text} = {{0}}; /* {_describe(spec)} */" for text, spec in zip(declared, specs, strict=True)),
        *(f"    {line}" for line in body),
        "    return 0;",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _describe(spec: Any) -> str:
    return f"{' x '.join(spec.axes) or 'scalar'}, {spec.unit}"


def _declared_name(declaration: str) -> str:
    return declaration.split("[", 1)[0].split()[-1].lstrip("*")


def _c_type(dtype: str) -> str:
    return {"float32": "float", "float64": "double", "bool": "bool"}.get(dtype, f"{dtype}_t")


def _seal(manifest: Manifest) -> bytes:
    """The only bytes this manifest can have: canonical JSON with the sha256 of everything else in it."""
    content = manifest.model_dump(mode="json")
    body = json.dumps(content, sort_keys=True, indent=1, allow_nan=False)
    content["manifest_sha256"] = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
