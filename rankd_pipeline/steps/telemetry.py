"""Field step: telemetry, the finished files of the field as an artifact, cut into windows."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from rankd_pipeline.errors import RankdError
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.store.artifact import sha256_file
from rankd_pipeline.telemetry.contract import read_file, telemetry_schema
from rankd_pipeline.telemetry.rows import FILES, WINDOWS, write_windows
from rankd_pipeline.telemetry.windows import Window, cut, rows_in


def telemetry(ctx: StepContext) -> None:
    """Write `files/` (the field's own, linked where the file system allows it) and `windows.json`; metrics say who is in it.

    ctx.given: {files: {name: sha256}}, what the inbox has taken in and is recent enough.
    """
    schema = telemetry_schema(ctx.function, ctx.corpus_config, ctx.spec.steps.latency_profile.budget_us)
    source = ctx.home / "telemetry" / ctx.spec.pipeline
    (ctx.out / FILES).mkdir(exist_ok=True)
    times, labels, deciders, spans = [], [], [], {}
    sites: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for number, (name, expected) in enumerate(ctx.given["files"].items()):
        ctx.progress(number, len(ctx.given["files"]), "files")
        target = ctx.out / FILES / name
        if not target.exists():
            _link(source / name, target)
        if sha256_file(target) != expected:
            target.unlink()
            raise RankdError(f"{source / name}: changed while it was taken in; telemetry is append-only, write a new file instead.")
        columns, _ = read_file(target, schema)
        times.append(columns["time_s"])
        labels.append(columns["has_label"])
        spans[name] = [float(columns["time_s"].min()), float(columns["time_s"].max())]
        sites.update(columns["site"].tolist())
        models.update(columns["model"].tolist())
        deciders.append(columns["model"])
    config = ctx.config
    windows = cut(np.concatenate(times), np.concatenate(labels), config.min_rows, config.window_hours, config.max_hours)
    ctx.write_json(WINDOWS, write_windows(windows))
    ctx.write_json("models.json", _model_shares(windows, np.concatenate(times), np.concatenate(deciders)))
    newest = windows[-1]
    ctx.metrics.update(
        rows=int(sum(window.rows for window in windows)), labelled=int(sum(window.labelled for window in windows)),
        windows=len(windows), ready=sum(window.state == "ready" for window in windows), newest=newest.key,
        newest_state=newest.state, newest_rows=newest.rows, newest_labelled=newest.labelled,
        sites=dict(sorted(sites.items())), models=dict(sorted(models.items())), spans=spans,
    )  # fmt: skip


def _model_shares(windows: list[Window], time_s: np.ndarray, model: np.ndarray) -> dict[str, dict[str, float]]:
    """{window key: {model: share of its rows}}."""
    shares = {}
    for window in windows:
        names, counts = np.unique(model[rows_in(window, time_s)].astype(str), return_counts=True)
        shares[window.key] = {name: float(count / window.rows) for name, count in zip(names.tolist(), counts, strict=True)}
    return shares


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes: files of the field are never edited, so the artifact costs no space."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise RankdError(f"{source}: gone before it could be taken in; run again.") from None
    except OSError:  # another file system
        temporary = target.with_name(f"{target.name}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
