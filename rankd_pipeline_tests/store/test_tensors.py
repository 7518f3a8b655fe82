"""Tables and tensors: what goes in comes out, row for row, and a broken shard is one sentence."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rankd_pipeline.errors import RankdError
from rankd_pipeline.store.tensors import column_array, iter_tables, read_columns, rows_of, shards, tensor_array, write_parquet


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int16, np.uint8]),
        hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=5),
    )
)
def test_a_tensor_column_round_trips_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("t") / "x.parquet"
    write_parquet(pa.table({"x": tensor_array(values)}), path)
    read = read_columns(path.parent, ["x"])["x"]
    assert read.dtype == values.dtype and read.tobytes() == values.tobytes() and read.shape == values.shape


def table(rows: range) -> pa.Table:
    return pa.table({
        "sample_id": pa.array(rows, pa.int64()),
        "split": ["train" if row % 2 else "test" for row in rows],
        "rsrp_dbm": tensor_array(np.arange(len(rows) * 6, dtype=np.float32).reshape(-1, 2, 3)),
        "labelled": [row % 3 == 0 for row in rows],
    })  # fmt: skip


def test_shards_are_read_in_name_order_and_filtered(tmp_path: Path) -> None:
    write_parquet(table(range(4, 8)), tmp_path / "part-00001.parquet")
    write_parquet(table(range(4)), tmp_path / "part-00000.parquet")
    assert [path.name for path in shards(tmp_path)] == ["part-00000.parquet", "part-00001.parquet"]
    columns = read_columns(tmp_path, ["sample_id", "labelled", "split"], pc.field("split") == "train")
    assert columns["sample_id"].tolist() == [1, 3, 5, 7] and columns["labelled"].tolist() == [False, True, False, False]
    assert set(columns["split"]) == {"train"}
    assert [part.num_rows for part in iter_tables(tmp_path, ["rsrp_dbm"])] == [4, 4]
    assert len(read_columns(tmp_path, ["sample_id"], pc.field("split") == "none")["sample_id"]) == 0


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_parquet(table(range(50)), tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_tensors_survive_chunks_and_slices() -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    whole = pa.chunked_array([tensor_array(values[:1]), tensor_array(values[1:])])
    assert np.array_equal(column_array(whole), values)
    assert np.array_equal(column_array(whole.slice(1, 2)), values[1:3])


def test_an_empty_folder_and_a_cut_shard_are_one_sentence_each(tmp_path: Path) -> None:
    with pytest.raises(RankdError, match=r"no \.parquet file found"):
        shards(tmp_path)
    path = tmp_path / "part-00000.parquet"
    write_parquet(table(range(8)), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RankdError, match=r"part-00000\.parquet: not a readable Parquet shard"):
        list(iter_tables(tmp_path))


@given(st.lists(st.integers(-1000, 1000), unique=True, min_size=1, max_size=50), st.data())
def test_rows_of_finds_every_row_in_any_order(ids: list[int], data: st.DataObject) -> None:
    table_ids = np.array(ids)
    wanted = np.array(data.draw(st.lists(st.sampled_from(ids), max_size=30)), dtype=table_ids.dtype)
    assert np.array_equal(table_ids[rows_of(table_ids, wanted)], wanted)


@given(st.lists(st.integers(0, 20), unique=True, max_size=10), st.integers(21, 30))
def test_rows_of_names_a_sample_that_is_not_there(ids: list[int], missing: int) -> None:
    with pytest.raises(RankdError, match=f"sample_id {missing}: asked for but not in the table"):
        rows_of(np.array(ids, dtype=np.int64), np.array([missing]))
