"""From the deployed ONNX file to portable C without libraries or malloc, and a way to call it on numpy batches.

emx-onnx-cgen writes the arithmetic; here its output is given one exported function, a header, and nothing else. Shipped
builds use portable flags and no -ffast-math, so that C and onnxruntime agree to rounding.
"""

import contextlib
import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from rankd_pipeline.errors import RankdError
from rankd_pipeline.runtime.onnx_export import pin_batch, verify_onnx
from rankd_pipeline.runtime.signature import ModelSignature

WEIGHTS_MAX_BYTES = 4 << 20  # beyond, the C source is tens of MB; such networks run faster on onnxruntime anyway
# -std=c11 also switches floating-point contraction off: the same rounding with and without FMA units.
PORTABLE_FLAGS = ("-std=c11", "-O3", "-Wall", "-Werror")
NATIVE_FLAGS = (*PORTABLE_FLAGS, "-march=native")
NO_COMPILER = "not built: no C compiler on this host"
NAME_HERE, CHECKSUM_HERE = "rankd_model_name", "rankd_model_checksum"  # what the generator writes, to be replaced

Generate = Callable[[onnx.ModelProto, str, str], str]
"""From a model, the name of its function and the checksum of its file to C source."""


# The generator's Gemm sums over K innermost, which no compiler may vectorise without -ffast-math. With N innermost each
# sum keeps its order, so the result is bit for bit the same: 1.5 -> 1.1 us for a 33-32-32-64 MLP, gcc -O3, SSE2.
GEMM_N_INNERMOST = """\
EMX_NODE_FN void {{ op_name }}({{ dim_args }}{{ params | join(', ') }}) {
    for (idx_t i = 0; i < {{ m }}; ++i) {
        {{ acc_type }} acc[{{ n }}];
        for (idx_t j = 0; j < {{ n }}; ++j) {
            acc[j] = {{ zero_literal }};
        }
        for (idx_t k = 0; k < {{ k }}; ++k) {
            const {{ c_type }} a_val = {{ input_a }}{% if trans_a %}[k][i]{% else %}[i][k]{% endif %};
            for (idx_t j = 0; j < {{ n }}; ++j) {
                acc[j] += a_val * {{ input_b }}[k][j];
            }
        }
        for (idx_t j = 0; j < {{ n }}; ++j) {
            const {{ c_type }} bias = {{ input_c }}[{% if c_dim1 == 1 %}0{% else %}j{% endif %}];
            {{ output }}[i][j] = acc[j] * {{ alpha_literal }} + bias * {{ beta_literal }};
        }
    }
}
"""


@dataclass(frozen=True)
class CSource:
    """Generated C: one source with one exported function `name`, and its header."""

    name: str
    source: Path
    header: Path


@dataclass(frozen=True)
class CForm:
    """The C of a model, or the reason why there is none."""

    source: CSource | None
    reason: str = ""


def compiler() -> str | None:
    """Path of the C compiler, or None where there is none (C candidates are then "not built")."""
    return shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")


def generate_c(onnx_path: Path, out_dir: Path, name: str) -> CSource:
    """Write `name`.c and `name`.h into `out_dir`: the model for one sample a call; the same file gives the same bytes.

    Raises RankdError where the generator does not know an operator or the weights exceed WEIGHTS_MAX_BYTES.
    """
    with _generator() as generate:
        return _written(generate, onnx_path, out_dir, name)


def generate_all(models: Mapping[str, Path], out_dir: Path) -> dict[str, CForm]:
    """The C of several ONNX files by the name of their function, each as `generate_c` writes it, or why there is none."""
    found = {}
    with _generator() as generate:
        for name, path in models.items():
            try:
                found[name] = CForm(_written(generate, path, out_dir, name))
            except RankdError as error:
                found[name] = CForm(None, f"not built: {error}")
    return found


def _written(generate: Generate, onnx_path: Path, out_dir: Path, name: str) -> CSource:
    if not name.isidentifier():
        raise RankdError(f"{name!r} cannot name a C function; expected letters, digits and underscores.")
    model = verify_onnx(onnx_path)
    weight_bytes = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    if weight_bytes > WEIGHTS_MAX_BYTES:
        raise RankdError(
            f"{onnx_path} holds {weight_bytes >> 20} MiB of weights, too much for C source "
            f"(at most {WEIGHTS_MAX_BYTES >> 20} MiB); use onnxruntime or OpenVINO."
        )
    checksum = hashlib.sha256(Path(onnx_path).read_bytes()).hexdigest()
    try:
        # The generator raises its own and onnx's errors alike for what it cannot translate.
        emitted = generate(model, name, checksum)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RankdError(f"{onnx_path} cannot be written as C: {first_line}") from error
    source = _tidy(emitted, name)
    prototype = _prototype(source, name)
    out_dir.mkdir(parents=True, exist_ok=True)
    result = CSource(name=name, source=out_dir / f"{name}.c", header=out_dir / f"{name}.h")
    result.source.write_text(source)
    result.header.write_text(_header(prototype, name, checksum))
    return result


def build_shared(csrc: CSource, out_dir: Path) -> Path:
    """Compile `csrc` into a shared library."""
    out_dir.mkdir(parents=True, exist_ok=True)
    library = out_dir / f"{csrc.name}.so"
    compile_c([csrc.source], library, ("-fPIC", "-shared"))
    return library


