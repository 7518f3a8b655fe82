"""The beam student as a C programmer would write it: plain loops, transposed weights, no generator. For comparison only."""

from pathlib import Path
from typing import Any

import numpy as np

from rankd_pipeline.runtime.c_export import CSource

SOURCE = """#include <math.h>
#include <stdint.h>
#include "byhand.h"
{arrays}
enum {{ ROWS = {rows}, COLS = {cols}, BEAMS = ROWS * COLS, DOWN = {down}, ACROSS = {across}, FIRST = {first} }};
static void dense(const float *x, int in, const float *w, const float *b, int out, float *y, int relu)
{{
    for (int o = 0; o < out; o++) y[o] = b[o];
    for (int i = 0; i < in; i++)
        for (int o = 0; o < out; o++) y[o] += x[i] * w[i * out + o];
    if (relu) for (int o = 0; o < out; o++) y[o] = y[o] > 0 ? y[o] : 0;
}}
void byhand(const float rsrp[1][1][{beams}], const uint8_t mask[1][1][{beams}], float probability[1][{classes}])
{{
    float shape[BEAMS], x[2 * BEAMS + 1], a[{widest}], b[{widest}], top = -1e4f, peak = -1e30f, sum = 0;
    float *p = probability[0];
    int any = 0;
    for (int i = 0; i < BEAMS; i++) if (mask[0][0][i]) {{ any = 1; if (rsrp[0][0][i] > top) top = rsrp[0][0][i]; }}
    for (int i = 0; i < BEAMS; i++) {{
        float r = rsrp[0][0][i] - top;
        r = r < -60.0f ? -60.0f : r;
        shape[i] = mask[0][0][i] ? (r - mean[i]) / std[i] : 0;
    }}
    x[2 * BEAMS] = any ? (top - level_mean[0]) / level_std[0] : 0;
    for (int beam = 0; beam < BEAMS; beam++) {{
        for (int i = 0; i < BEAMS; i++) {{
            int seen = (beam / COLS + i / COLS) % ROWS * COLS + (beam % COLS + i % COLS) % COLS;
            x[i] = shape[seen];
            x[BEAMS + i] = mask[0][0][seen] ? 1 : 0;
        }}
        dense(x, 2 * BEAMS + 1, w0, b0, FIRST, a, 0);
        for (int o = 0; o < FIRST; o++) {{ float v = a[o] + place[beam * FIRST + o]; a[o] = v > 0 ? v : 0; }}
{layers}
        for (int d = 0; d < DOWN; d++)
            for (int c = 0; c < ACROSS; c++)
                p[((beam / COLS * DOWN + d) * COLS + beam % COLS) * ACROSS + c] = {last}[d * ACROSS + c];
    }}
    for (int o = 0; o < {classes}; o++) peak = p[o] > peak ? p[o] : peak;
    for (int o = 0; o < {classes}; o++) {{ p[o] = expf((p[o] - peak) / temperature[0]); sum += p[o]; }}
    for (int o = 0; o < {classes}; o++) p[o] /= sum;
}}
"""


def handwritten_c(module: Any, folder: Path) -> CSource:
    """Write byhand.c and byhand.h for a `Deployable` of `BeamMLP` without history."""
    folder.mkdir(parents=True)
    student, state = module.student, {name: value.numpy() for name, value in module.state_dict().items()}
    arrays = {
        "mean": state["student.normalizer.shape_mean"], "std": state["student.normalizer.shape_std"],
        "level_mean": state["student.normalizer.level_mean"], "level_std": state["student.normalizer.level_std"],
        "temperature": state["temperature"].reshape(1), "place": state["student.place"],
    }  # fmt: skip
    weights = [name for name in state if name.endswith("weight")]
    for number, name in enumerate(weights):
        arrays[f"w{number}"], arrays[f"b{number}"] = state[name].T, state[name.replace("weight", "bias")]
    shapes = [state[name].shape for name in weights]
    calls, source = [], "a"
    for number in range(1, len(weights)):
        out, relu = ("b" if source == "a" else "a"), int(number < len(weights) - 1)
        calls.append(f"        dense({source}, {shapes[number][1]}, w{number}, b{number}, {shapes[number][0]}, {out}, {relu});")
        source = out
    beams = student.rows * student.cols
    classes = beams * student.down * student.across
    text = SOURCE.format(
        arrays="\n".join(_array(name, value) for name, value in arrays.items()), rows=student.rows, cols=student.cols,
        down=student.down, across=student.across, beams=beams, first=shapes[0][0], classes=classes, last=source,
        widest=max(shape[0] for shape in shapes), layers="\n".join(calls),
    )  # fmt: skip
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
