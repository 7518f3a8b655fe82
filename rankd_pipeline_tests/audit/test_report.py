"""The health card: what it says, what it reads, what it costs; on a corpus that has nothing to do with beams."""

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.audit.checks import Spill, hash_arrays
from rankd_pipeline.audit.report import CARD_FAULTS, AuditConfig, AuditReport, audit
from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema, LabelSpec, SourceInfo, as_column
from rankd_pipeline.errors import RankdError

OURS = SourceInfo(name="lab", owner="us", may_leave=False, kind="laboratory")
SCHEMA = CorpusSchema(
    columns=(
        ColumnSpec(name="sample_id", dtype="int64", role="id"),
        ColumnSpec(name="run", dtype="int64", role="unit"),
        ColumnSpec(name="source", dtype="string", role="key"),
        ColumnSpec(name="cell", dtype="string", role="key"),
        ColumnSpec(name="split", dtype="string", role="key"),
        ColumnSpec(name="h", dtype="float32", axes=("pilot", "part"), shape=(3, 2), unit="1", valid_range=(-20, 20)),
        ColumnSpec(name="snr_db", dtype="float32", unit="dB", valid_range=(-20, 50), role="context"),
        ColumnSpec(name="t", dtype="float64", unit="s", role="context"),
    ),
    unit_column="run", site_column="cell", source_column="source", time_column="t", labelled_column=None, series_columns=(),
)  # fmt: skip


