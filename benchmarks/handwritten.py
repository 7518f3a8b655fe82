"""The beam student as a C programmer would write it: plain loops, transposed weights, no generator. For comparison only."""

from pathlib import Path
from typing import Any

import numpy as np

from rankd_pipeline.runtime.c_export import CSource

SOURCE = """#include <math.h>
#include <stdint.h>
#include "byhand.h"
{arrays}
static void dense(const float *x, int in, const float *w, const float *b, int out, float *y, int relu)
{{
    for (int o = 0; o < out; o++) y[o] = b[o];
    for (int i = 0; i < in; i++)
        for (int o = 0; o < out; o++) y[o] += x[i] * w[i * out + o];
    if (relu) for (int o = 0; o < out; o++) y[o] = y[o] > 0 ? y[o] : 0;
}}
void byhand(const float rsrp[1][1][{beams}], const uint8_t mask[1][1][{beams}], float probability[1][{classes}])
{{
    float x[{width}], a[{widest}], b[{widest}], top = -1e4f, sum = 0;
    int any = 0;
    for (int i = 0; i < {beams}; i++) if (mask[0][0][i]) {{ any = 1; if (rsrp[0][0][i] > top) top = rsrp[0][0][i]; }}
    for (int i = 0; i < {beams}; i++) {{
        float r = rsrp[0][0][i] - top;
        r = r < -60.0f ? -60.0f : r;
        x[i] = mask[0][0][i] ? (r - mean[i]) / std[i] : 0;
        x[{beams} + i] = mask[0][0][i] ? 1 : 0;
    }}
    x[2 * {beams}] = any ? (top - level_mean[0]) / level_std[0] : 0;
{layers}
    float peak = a[0];
    for (int o = 1; o < {classes}; o++) peak = a[o] > peak ? a[o] : peak;
    for (int o = 0; o < {classes}; o++) {{ probability[0][o] = expf((a[o] - peak) / temperature[0]); sum += probability[0][o]; }}
    for (int o = 0; o < {classes}; o++) probability[0][o] /= sum;
}}
"""


def handwritten_c(module: Any, folder: Path) -> CSource:
    """Write byhand.c and byhand.h for a `Deployable` of `BeamMLP` without history."""
    folder.mkdir(parents=True)
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    weights = [name for name in state if name.endswith("weight")]
    arrays = {
        "mean": state["student.normalizer.shape_mean"], "std": state["student.normalizer.shape_std"],
        "level_mean": state["student.normalizer.level_mean"], "level_std": state["student.normalizer.level_std"],
        "temperature": state["temperature"].reshape(1),
    }  # fmt: skip
    calls, source, shapes = [], "x", [state[name].shape for name in weights]
    for number, name in enumerate(weights):
        arrays[f"w{number}"], arrays[f"b{number}"] = state[name].T, state[name.replace("weight", "bias")]
        out, last = ("a", number == len(weights) - 1) if (len(weights) - number) % 2 else ("b", False)
        calls.append(
            f"    dense({source}, {shapes[number][1]}, w{number}, b{number}, {shapes[number][0]}, {out}, {int(not last)});"
        )
        source = out
    text = SOURCE.format(
        arrays="\n".join(_array(name, value) for name, value in arrays.items()), beams=len(arrays["mean"]), width=shapes[0][1],
        widest=max(shape[0] for shape in shapes), classes=shapes[-1][0], layers="\n".join(calls),
    )  # fmt: skip
    beams, classes = len(arrays["mean"]), shapes[-1][0]
    (folder / "byhand.c").write_text(text)
    (folder / "byhand.h").write_text(
        "#include <stdint.h>\n"
        f"void byhand(const float rsrp[1][1][{beams}], const uint8_t mask[1][1][{beams}], float probability[1][{classes}]);\n"
    )
    return CSource(name="byhand", source=folder / "byhand.c", header=folder / "byhand.h")


def _array(name: str, values: np.ndarray) -> str:
    texts = [f"{value:.9g}" for value in values.ravel()]
    numbers = ", ".join(text + ("f" if "." in text or "e" in text else ".0f") for text in texts)
    return f"static const float {name}[{values.size}] = {{{numbers}}};"
