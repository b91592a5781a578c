"""Row groups are dealt out evenly, in order, and never cut."""

from __future__ import annotations

import base64
import itertools
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from horovodrunner.errors import DataError
from horovodrunner.inference import files
from horovodrunner.inference.files import RowGroup, balanced


def groups_of(**sizes: list[int]) -> list[RowGroup]:
    return [
        RowGroup(path, number, size // 10, size, 1, 2)
        for path, of_file in sizes.items()
        for number, size in enumerate(of_file)
    ]


def loads(partitions: list[list[RowGroup]]) -> list[int]:
    return [sum(group.bytes for group in groups) for groups in partitions]


def test_all_row_groups_are_dealt_out_once_and_in_order() -> None:
    groups = groups_of(a=[50, 60, 70], b=[10], c=[], d=[90, 5, 5, 5, 5])
    for parallelism in (1, 2, 3, 8, 100):
        partitions = balanced(groups, parallelism)
        assert list(itertools.chain(*partitions)) == groups
        assert all(partitions)
        assert len(partitions) <= parallelism


def test_partitions_are_of_about_one_size() -> None:
    partitions = balanced(groups_of(a=[100] * 40, b=[100] * 20, c=[300] * 12), 4)
    assert loads(partitions) == [2400] * 4
    assert [sorted({group.path for group in groups}) for groups in partitions] == [
        ["a"],
        ["a", "b"],
        ["b", "c"],
        ["c"],
    ]
    assert loads(balanced(groups_of(a=[100, 100, 100]), 2)) in ([200, 100], [100, 200])


def test_few_row_groups_are_a_partition_each() -> None:
    assert loads(balanced(groups_of(a=[100, 100, 100]), 64)) == [100] * 3


def test_no_partition_is_larger_than_sparks() -> None:
    size = files.PARTITION_BYTES // 4
    partitions = balanced(groups_of(a=[size] * 41), 2)
    assert len(partitions) == 12  # 10.25 of Spark's size, in rounds of two
    assert max(loads(partitions)) <= files.PARTITION_BYTES


def test_nothing_and_columns_without_size() -> None:
    assert balanced([], 4) == []
    assert loads(balanced(groups_of(a=[0, 0]), 2)) == [0, 0]


def row_of(path: Path, schema: pa.Schema, batch_rows: int = 4) -> pa.RecordBatch:
    status = path.stat()
    groups = list(range(pq.read_metadata(path).num_row_groups))
    parts = [[str(path), groups, status.st_size, status.st_mtime_ns, batch_rows]]
    encoded = base64.b64encode(schema.serialize()).decode()
    return pa.RecordBatch.from_pylist([{"schema": encoded, "parts": json.dumps(parts)}])


def test_batches_have_sparks_types_and_a_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    vectors = pa.array([[1, 2], [None, 0], [3, 4]] * 4, pa.list_(pa.float32(), 2))
    names = pa.array(["a", None, "b"] * 4, pa.large_string())
    full = pa.array([[1], [], [2, 3]] * 4, pa.list_(pa.field("item", pa.float32(), nullable=False)))
    table = pa.table(
        {"names": names, "x": vectors, "kinds": names.dictionary_encode(), "full": full}
    )
    pq.write_table(table, path, row_group_size=6)
    text, vector = pa.string(), pa.list_(pa.field("element", pa.float32()))
    schema = pa.schema({"x": vector, "kinds": text, "full": vector, "names": text})
    found = list(files.read_parts(iter([row_of(path, schema)])))
    for batch in found:
        batch.validate(full=True)
        assert str(batch.schema) == str(schema)
        assert all(
            map(str.__eq__, map(str, (c.type for c in batch.columns)), map(str, schema.types))
        )
    assert max(batch.num_rows for batch in found) == 4
    assert pa.Table.from_batches(found).to_pydict() == table.select(schema.names).to_pydict()


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1.0]}), path)
    schema = pa.schema({"x": pa.float64()})
    row = row_of(path, schema)
    pq.write_table(pa.table({"x": [2.0]}), path)  # the same size
    with pytest.raises(DataError, match=r"has changed since.*read_files=False"):
        list(files.read_parts([row]))
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read on this executor's.*read_files=False"):
        list(files.read_parts([row]))


def test_a_file_that_pyarrow_cannot_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1.0] * 1000}), path, use_dictionary=False)
    row = row_of(path, pa.schema({"x": pa.float64()}))
    status, content = path.stat(), bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=r"pyarrow cannot read .*read_files=False"):
        list(files.read_parts([row]))