def table(first_unit: int, units: int, rows: int = 5, seed: int = 0, **changes: Any) -> pa.Table:
    """Rows of whole runs of a channel sounder: complex channel at three pilots, no labels, no band."""
    rng = np.random.default_rng([seed, first_unit])
    n = units * rows
    unit = first_unit + np.arange(n) // rows
    columns: dict[str, Any] = {
        "sample_id": first_unit * rows + np.arange(n), "run": unit, "source": ["lab"] * n,
        "cell": [f"c{u % 4}" for u in unit], "split": [("train", "train", "val", "test")[(u // 4) % 4] for u in unit],
        "h": rng.standard_normal((n, 3, 2)), "snr_db": rng.uniform(0, 30, n), "t": np.arange(n) * 0.5,
    } | changes  # fmt: skip
    arrays = [as_column(columns[c.name], c) for c in SCHEMA.columns]
    return pa.Table.from_arrays(arrays, names=[c.name for c in SCHEMA.columns])


def examine(*tables: pa.Table, cfg: AuditConfig | None = None, sources: tuple[SourceInfo, ...] = (OURS,)) -> AuditReport:
    return audit(lambda: iter(tables), None, SCHEMA, sources, cfg)


def faults(report: AuditReport) -> set[str]:
    return {f.fault for f in report.findings}


def test_another_function_than_beams_gets_a_clean_card() -> None:
    report = examine(*(table(64 * i, 64) for i in range(4)))
    assert report.verdict == "pass"
    assert [row.check for row in report.card] == list(CARD_FAULTS)
    assert not report.findings
    assert report.rows == 1280
    assert report.units == 256
    assert report.splits["test"]["rows"] == 320
    assert report.columns[0]["min"] < -2 < 2 < report.columns[0]["max"]


def test_the_report_is_plain_json_and_the_same_every_time() -> None:
    one, two = (examine(table(0, 64), table(64, 64)).to_json() for _ in range(2))
    assert json.dumps(one) == json.dumps(two)
    assert json.loads(json.dumps(one)) == one
    assert set(one) >= {"verdict", "card", "findings", "columns", "coverage", "splits", "sources", "thresholds"}


def test_batches_of_any_size_give_the_same_findings() -> None:
    bad = np.random.default_rng(1).standard_normal((640, 3, 2))
    bad[100:110] = np.nan
    whole = table(0, 128, h=bad)
    reports = [examine(*(whole.slice(i, size) for i in range(0, 640, size))) for size in (640, 64, 7)]
    assert len({json.dumps([f.model_dump() for f in r.findings]) for r in reports}) == 1
    assert faults(reports[0]) == {"not_finite"}


def test_a_finding_says_where_how_much_and_what_next() -> None:
    h = np.random.default_rng(1).standard_normal((320, 3, 2))
    h[33, 1, 0] = 400.0
    report = examine(table(0, 64, h=h))
    (finding,) = [f for f in report.findings if f.fault == "out_of_range"]
    assert finding.severity == "fail"
    assert report.verdict == "fail"
    assert "column h" in finding.where
    assert "cell c2" in finding.where
    assert "sample 33 with 400" in finding.where
    assert finding.value == pytest.approx(1 / 1920)
    assert "-20 to 20" in finding.next_step
    row = next(r for r in report.card if r.check == "units and physical ranges")
    assert row.status == "fail"
    assert "1 values out of range" in row.sentence


def test_a_tolerated_share_only_warns() -> None:
    h = np.random.default_rng(1).standard_normal((320, 3, 2))
    h[33, 1, 0] = 400.0
    report = examine(table(0, 64, h=h), cfg=AuditConfig(bad_value_share=0.01))
    assert report.verdict == "pass"
    assert [f.severity for f in report.findings if f.fault == "out_of_range"] == ["warn"]


def test_a_fault_that_a_source_is_known_for_only_warns_there() -> None:
    strange = table(0, 64), table(64, 64, source=["field"] * 320)
    (told,) = (f for f in examine(*strange).findings if f.fault == "sovereignty")
    assert told.severity == "fail" and "source field" in told.where

    def severity(**accept: tuple[str, ...]) -> list[str]:
        return [f.severity for f in examine(*strange, cfg=AuditConfig(accept=accept)).findings if f.fault == "sovereignty"]

    assert severity(field=("sovereignty",)) == ["warn"]
    assert severity(lab=("sovereignty",)) == severity(field=("clock",)) == ["fail"]


@pytest.mark.parametrize("series", [(), ("source", "cell")])
@pytest.mark.parametrize("rows", [1, 5])
def test_an_even_clock_says_nothing_of_another_sources_rows(series: tuple[str, ...], rows: int) -> None:
    """A little of the field beside much that was simulated: its rows come when they come."""
    schema, field = SCHEMA.model_copy(update={"series_columns": series}), OURS.model_copy(update={"name": "field"})
    whole = [table(64 * i, 64, rows) for i in range(4)]
    n = 16 * rows
    irregular = np.sort(np.random.default_rng(0).uniform(0, 5000, n))
    visit = table(256, 16, rows, source=["field"] * n, cell=["c0"] * n, split=["train"] * n, t=irregular)

    def lost(*tables: pa.Table) -> set[str]:
        return faults(audit(lambda: iter(tables), None, schema, [OURS, field])) & {"rows_missing"}

    assert not lost(*whole, visit)
    gap = table(256, 16, rows, cell=["c0"] * n, split=["train"] * n, t=np.arange(n) * 0.5 + 40.0 * (np.arange(n) % 7 > 4))
    if rows > 1 or series:
        assert lost(*whole, gap, visit)


def test_a_shard_that_cannot_be_read_is_a_finding() -> None:
    def batches() -> Iterator[pa.Table]:
        yield table(0, 64)
        raise RankdError("part-00001.parquet: not a readable Parquet shard.")

    report = audit(batches, None, SCHEMA, [OURS])
    assert report.verdict == "fail"
    (finding,) = [f for f in report.findings if f.fault == "unreadable"]
    assert "part-00001.parquet" in finding.where


@pytest.mark.parametrize("tables", [[], [pa.table({"x": [1]})]])
def test_an_empty_or_foreign_corpus_fails(tables: list[pa.Table]) -> None:
    report = examine(*tables)
    assert report.verdict == "fail"
    assert "empty_corpus" in faults(report)


def test_sources_need_an_owner() -> None:
    data = table(0, 64)
    assert "sovereignty" in faults(examine(data, sources=()))
    assert "sovereignty" in faults(examine(data, sources=(OURS.model_copy(update={"owner": " "}),)))
    row = next(r for r in examine(data).card if r.check == "data sovereignty")
    assert row.status == "ok"
    assert "must stay on the premises: lab" in row.sentence


def test_spilling_to_disk_changes_nothing() -> None:
    tables = [table(64 * i, 64) for i in range(3)]
    tables.append(
        table(
            192,
            4,
            h=np.asarray(tables[0]["h"].combine_chunks().to_numpy_ndarray())[:20],
            snr_db=tables[0]["snr_db"].to_numpy()[:20],
        )
    )
    kept, spilled = (examine(*tables, cfg=AuditConfig(spill_rows=limit)) for limit in (1_000_000, 50))
    assert kept.model_dump(exclude={"thresholds"}) == spilled.model_dump(exclude={"thresholds"})
    assert "duplicated_unit" in faults(kept)


def test_memory_does_not_grow_with_the_corpus() -> None:
    cfg = AuditConfig(spill_rows=2000, sampled_rows=1000)

    def peak(shards: int) -> int:
        tracemalloc.start()
        audit(lambda: (table(200 * i, 200) for i in range(shards)), None, SCHEMA, [OURS], cfg)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(60)  # imports and caches
    # Ten times the corpus; all that grows is a few bytes a unit (of 64 rows), which this little base makes visible.
    assert peak(200) < 1.6 * peak(20)


def test_labels_are_checked_against_the_corpus() -> None:
    schema = SCHEMA.model_copy(update={"label": LabelSpec(classes=4)})
    data = table(0, 64)

    def found(ids: list[int], labels: list[int | None]) -> set[str]:
        return faults(audit(lambda: iter([data]), pa.table({"sample_id": ids, "label": labels}), schema, [OURS]))

    assert "label_out_of_range" not in found([0, 1, 2], [0, 1, 3])
    assert "label_out_of_range" in found([0, 1, 2], [0, 1, 4])
    assert "label_conflict" in found([0, 1, 1], [0, 1, 2])
    assert "label_unknown_id" in found([0, 1, 999_999], [0, 1, 2])
    assert "no_labels" in faults(audit(lambda: iter([data]), None, schema, [OURS]))
    with pytest.raises(RankdError, match="labels: column label is missing"):
        audit(lambda: iter([data]), pa.table({"sample_id": [1]}), schema, [OURS])


def test_a_schema_must_hang_together() -> None:
    column = ColumnSpec(name="a", dtype="int64")
    with pytest.raises(ValueError, match="does not declare: drop_id"):
        CorpusSchema(columns=(column,))
    with pytest.raises(ValueError, match="share a name"):
        CorpusSchema(columns=(column, column))
    with pytest.raises(ValueError, match="axes"):
        ColumnSpec(name="a", dtype="float32", axes=("x",), shape=(2, 3))


@settings(max_examples=60)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.integers(1, 20))
def test_spill_keeps_every_record_and_keeps_keys_together(keys: list[int], limit: int) -> None:
    spill = Spill(np.dtype([("key", "<i8"), ("n", "<i8")]), "key", limit)
    for n, key in enumerate(keys):
        spill.add(np.array([(key, n)], spill.dtype))
    groups = list(spill)
    spill.close()
    assert sorted(int(n) for g in groups for n in g["n"]) == list(range(len(keys)))
    seen = [set(g["key"].tolist()) for g in groups]
    assert sum(len(s) for s in seen) == len(set(keys))


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=2, max_size=30))
def test_rows_hash_alike_exactly_when_equal(rows: list[list[float]]) -> None:
    hashed = hash_arrays([np.array(rows, np.float32)])
    for i in range(len(rows)):
        for j in range(i):
            assert (hashed[i] == hashed[j]) == (np.array(rows[i], np.float32) == np.array(rows[j], np.float32)).all()


def test_rows_that_repeat_are_a_fault_unless_the_configuration_expects_some() -> None:
    """Four of 320 rows are logged twice: more than one in a thousand, but within two in a hundred."""
    changes = {"h": np.random.default_rng(0).standard_normal((320, 3, 2)), "snr_db": np.full(320, 10.0)}
    changes["h"][[1, 11, 21, 31]] = changes["h"][[0, 10, 20, 30]]
    rows = table(0, 64, **changes)
    for allowed, told in ((0.001, True), (0.01, True), (0.02, False)):
        report = examine(rows, cfg=AuditConfig(repeats_fail=allowed, comparisons=()))
        assert ("repeated_rows" in faults(report)) == told
