"""The contract of telemetry files: what is read back, what is left out row by row, what makes a whole file unusable."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankd_pipeline.telemetry.contract import CONTEXT, Unusable, error_column, read_file, table_of
from rankd_pipeline_tests.telemetry.made import columns, schema, write


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made = columns(200)
    read, left_out = read_file(write(tmp_path, "a.parquet", made), schema())
    assert left_out == 0 and read["has_label"].sum() == made["has_label"].sum() > 0
    for name in ("time_s", "session", "l1_rsrp_dbm", "l1_rsrp_mask", "output", "snr_db"):
        np.testing.assert_array_equal(read[name], made[name])
    np.testing.assert_array_equal(read["label"][read["has_label"]], made["label"][made["has_label"]])
    assert list(read["site"]) == list(made["site"])
    for quantity in CONTEXT:  # what a base station does not know is unknown, not zero
        assert (quantity.name in made) or np.isnan(read[quantity.name]).all()
        assert (error_column(quantity.name) in made) or np.isnan(read[error_column(quantity.name)]).all()


def test_other_writers_lists_and_extra_columns_are_welcome(tmp_path: Path) -> None:
    made = columns(50)
    table = table_of(made, schema())
    plain = pa.table(
        {
            "vendor_note": pa.array(["x"] * 50),
            **{name: table[name] for name in table.column_names if name not in ("output", "l1_rsrp_dbm", "l1_rsrp_mask", "label")},
            "output": pa.array(made["output"].astype(np.float64).tolist()),
            "l1_rsrp_dbm": pa.array(made["l1_rsrp_dbm"].reshape(50, -1).tolist(), type=pa.list_(pa.float32(), 16)),
            "l1_rsrp_mask": pa.array(made["l1_rsrp_mask"].tolist()),
            "label": pa.array(
                [int(v) if has else None for v, has in zip(made["label"], made["has_label"], strict=True)], pa.int64()
            ),
        }
    )
    read, _ = read_file(write(tmp_path, "a.parquet", plain), schema())
    np.testing.assert_allclose(read["output"], made["output"], rtol=1e-6)
    np.testing.assert_array_equal(read["l1_rsrp_dbm"], made["l1_rsrp_dbm"])
    np.testing.assert_array_equal(read["has_label"], made["has_label"])


def test_no_labels_and_one_row_are_fine(tmp_path: Path) -> None:
    read, _ = read_file(write(tmp_path, "a.parquet", columns(1, labelled=0.0)), schema())
    assert len(read["time_s"]) == 1 and "label" not in read and not read["has_label"].any()


def spoil(name: str, value: object, rows: int) -> dict[str, np.ndarray]:
    made = columns(1000)
    spoilt = np.array(made[name])
    spoilt[:rows] = value
    return {**made, name: spoilt}


@pytest.mark.parametrize(
    ("name", "value"),
    [("latency_us", np.nan), ("time_s", -5.0), ("l1_rsrp_dbm", 20.0), ("output", np.inf), ("site", ""), ("site", "x" * 300),
     ("band_ghz", 0.0)],
)  # fmt: skip
def test_a_few_bad_rows_are_left_out_and_many_condemn_the_file(tmp_path: Path, name: str, value: object) -> None:
    read, left_out = read_file(write(tmp_path, "few.parquet", spoil(name, value, 10)), schema())
    assert left_out == 10 and len(read["time_s"]) == 990
    with pytest.raises(Unusable, match=f"11 of 1000 rows cannot be used; column '{name}', row 1"):
        read_file(write(tmp_path, "many.parquet", spoil(name, value, 11)), schema())


def test_a_bad_value_under_a_mask_or_without_a_label_is_no_fault(tmp_path: Path) -> None:
    made = columns(100)
    made["l1_rsrp_mask"][:, 0, 3] = 0
    made["l1_rsrp_dbm"][:, 0, 3] = 999.0
    made["confidence"][:5] = np.nan
    assert read_file(write(tmp_path, "a.parquet", made), schema())[1] == 0


@pytest.mark.parametrize("label", [64, -1])
def test_a_label_that_the_function_does_not_have(tmp_path: Path, label: int) -> None:
    made = columns(100, labelled=1.0)
    made["label"][:] = label
    with pytest.raises(Unusable, match="column 'label', row 1"):
        read_file(write(tmp_path, "a.parquet", made), schema())


def put(table: pa.Table, name: str, values: list) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.drop_columns(["output"]), "column 'output' is missing"),
        (lambda t: t.slice(0, 0), "no rows"),
        (
            lambda t: t.set_column(t.column_names.index("time_s"), "time_s", pa.array(["now"] * len(t))),
            "column 'time_s': type string",
        ),
        (lambda t: t.set_column(t.column_names.index("output"), "output", pa.array([[1.0]] * len(t))), "column 'output'"),
        (
            lambda t: t.set_column(t.column_names.index("output"), "output", pa.array([[1.0], [1.0, 2.0]] * (len(t) // 2))),
            "'output'",
        ),
        (lambda t: t.set_column(t.column_names.index("label"), "label", pa.array([0.5] * len(t))), "column 'label': type double"),
    ],
)
def test_what_is_no_telemetry_says_why(tmp_path: Path, change, why: str) -> None:
    path = write(tmp_path, "a.parquet", change(table_of(columns(100), schema())))
    with pytest.raises(Unusable, match=why):
        read_file(path, schema())


@given(st.binary(min_size=1, max_size=400), st.integers(0, 20_000))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_unusable_or_harmless_and_never_a_crash(tmp_path: Path, noise: bytes, at: int) -> None:
    whole = write(tmp_path, "a.parquet", columns(60)).read_bytes()
    damaged = tmp_path / "b.parquet"
    at = at % len(whole)
    damaged.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    try:
        read, _ = read_file(damaged, schema())
    except Unusable as reason:
        assert str(reason)
    else:
        assert np.isfinite(read["output"]).all() and len(read["time_s"]) <= 60


def test_the_table_is_parquet_that_anyone_reads(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", columns(20))
    frame = pq.read_table(path, columns=["time_s", "site", "latency_us", "label"]).to_pandas()
    assert len(frame) == 20 and frame["label"].isna().any()
