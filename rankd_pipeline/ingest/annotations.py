"""Reads a CSV of labels that experts gave: good rows are kept, bad ones are refused by row number."""

import csv
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa

from rankd_pipeline.errors import RankdError

REQUIRED = ("sample_id", "label")
OPTIONAL = ("annotator", "confidence")


def read_annotations(path: Path, classes: int, known_ids: Collection[int] | np.ndarray) -> tuple[pa.Table, list[tuple[int, str]]]:
    """Read `sample_id,label[,annotator[,confidence]]`.

    :param classes: labels are whole numbers in [0, classes)
    :param known_ids: the sample ids of the corpus
    :returns: (sample_id int64, label int32, annotator string, confidence float32; one row a sample, in file order),
        [(row number as an editor shows it, reason)]. Two annotators who agree count once; where they differ all rows of that
        sample are refused, for only the experts can tell who is right.
    Raises: RankdError if the file cannot be read or a required column is missing.
    """
    known = set(np.asarray(list(known_ids) if not isinstance(known_ids, np.ndarray) else known_ids).tolist())
    good: dict[int, tuple[int, int, str, float]] = {}
    rejected: list[tuple[int, str]] = []
    rows_of: dict[int, list[int]] = {}
    disputed: set[int] = set()
    for row, cells in _rows(path):
        try:
            sample, label, confidence = _parse(cells, classes, known)
        except ValueError as error:
            rejected.append((row, str(error)))
            continue
        rows_of.setdefault(sample, []).append(row)
        if sample not in good:
            good[sample] = (row, label, (cells.get("annotator") or "").strip(), confidence)
        elif good[sample][1] != label:
            disputed.add(sample)
    for sample in disputed:
        rows = rows_of[sample]
        for row in rows:
            others = ", ".join(str(r) for r in rows if r != row)
            rejected.append((row, f"sample_id {sample} has another label in row {others}"))
        del good[sample]
    table = pa.table({
        "sample_id": pa.array(list(good), pa.int64()),
        "label": pa.array([g[1] for g in good.values()], pa.int32()),
        "annotator": pa.array([g[2] for g in good.values()], pa.string()),
        "confidence": pa.array([g[3] for g in good.values()], pa.float32()),
    })  # fmt: skip
    return table, sorted(rejected)


def _rows(path: Path):
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            names = [name.strip() for name in reader.fieldnames or []]
            absent = [name for name in REQUIRED if name not in names]
            if absent:
                raise RankdError(
                    f"{path.name}: column {absent[0]!r} is missing; found {', '.join(names) or 'an empty file'}, "
                    f"expected {', '.join(REQUIRED)} and optionally {', '.join(OPTIONAL)}."
                )
            reader.fieldnames = names
            for cells in reader:
                yield reader.line_num, cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RankdError(f"{path}: cannot be read as a CSV of annotations ({error}).") from None


def _parse(cells: dict, classes: int, known: set[int]) -> tuple[int, int, float]:
    """Raises: ValueError with the reason, as one clause."""
    if None in cells or None in cells.values():
        raise ValueError("has another number of columns than the header")
    sample = _whole(cells["sample_id"], "sample_id")
    if sample not in known:
        raise ValueError(f"sample_id {sample} is not in the corpus")
    label = _whole(cells["label"], "label")
    if not 0 <= label < classes:
        raise ValueError(f"label {label} is not in 0 to {classes - 1}")
    text = (cells.get("confidence") or "").strip()
    try:
        confidence = float(text) if text else 1.0
    except ValueError:
        raise ValueError(f"confidence {text!r} is not a number") from None
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence {text} is not in 0 to 1")
    return sample, label, confidence


def _whole(text: str, name: str) -> int:
    try:
        value = int(text.strip())
    except ValueError:
        raise ValueError(f"{name} {text.strip()!r} is not a whole number") from None
    if abs(value) >= 2**63:
        raise ValueError(f"{name} {value} is too large")
    return value
