"""Tables and tensors as Parquet: Arrow fixed-shape tensors, written in shards and read in batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rankd_pipeline.errors import RankdError


def tensor_array(values: np.ndarray) -> pa.Array:
    """[n, ...] array as an Arrow fixed-shape-tensor column of n rows, none of them too."""
    if not len(values):
        flat = pa.list_(pa.from_numpy_dtype(values.dtype), int(np.prod(values.shape[1:])))
        return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(flat.value_type, values.shape[1:]), pa.array([], flat))
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def column_array(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column as NumPy: [n, ...] for tensors, [n] otherwise; strings become object arrays."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # an empty column, or one too large for one chunk
        if array.num_chunks == 0:
            return np.zeros((0, *getattr(array.type, "shape", ())))
        return np.concatenate([column_array(chunk) for chunk in array.chunks])
    if isinstance(array.type, pa.FixedShapeTensorType):
        return array.to_numpy_ndarray()
    return array.to_numpy(zero_copy_only=False)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write one shard; the same table gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", store_schema=True)


def shards(folder: Path) -> list[Path]:
    """The Parquet files of a folder in name order.

    Raises: RankdError if there are none.
    """
    found = sorted(folder.rglob("*.parquet"))
    if not found:
        raise RankdError(f"{folder}: no .parquet file found; expected at least one shard.")
    return found


def iter_tables(folder: Path, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> Iterator[pa.Table]:
    """One table a shard, so that memory stays flat as the corpus grows."""
    for path in shards(folder):
        try:
            table = pq.read_table(path, columns=list(columns) if columns is not None else None, filters=where)
        except (pa.ArrowInvalid, OSError) as error:
            raise RankdError(f"{path}: not a readable Parquet shard ({str(error).splitlines()[0]}).") from None
        if table.num_rows:
            yield table


def read_columns(folder: Path, columns: Sequence[str], where: pc.Expression | None = None) -> dict[str, np.ndarray]:
    """Columns of all shards as arrays, first axis = row; only the named columns are read."""
    parts = [{name: column_array(table[name]) for name in columns} for table in iter_tables(folder, columns, where)]
    if not parts:
        return {name: np.zeros((0,)) for name in columns}
    return {name: np.concatenate([part[name] for part in parts]) for name in columns}


def rows_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions in `ids` (any order, unique) of each of `wanted`.

    Raises: RankdError if one is not there.
    """
    order = np.argsort(ids, kind="stable")
    at = np.searchsorted(ids, wanted, sorter=order)
    at = np.minimum(at, max(len(ids) - 1, 0))
    if len(wanted) and (not len(ids) or not np.array_equal(ids[order[at]], wanted)):
        missing = wanted[ids[order[at]] != wanted] if len(ids) else wanted
        raise RankdError(f"sample_id {missing[0]}: asked for but not in the table; the artifacts do not belong together.")
    return order[at]
