"""The import of a user's own table: units, faults of single rows, drops, splits, and the sentence for each mistake."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.audit.report import audit
from rankd_pipeline.audit.schema import ColumnSpec, CorpusSchema, LabelSpec
from rankd_pipeline.errors import RankdError
from rankd_pipeline.ingest.tables import Ingest, ingest, load_source
from rankd_pipeline.ingest.units import CONVERSIONS, converter
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.store.tensors import column_array

DATA = Path(__file__).parents[2] / "data"


def schema(history: int = 1) -> CorpusSchema:
    """Two beams instead of sixteen, four classes: small enough to write by hand."""
    shape = (history, 2)
    return CorpusSchema(
        columns=(
            ColumnSpec(name="sample_id", dtype="int64", role="id"),
            ColumnSpec(name="drop_id", dtype="int64", role="unit"),
            ColumnSpec(name="source", dtype="string", role="key"),
            ColumnSpec(name="site", dtype="string", role="key"),
            ColumnSpec(name="band_ghz", dtype="float32", unit="GHz", valid_range=(0.4, 100), role="key"),
            ColumnSpec(name="split", dtype="string", role="key"),
            ColumnSpec(name="labelled", dtype="bool", role="context"),
            ColumnSpec(name="speed_kmh", dtype="float32", unit="km/h", valid_range=(0, 500), role="context"),
            ColumnSpec(name="time_s", dtype="float64", unit="s", role="context"),
            ColumnSpec(name="rsrp_dbm", dtype="float32", axes=("instant", "beam"), shape=shape, unit="dBm",
                       valid_range=(-140, -44), mask="rsrp_mask"),
            ColumnSpec(name="rsrp_mask", dtype="uint8", axes=("instant", "beam"), shape=shape, role="mask"),
        ),
        site_column="site", band_column="band_ghz", source_column="source", label=LabelSpec(classes=4),
    )  # fmt: skip


def source(**changes: Any) -> dict[str, Any]:
    return {
        "path": "log.csv", "name": "van", "owner": "us", "may_leave": False,
        "columns": {
            "site": {"from": "cell"}, "band_ghz": {"from": "mhz", "unit": "MHz"}, "speed_kmh": {"from": "mps", "unit": "m/s"},
            "time_s": {"from": "ms", "unit": "ms"}, "rsrp_dbm": {"from": "b{i}", "first": 1, "unit": "dBm", "sentinels": [-999]},
        },
        "label": {"from": "best", "index_base": 1}, "label_into": ["sweep_beam"], "drop": {"column": "run"},
    } | changes  # fmt: skip


def lines(rows: int = 40) -> list[str]:
    """Ten runs of four rows at one site, all labelled."""
    head = "cell,mhz,mps,ms,run,b1,b2,best"
    return [head, *(f"A,3500,{r % 7},{100 * r},R{r // 4},-{80 + r % 9},-{90 + r % 5},{1 + r % 4}" for r in range(rows))]


def run(folder: Path, text: list[str], history: int = 1, seed: int = 0, **changes: Any) -> tuple[Ingest, pa.Table, pa.Table]:
    (folder / "log.csv").write_text("\n".join(text) + "\n")
    imported = ingest(load_source(source(**changes)), schema(history), folder, seed)
    features, truth = (pa.concat_tables(t) for t in zip(*imported, strict=True))
    return imported, features, truth


def with_columns(**columns: Any) -> dict[str, Any]:
    return source()["columns"] | columns


def test_units_and_labels_become_ours(tmp_path: Path) -> None:
    imported, features, truth = run(tmp_path, lines())
    assert features.schema.equals(schema().arrow_schema())
    assert features.num_rows == 40
    assert not imported.rejected
    assert column_array(features["band_ghz"])[0] == np.float32(3.5)
    assert column_array(features["speed_kmh"])[3] == pytest.approx(10.8)
    assert column_array(features["time_s"])[7] == pytest.approx(0.7)
    assert column_array(features["rsrp_dbm"])[0, 0].tolist() == [-80, -90]
    assert column_array(truth["sweep_beam"])[:5].tolist() == [0, 1, 2, 3, 0]
    assert set(features["source"].to_pylist()) == {"van"}


def test_whole_drops_are_split_in_the_shares_asked_for(tmp_path: Path) -> None:
    _, features, _ = run(tmp_path, lines(400), split_shares=(0.6, 0.2, 0.2))
    frame = features.select(["drop_id", "split"]).to_pandas()
    assert (frame.groupby("drop_id")["split"].nunique() == 1).all()
    assert frame["split"].value_counts().to_dict() == {"train": 240, "val": 80, "test": 80}


def test_same_seed_same_bytes_other_seed_other_split(tmp_path: Path) -> None:
    one, two, other = (run(tmp_path, lines(80), seed=s)[1] for s in (3, 3, 4))
    assert one.equals(two)
    assert not one.equals(other)


def test_shards_are_small_and_agree_with_one_piece(tmp_path: Path) -> None:
    imported, pieces, _ = run(tmp_path, lines(), rows_per_shard=7)
    whole = run(tmp_path, lines())[1]
    assert pieces.combine_chunks().equals(whole.combine_chunks())
    assert max(f.num_rows for f, _ in imported) == 7


def test_faults_of_single_rows_are_masked_or_listed(tmp_path: Path) -> None:
    text = lines()
    text[2] = "A,3500,1,100,R0,-999,-91,2"  # row 3 of the file: a sentinel
    text[3] = "A,3500,1,200,R0,-50,,3"  # a gap
    text[5] = "A,3500,1,400,R1,-20,-91,1"  # out of range
    text[6] = "A,3500,1,500,R1,ERR,-91,1"
    text[9] = ",3500,1,800,R2,-80,-91,1"
    text[13] = "A,3500,1,1200,R3,-80,-91,9"
    text[17] = "A,3500,1600,R4"
    imported, features, _ = run(tmp_path, text)
    assert imported.rejected == [
        {"row": 7, "reason": "b1: 'ERR' is not a number"},
        {"row": 10, "reason": "site is empty"},
        {"row": 14, "reason": "best 9 is not a whole number from 1 to 4"},
        {"row": 18, "reason": "4 cells, expected 8 as in the header"},
    ]
    assert imported.masked == [
        {"column": "b1", "reason": "a sentinel", "values": 1, "first_row": 3},
        {"column": "b1", "reason": "out of range", "values": 1, "first_row": 6},
        {"column": "b2", "reason": "empty", "values": 1, "first_row": 4},
    ]
    assert features.num_rows == 36
    mask, values = column_array(features["rsrp_mask"])[:, 0], column_array(features["rsrp_dbm"])[:, 0]
    assert mask[1].tolist() == [0, 1]
    assert mask[2].tolist() == [1, 0]
    assert mask[4].tolist() == [0, 1]
    assert (values[mask == 0] == 0).all()


def test_mixed_units_in_one_column(tmp_path: Path) -> None:
    text = lines()
    text[4] = "A,3500,1,300,R0,1.0e-9,1e-10,2"  # mW: -90 and -100 dBm
    columns = with_columns(rsrp_dbm={"from": "b{i}", "first": 1, "unit": "dBm", "also": ["mW"]})
    _, features, _ = run(tmp_path, text, columns=columns)
    assert column_array(features["rsrp_dbm"])[3, 0] == pytest.approx([-90, -100])


def test_held_out_sites_and_bands(tmp_path: Path) -> None:
    text = lines(80)
    text += [line.replace("A,3500", "B,3500").replace(",R", ",S") for line in lines(12)[1:]]
    text += [line.replace("A,3500", "A,10000").replace(",R", ",T") for line in lines(12)[1:]]
    text[-1] = text[-1].rsplit(",", 1)[0] + ","  # one row of the last held-out drop has no label
    imported, features, _ = run(tmp_path, text, heldout_sites=["B"], heldout_bands=[10])
    table = features.select(["site", "band_ghz", "split"]).to_pandas()
    assert set(table.loc[table["site"] == "B", "split"]) == {"heldout_site"}
    assert set(table.loc[table["band_ghz"] == 10, "split"]) == {"heldout_band"}
    assert (table["split"] == "heldout_band").sum() == 8
    assert [r["row"] for r in imported.rejected] == [102, 103, 104, 105]
    assert "held-out" in imported.rejected[0]["reason"]


def test_unlabelled_drops_are_only_trained_on(tmp_path: Path) -> None:
    text = lines(80)
    for r in range(41, 81):
        text[r] = text[r].rsplit(",", 1)[0] + ","
    _, features, _ = run(tmp_path, text)
    unlabelled = features.filter(pc.invert(features["labelled"]))
    assert unlabelled.num_rows == 40
    assert set(unlabelled["split"].to_pylist()) == {"train"}


def test_drops_from_a_user_and_the_time_between_rows(tmp_path: Path) -> None:
    pause_ms = 60_000  # after every twelve rows
    text = ["cell,mhz,mps,ms,ue,b1,b2,best"]
    text += [f"A,3500,1,{100 * r + pause_ms * (r // 12)},U{r % 2},-80,-90,1" for r in range(60)]
    _, features, _ = run(tmp_path, text, drop={"by": ["ue"], "gap_s": 5})
    frame = features.select(["drop_id"]).to_pandas()
    assert frame["drop_id"].nunique() == 10  # two users, five stretches
    assert (frame.groupby("drop_id").size() == 6).all()


def test_history_comes_from_the_rows_before_in_the_same_drop(tmp_path: Path) -> None:
    one = run(tmp_path, lines(), history=3)[1]
    values, mask = column_array(one["rsrp_dbm"]), column_array(one["rsrp_mask"])
    assert values.shape == (40, 3, 2)
    assert mask[0, :, 0].tolist() == [0, 0, 1]
    assert values[2, :, 0].tolist() == [-80, -81, -82]
    assert mask[4, :, 0].tolist() == [0, 0, 1]
    assert one.equals(run(tmp_path, lines(), history=3, rows_per_shard=3)[1].combine_chunks())


def test_history_from_columns_of_their_own(tmp_path: Path) -> None:
    text = ["cell,mhz,mps,ms,run,b1_t0,b2_t0,b1_t1,b2_t1,best"]
    text += [f"A,3500,1,{r},R{r // 4},-81,-82,-83,-84,1" for r in range(40)]
    columns = with_columns(rsrp_dbm={"from": "b{i}_t{t}", "first": 1})
    values = column_array(run(tmp_path, text, history=2, columns=columns)[1]["rsrp_dbm"])
    assert values[0].tolist() == [[-81, -82], [-83, -84]]


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    import pandas as pd

    csv_features = run(tmp_path, lines())[1]
    frame = pd.read_csv(tmp_path / "log.csv")
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "log.parquet")
    imported = ingest(load_source(source(path="log.parquet")), schema(), tmp_path, 0)
    assert pa.concat_tables([f for f, _ in imported]).combine_chunks().equals(csv_features.combine_chunks())
    damaged = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(RankdError, match=r"log\.parquet: cannot be read as parquet"):
        ingest(load_source(source(path="log.parquet")), schema(), tmp_path, 0)


@pytest.mark.parametrize(("changes", "edit", "sentence"), [
    ({}, lambda t: [t[0].replace("b2", "x"), *t[1:]], r"log\.csv: column 'b2' is missing \(source\.columns\.rsrp_dbm asks"),
    ({}, lambda t: [t[0].replace("b2", "b1"), *t[1:]], r"column 'b1' is there twice"),
    ({}, lambda t: [*t[:5], t[5].replace("-84", "nan"), *t[6:]], r"log\.csv, row 6, column 'b1': found nan"),
    ({}, lambda t: [t[0], *(line.replace("-8", "-80").replace("-9", "-90") for line in t[1:])],
     r"column 'b1': 40 of 40 values are outside -140 to -44 dBm .* in row 2\); they would fit as dBm\*10; set source\.columns"),
    ({"path": "../secret.csv"}, None, r"leads out of"),
    ({"path": "none.csv"}, None, r"no such file"),
    ({"path": "log.xlsx"}, None, r"neither \.csv nor \.parquet"),
    ({"heldout_sites": ["Z"]}, None, r"heldout_sites names 'Z', which no row has; found A"),
    ({"heldout_bands": [26]}, None, r"heldout_bands names 26, which no row has; found 3\.5"),
    ({"split_shares": (0.5, 0.2, 0.2)}, None, r"split_shares"),
    ({"colums": {}}, None, r"unknown key 'colums'"),
    ({"columns": {"site": {"from": "cell"}}}, None, r"'band_ghz' is missing; expected a map for each of"),
    ({"columns": with_columns(los={"from": "cell"})}, None, r"'los' is no column of the corpus"),
    ({"columns": with_columns(rsrp_dbm={"from": "b1"})}, None, r"expected a pattern"),
    ({"columns": with_columns(speed_kmh={"from": "mps", "unit": "knots"})}, None, r"unit 'knots' cannot be turned into 'km/h'"),
    ({"columns": with_columns(site={"from": "cell", "value": "A"})}, None, r"either from"),
    ({}, lambda t: [t[0], *(line.rsplit(",", 1)[0] + "," for line in t[1:])], r"no drop is left for split 'val'"),
    ({}, lambda t: [t[0], *(line.replace("A,", ",") for line in t[1:31]), *t[31:]], r"30 of 40 rows would be set aside"),
    ({}, lambda t: [], r"column 'cell' and 7 more is missing"),
])  # fmt: skip
def test_each_mistake_gets_one_sentence(tmp_path: Path, changes: dict[str, Any], edit: Any, sentence: str) -> None:
    (tmp_path / "log.xlsx").write_bytes(b"")
    with pytest.raises(RankdError, match=sentence) as caught:
        run(tmp_path, edit(lines()) if edit else lines(), **changes)
    assert "\n" not in str(caught.value)


@settings(max_examples=50)
@given(st.floats(-130, -50), st.sampled_from(sorted(CONVERSIONS["dBm"])))
def test_every_power_unit_is_inverted(dbm: float, unit: str) -> None:
    milliwatts = 10 ** (dbm / 10)
    written = {
        "dBm": dbm, "dBm*10": dbm * 10, "dBm*100": dbm * 100, "dBW": dbm - 30, "W": milliwatts / 1e3, "mW": milliwatts,
        "uW": milliwatts * 1e3, "nW": milliwatts * 1e6, "pW": milliwatts * 1e9,
    }[unit]  # fmt: skip
    assert converter("dBm", unit, "test")(np.array([written]))[0] == pytest.approx(dbm, abs=1e-6)


@settings(max_examples=40)
@given(st.lists(st.text('0123456789.-eE ,"ABn', max_size=8), min_size=1, max_size=5), st.integers(1, 40))
def test_no_cell_makes_it_crash(tmp_path_factory: pytest.TempPathFactory, cells: list[str], row: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    text = lines()
    parts = text[row].split(",")
    for i, cell in enumerate(cells):
        parts[i + 3] = cell
    text[row] = ",".join(parts)
    try:
        imported, features, _ = run(folder, text)
    except RankdError:
        return
    # A quote may swallow the rows after it; every line that is left is imported or listed.
    assert features.num_rows + len(imported.rejected) <= 40
    assert np.isfinite(column_array(features["rsrp_dbm"])).all()
    if '"' not in "".join(cells):
        assert features.num_rows + len(imported.rejected) == 40


def test_the_committed_drive_test(tmp_path: Path) -> None:
    """The sample has the faults it should have, none is lost, and what comes out passes the audit with warnings."""
    function = load_function("beam_management")
    wanted = function.schema(function.corpus_config({}))
    cfg = load_source(yaml.safe_load((DATA / "samples" / "beam_drive_test.yaml").read_text()))
    imported = ingest(cfg, wanted, DATA, seed=7)
    shards = list(imported)
    features = pa.concat_tables([f for f, _ in shards])
    truth = pa.concat_tables([t for _, t in shards])
    lines_in_file = sum(1 for _ in (DATA / cfg.path).open()) - 1
    assert features.num_rows + len(imported.rejected) == lines_in_file
    assert len(imported.rejected) == 5
    assert {m["reason"] for m in imported.masked} == {"empty", "a sentinel"}
    counts = features.group_by("split").aggregate([("sample_id", "count")]).to_pandas().set_index("split")["sample_id_count"]
    assert counts[["val", "test"]].min() > 200
    assert counts[["heldout_site", "heldout_band"]].min() > 300
    rsrp, mask = column_array(features["l1_rsrp_dbm"]), column_array(features["l1_rsrp_mask"])
    assert rsrp[mask == 1].min() >= -140  # milliwatts among dBm were turned into dBm
    labelled = features.filter(pc.field("labelled"))["sample_id"].combine_chunks()
    labels = function.delivered_labels(truth.filter(pc.field("sample_id").isin(labelled)))
    report = audit(lambda: [f for f, _ in shards], labels, wanted, [cfg.info])
    assert report.verdict == "pass"
    assert {f.fault for f in report.findings} <= {"rows_missing", "short_units", "label_noise"}
    assert "rows_missing" in {f.fault for f in report.findings}