def compile_c(sources: list[Path], target: Path, extra: tuple[str, ...] = (), native: bool = False) -> None:
    """Run the C compiler on `sources`; `native` adds -march=native (a labelled option, never shipped).

    Raises RankdError without a compiler or with its first error line.
    """
    found = compiler()
    if found is None:
        raise RankdError("No C compiler here (gcc, cc or clang); install one or use the onnxruntime candidate.")
    flags = NATIVE_FLAGS if native else PORTABLE_FLAGS
    command = [found, *flags, *extra, *(str(path) for path in sources), "-o", str(target), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise RankdError(f"{found} cannot build {target.name}: {first}")


class CModel:
    """The compiled C function as a callable on numpy batches, for parity and scoring (not for timing)."""

    def __init__(self, path: Path, signature: ModelSignature) -> None:
        """Load the library `path` made by `build_shared` from a model with this `signature`."""
        try:
            library = ctypes.CDLL(str(Path(path).resolve()))
            self._function = getattr(library, Path(path).name.split(".")[0])
        except (OSError, AttributeError) as error:
            raise RankdError(f"{path} is not a library built by rankd: {error}") from error
        self._function.restype = None
        self._function.argtypes = [ctypes.c_void_p] * (len(signature.inputs) + len(signature.outputs))
        self.signature = signature

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run each sample of `inputs` (`[n, *shape]`); returns outputs `[n, *shape]`."""
        specs = self.signature.inputs
        rows = [np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype) for spec in specs]
        count = len(rows[0])
        for spec, values in zip(specs, rows, strict=True):
            if values.shape != (count, *spec.shape):
                raise RankdError(f"Input {spec.name} has shape {values.shape}; expected ({count}, {spec.shape}).")
        outputs = {spec.name: np.empty((count, *spec.shape), dtype=spec.dtype) for spec in self.signature.outputs}
        arrays = [*rows, *outputs.values()]
        starts = [array.ctypes.data for array in arrays]
        strides = [array.nbytes // max(count, 1) for array in arrays]
        for index in range(count):
            self._function(*(start + index * step for start, step in zip(starts, strides, strict=True)))
        return outputs


@contextlib.contextmanager
def _generator() -> Iterator[Generate]:
    """The generator's own output for one sample a call, everything on the stack and inside the source.

    It compiles all of its templates with its first model, which takes longer than the model: one serves all.
    """
    import emx_onnx_cgen
    from emx_onnx_cgen.compiler import CompilerOptions

    with tempfile.TemporaryDirectory(prefix="rankd-c-") as folder:
        templates = Path(folder) / "templates"
        shutil.copytree(Path(emx_onnx_cgen.__file__).parent / "templates", templates)
        gemm = templates / "gemm_op.c.j2"
        dense = "input_c and c_rank == 1 and c_axis != 'row' and not trans_b"
        gemm.write_text(f"{{% if {dense} %}}\n{GEMM_N_INNERMOST}{{% else %}}\n{gemm.read_text()}{{% endif %}}\n")
        options = CompilerOptions(
            template_dir=templates,
            model_name=NAME_HERE,
            model_checksum=CHECKSUM_HERE,
            large_temp_threshold_bytes=0,
            large_weight_threshold=1 << 40,
        )
        generator = emx_onnx_cgen.Compiler(options)

        def generate(model: onnx.ModelProto, name: str, checksum: str) -> str:
            pinned = pin_batch(model)
            del pinned.metadata_props[:]  # lineage stays in the ONNX file; the checksum ties the C source to it
            pinned.doc_string = ""
            return generator.compile(pinned).replace(NAME_HERE, name).replace(CHECKSUM_HERE, checksum)

        yield generate


def _tidy(source: str, name: str) -> str:
    """One exported symbol: weights become static, the unused loader goes; refuse anything that allocates."""
    source = re.sub(r"^extern const [^;]*;\n", "", source, flags=re.M)
    source = re.sub(r"^const EMX_UNUSED", "static const EMX_UNUSED", source, flags=re.M)
    source = re.sub(rf"^_Bool {name}_load\(const char \*path\) \{{.*?^\}}\n", "", source, flags=re.M | re.S)
    if re.search(r"\b(malloc|calloc|realloc|fopen)\s*\(", source):
        raise RankdError(f"The C generated for {name} allocates memory or reads files; use onnxruntime for this model.")
    return re.sub(r"\n{3,}", "\n\n", source)


def _prototype(source: str, name: str) -> str:
    found = re.search(rf"^void {name}\((.*?)\) \{{", source, flags=re.M | re.S)
    if found is None:
        raise RankdError(f"The C generated for {name} has no function of that name; this emx-onnx-cgen is not supported.")
    # `restrict` is a promise between caller and function; C++ callers cannot read it, C callers need not.
    return f"void {name}({found.group(1).replace('restrict ', '')});"


def _header(prototype: str, name: str, checksum: str) -> str:
    guard = f"{name.upper()}_H"
    return (
        f"/* {name}: one sample a call, no allocation, no global state. Inputs first, then outputs.\n"
        f" * Generated from the ONNX file with sha256 {checksum}. */\n"
        f"#ifndef {guard}\n#define {guard}\n\n#include <stdbool.h>\n#include <stdint.h>\n\n"
        f'#ifdef __cplusplus\nextern "C" {{\n#endif\n\n{prototype}\n\n'
        f"#ifdef __cplusplus\n}}\n#endif\n\n#endif\n"
    )


def parameters(csrc: CSource) -> list[str]:
    """The C declarations of the function's parameters, inputs first, as the header has them."""
    found = re.search(rf"^void {csrc.name}\((.*?)\);", csrc.header.read_text(), flags=re.M | re.S)
    if found is None:
        raise RankdError(f"{csrc.header} does not declare {csrc.name}; generate it again.")
    return [part.strip() for part in found.group(1).split(", ")]


def declared_shape(declaration: str) -> tuple[int, ...]:
    """Shape of one parameter as the header declares it: "const float x[1][16]" -> (1, 16)."""
    return tuple(int(size) for size in re.findall(r"\[(\d+)\]", declaration))
