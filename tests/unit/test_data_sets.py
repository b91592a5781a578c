"""Data sets without Spark: stored types, batches, going on, deletion."""

from __future__ import annotations

import datetime
import decimal
import pickle
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from horovodrunner import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigurationError,
    DataError,
    data,
)
from horovodrunner.data import batches as batches_module
from horovodrunner.data import writing
from horovodrunner.data.dataset import DataSet
from horovodrunner.data.stored import Block, BlockReader
from tests import processes

ROWS = 1003


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a thousand rows be many blocks."""
    monkeypatch.setattr(writing, "BLOCK_BYTES", 4096)


@pytest.fixture(scope="module")
def table() -> pa.Table:
    rng = np.random.default_rng(0)
    features = rng.random((ROWS, 3), np.float32)
    features[:, 0] = np.arange(ROWS)
    return pa.table(
        {
            "row": np.arange(ROWS),
            "features": pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), 3),
            "text": [f"row {number}" for number in range(ROWS)],
            "tokens": [list(range(number % 5)) for number in range(ROWS)],
        }
    )


@pytest.fixture
def rows(table: pa.Table, tmp_path: Path) -> Iterator[DataSet]:
    with data.from_arrow(table, tmp_path / "cache") as found:
        assert len(found._reader(None).block_rows) > 10
        yield found
    assert list((tmp_path / "cache").iterdir()) == []


def numbers(batches: Any) -> list[int]:
    """Return the rows of all batches, having checked that every column is of the same row."""
    found: list[int] = []
    for batch in batches:
        row = np.asarray(batch["row"])
        assert np.array_equal(np.asarray(batch["features"])[:, 0], row)
        assert list(batch["text"]) == [f"row {number}" for number in row]
        assert np.array_equal(np.asarray(batch["tokens"].lengths), row % 5)
        found += row.tolist()
    return found


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 100, 334])
def test_every_row_comes_once_over_all_ranks(rows: DataSet, shuffle: bool, batch_size: int) -> None:
    found: list[int] = []
    for rank in range(3):
        found += numbers(
            rows.numpy(batch_size, shuffle=shuffle, rank=rank, size=3, remainder="uneven")
        )
    assert sorted(found) == list(range(ROWS))


def test_without_shuffling_rows_come_in_their_order(rows: DataSet) -> None:
    assert numbers(rows.numpy(64)) == list(range(960))
    assert numbers(rows.numpy(64, remainder="uneven")) == list(range(ROWS))
    assert numbers(rows.numpy(64, remainder="pad")) == [*range(ROWS), *range(21)]


def test_a_small_data_set_is_padded_more_than_once() -> None:
    with data.from_arrow(pa.table({"x": range(5)})) as few:
        (batch,) = few.numpy(12, remainder="pad")
        assert batch["x"].tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]
        (batch,) = few.numpy(12, remainder="pad", shuffle=True)
        assert sorted(batch["x"][:5].tolist()) == list(range(5))
        assert batch["x"][:5].tolist() == batch["x"][5:10].tolist()


def test_a_global_batch_is_the_same_for_any_number_of_ranks_and_loader_processes(
    rows: DataSet,
) -> None:
    def global_batches(size: int, num_workers: int = 0) -> list[list[int]]:
        ranks = [
            rows.torch(
                60 // size, shuffle=True, seed=5, rank=rank, size=size, num_workers=num_workers
            )
            for rank in range(size)
        ]
        return [
            [row for batch in step for row in batch["row"].tolist()]
            for step in zip(*ranks, strict=True)
        ]

    alone = global_batches(1)
    assert len(alone) == ROWS // 60
    assert global_batches(2) == alone
    assert global_batches(4) == alone
    assert global_batches(1, num_workers=2) == alone


def test_each_iteration_is_the_next_epoch_with_an_order_of_its_own(rows: DataSet) -> None:
    batches = rows.numpy(50, shuffle=True, seed=1)
    first, second = numbers(batches), numbers(batches)
    assert first != second
    assert numbers(rows.numpy(50, shuffle=True, seed=1, epoch=1)) == second
    assert numbers(rows.numpy(50, shuffle=True, seed=2)) != first
    assert batches.epoch == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_integers_go_on_in_the_middle_of_an_epoch(rows: DataSet, num_workers: int) -> None:
    """With another number of ranks: what was seen is not seen again, and nothing is missed."""
    seen: list[int] = []
    options: dict[str, Any] = {"shuffle": True, "seed": 3, "remainder": "uneven"}
    for rank in range(2):
        batches = rows.torch(30, epoch=4, rank=rank, size=2, num_workers=num_workers, **options)
        assert batches.state_dict() == {"epoch": 4, "position": 0}
        for count, batch in enumerate(batches, 1):
            seen += batch["row"].tolist()
            if count == 5:
                break
        state = batches.state_dict()
    assert state == {"epoch": 4, "position": 300}
    for rank in range(3):
        batches = rows.torch(17, rank=rank, size=3, num_workers=num_workers, **options)
        batches.load_state_dict(state)
        assert batches.state_dict() == state
        seen += [row for batch in batches for row in batch["row"].tolist()]
        assert batches.state_dict() == {"epoch": 5, "position": 0}
        assert len(numbers(batches)) > 300  # the next epoch is a whole one
    assert sorted(seen) == list(range(ROWS))


@pytest.mark.parametrize("state", [{}, {"epoch": 0}, {"epoch": 0, "position": ROWS + 1}, None])
def test_a_state_of_something_else_is_refused(rows: DataSet, state: Any) -> None:
    with pytest.raises(ArgumentValueError, match="epoch"):
        rows.numpy(10).load_state_dict(state)


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_is_done_to_a_batch_stays_with_that_batch(rows: DataSet, shuffle: bool) -> None:
    batches = rows.torch(50, shuffle=shuffle)
    for batch in batches:
        batch["features"].mul_(-1)
        batch["row"] += 10_000
    batches.epoch = 0
    assert sorted(numbers(batches)) == sorted(numbers(rows.numpy(50, shuffle=shuffle)))


def test_rows_that_come_twice_are_not_the_changed_ones() -> None:
    with data.from_arrow(pa.table({"x": range(5)})) as few:
        found: list[int] = []
        for batch in few.numpy(3, remainder="pad"):
            found += batch["x"].tolist()
            batch["x"] += 100
    assert found == [0, 1, 2, 3, 4, 0]


def test_a_loop_that_is_left_leaves_no_thread(rows: DataSet) -> None:
    for batch in rows.numpy(10, shuffle=True, threads=2, batch_transform=dict):
        assert len(batch["row"]) == 10
        break
    del batch
    assert [t.name for t in threading.enumerate() if "horovodrunner" in t.name] == []


@pytest.mark.parametrize("threads", [0, 3])
def test_a_transform_sees_numpy_batches_and_keeps_their_order(rows: DataSet, threads: int) -> None:
    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": batch["tokens"].padded(4), "y": batch["row"] % 2}

    batches = list(rows.torch(100, batch_transform=transform, threads=threads, shuffle=True))
    assert batches[0]["tokens"].shape == (100, 4)
    plain = [batch["row"] % 2 for batch in rows.numpy(100, shuffle=True)]
    assert all(np.array_equal(a["y"], b) for a, b in zip(batches, plain, strict=True))


def test_an_error_in_a_transform_is_raised_where_batches_are_taken(rows: DataSet) -> None:
    def transform(batch: dict[str, Any]) -> None:
        raise ZeroDivisionError(f"at row {batch['row'][0]}")

    with pytest.raises(ZeroDivisionError, match="at row 0"):
        list(rows.numpy(10, batch_transform=transform, threads=2))


def test_a_block_is_opened_once_whatever_threads_need_it(
    rows: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    open_block = BlockReader.open

    def slowly(reader: BlockReader, index: int) -> Block:
        opened.append(index)
        time.sleep(0.002)  # as long as it takes to fetch it from a URL
        return open_block(reader, index)

    monkeypatch.setattr(batches_module, "PIECE_BYTES", 1)
    monkeypatch.setattr(BlockReader, "open", slowly)
    assert len(numbers(rows.numpy(334, shuffle=True))) == 3 * 334
    assert len(opened) == len(set(opened))


def test_some_columns_only(rows: DataSet) -> None:
    (batch, *_) = rows.numpy(10, columns=["features", "row"])
    assert sorted(batch) == ["features", "row"]
    with pytest.raises(ArgumentValueError, match=r"no column 'x'; there are row, features"):
        rows.numpy(10, columns=["x"])
    with pytest.raises(ArgumentTypeError, match="give a list"):
        rows.numpy(10, columns="row")


def test_collate_and_the_loaders_options(rows: DataSet) -> None:
    def collate(batch: dict[str, Any]) -> tuple[Any, Any]:
        return batch["features"], batch["row"]

    batches = rows.torch(100, collate_fn=collate, num_workers=1, prefetch_factor=3)
    features, row = next(iter(batches))
    assert features.shape == (100, 3)
    assert row.shape == (100,)
    for options in ({"pin_memory": True}, {"num_workers": 1, "persistent_workers": True}):
        batches = rows.torch(100, shuffle=True, **options)
        for epoch in range(2):
            assert numbers(batches) == numbers(rows.numpy(100, shuffle=True, epoch=epoch))


def test_a_data_loader_of_ones_own(rows: DataSet) -> None:
    from torch.utils.data import DataLoader

    loader = DataLoader(rows.torch(100), batch_size=None, num_workers=2)
    assert numbers(loader) == list(range(1000))
    assert len(loader) == 10


@pytest.mark.heavy
def test_tensorflow_gets_every_epoch_in_its_order(rows: DataSet) -> None:
    dataset = rows.tf(100, shuffle=True, seed=1, columns=["row", "features"])
    assert int(dataset.cardinality()) == 10
    assert dataset.element_spec["features"].shape == (100, 3)
    for epoch in range(2):
        expected = [b["row"].tolist() for b in rows.numpy(100, shuffle=True, seed=1, epoch=epoch)]
        assert [batch["row"].numpy().tolist() for batch in dataset] == expected
    ragged = list(rows.tf(100, remainder="uneven"))
    assert ragged[-1]["tokens"].shape[0] == 3
    assert ragged[0]["text"][7].numpy() == b"row 7"
    assert ragged[0]["tokens"][9].numpy().tolist() == [0, 1, 2, 3]
    halves = rows.tf(100, batch_transform=lambda batch: (batch["features"] / 2, batch["row"]))
    first, row = next(iter(halves))
    assert first.shape == (100, 3)
    assert first[8, 0] == row[8].numpy() / 2
    went_on = rows.tf(100, columns=["row"], state={"epoch": 0, "position": 900})
    assert next(iter(went_on))["row"][0].numpy() == 900


def test_arrow_tables_have_the_schema(rows: DataSet) -> None:
    tables = list(rows.arrow(100, shuffle=True, remainder="uneven"))
    assert all(table.schema == rows.schema for table in tables)
    found = pa.concat_tables(tables).sort_by("row")
    assert found["text"].to_pylist() == [f"row {number}" for number in range(ROWS)]
    assert found["tokens"][8].as_py() == [0, 1, 2]


@pytest.mark.heavy
def test_types(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    moment = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)
    span = datetime.timedelta(days=1, microseconds=5)
    table = pa.table(
        {
            "byte": pa.array([1, -2, 3], pa.int8()),
            "yes": [True, False, True],
            "price": pa.array([decimal.Decimal("1.25")] * 3, pa.decimal128(10, 2)),
            "day": [day] * 3,
            "moment": pa.array([moment] * 3, pa.timestamp("ms", "Europe/Berlin")),
            "span": pa.array([span] * 3, pa.duration("us")),
            "image": [b"\x00\xff", b"", b"abc"],
            "matrix": [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]] * 3,
            "paths": [[[1], [2, 3]], [], [[4, 5, 6]]],
            "words": [["a", "b"]] * 3,
            "point": [{"x": 1, "where": {"y": "north"}}] * 3,
            "points": [[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]], []],
            "nothing": pa.array([[], [], []], pa.list_(pa.float32())),
        }
    )
    with data.from_arrow(table, tmp_path) as rows:
        for shuffle in (False, True):
            (batch,) = rows.numpy(3, shuffle=shuffle)
            order = np.argsort([{1: 0, -2: 1, 3: 2}[each] for each in batch["byte"].tolist()])
            assert batch["byte"].dtype == np.int8
            assert batch["yes"].dtype == bool
            assert batch["yes"][order].tolist() == [True, False, True]
            assert batch["price"].tolist() == [1.25] * 3
            assert batch["day"][0] == np.datetime64("2024-02-29")
            assert batch["moment"][0] == np.datetime64("2024-02-29T12:30")
            assert batch["span"][0] == np.timedelta64(span)
            assert batch["image"][order].tolist() == [b"\x00\xff", b"", b"abc"]
            assert batch["matrix"].shape == (3, 3, 2)
            assert batch["matrix"][2].tolist() == [[1, 2], [3, 4], [5, 6]]
            assert batch["paths"].lengths[order].tolist() == [2, 0, 1]
            assert batch["paths"][int(order[0])].values.tolist() == [1, 2, 3]
            assert batch["paths"][int(order[0])].lengths.tolist() == [1, 2]
            assert batch["words"].tolist() == [["a", "b"]] * 3
            assert batch["point"]["where"]["y"].tolist() == ["north"] * 3
            assert batch["points"].values.shape == (3, 2)
            assert batch["points"].lengths[order].tolist() == [1, 2, 0]
            assert batch["nothing"].lengths.tolist() == [0, 0, 0]
        (tensors,) = rows.torch(3)
        assert tensors["day"].tolist() == [19782] * 3
        assert tensors["moment"].tolist() == [int(moment.timestamp()) * 1_000_000] * 3
        assert tensors["image"] == [b"\x00\xff", b"", b"abc"]
        assert tensors["matrix"].shape == (3, 3, 2)
        (found,) = rows.arrow(3)
        assert found["paths"].to_pylist() == [[[1], [2, 3]], [], [[4, 5, 6]]]
        assert found["matrix"].to_pylist() == table["matrix"].to_pylist()
        assert found["day"].to_pylist() == [day] * 3
        (graph,) = rows.tf(3)
        assert graph["paths"].to_list() == [[[1], [2, 3]], [], [[4, 5, 6]]]
        assert graph["points"].shape == (3, None, 2)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (pa.array([1, None, None]), r"'x' has 2 nulls among 3 rows.*data.fill\(...\)"),
        (pa.array([[1, None], [2, 3]]), "'x' has 1 nulls within its arrays"),
        (pa.array([[1], None]), "'x' has 1 nulls in the place of arrays"),
        (pa.array([{"y": 1}, None]), "'x.y' is in the struct 'x', which is null in 1 of 2 rows"),
        (pa.array([None, None]), "'x' has the type null"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())), "'x' has the type map"),
    ],
)
def test_what_cannot_be_stored_is_refused(array: pa.Array, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        data.from_arrow(pa.table({"x": array}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table([[1], [2]], names=["a", "a"]), "2 columns .* would have the name 'a': rename"),
        (pa.table({"a.b": [1], "a": [{"b": 2}]}), "2 columns .* would have the name 'a.b'"),
        (pa.table({}), "the table has no columns"),
    ],
    ids=["twice", "field", "none"],
)
def test_each_column_of_a_table_needs_a_name(table: pa.Table, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        data.from_arrow(table, tmp_path)


def test_nulls_are_filled_or_masked() -> None:
    table = pa.table(
        {
            "age": pa.array([30, None, 50], pa.int32()),
            "city": ["Ulm", None, "Bonn"],
            "day": pa.array([None, datetime.date(1970, 1, 2), None]),
            "scores": [[1.0, None], [None, None], [5.0, 6.0]],
            "point": [{"x": None}, {"x": 2}, {"x": 3}],
        }
    )
    nulls = {
        "age": data.fill_with_indicator(-1),
        "city": data.fill("unknown"),
        "day": data.fill_with_indicator(),
        "scores": data.fill(0),
        "point.x": data.fill_with_indicator(),
    }
    with data.from_arrow(table, nulls=nulls) as rows:
        (batch,) = rows.numpy(3)
        assert batch["age"].tolist() == [30, -1, 50]
        assert batch["age_is_null"].tolist() == [False, True, False]
        assert batch["city"].tolist() == ["Ulm", "unknown", "Bonn"]
        assert batch["day"].astype(int).tolist() == [0, 1, 0]
        assert batch["day_is_null"].tolist() == [True, False, True]
        assert batch["scores"].tolist() == [[1, 0], [0, 0], [5, 6]]
        assert batch["point"]["x"].tolist() == [0, 2, 3]
        assert batch["point"]["x_is_null"].tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("nulls", "words"),
    [
        ({"y": data.fill(0)}, "no such column"),
        ({"x": 0}, r"data.fill\(value\) or data.fill_with_indicator\(\)"),
        ({"x": data.fill_with_indicator()}, "exists already"),
        ({"list": data.fill_with_indicator()}, "is an array column"),
    ],
)
def test_policies_without_effect_are_refused(nulls: Any, words: str) -> None:
    table = pa.table({"x": [1], "x_is_null": [True], "list": [[1]]})
    with pytest.raises(ArgumentValueError, match=words):
        data.from_arrow(table, nulls=nulls)


def test_a_value_that_the_column_cannot_hold_is_refused() -> None:
    with pytest.raises(DataError, match=r"'x' cannot hold the value 'a' given for its nulls"):
        data.from_arrow(pa.table({"x": [1, None]}), nulls={"x": data.fill("a")})


def test_old_names_are_taken_with_a_warning_that_has_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match=r"data.mask.* data.fill_with_indicator") as masked:
        assert data.mask(-1) == data.fill_with_indicator(-1)
    with data.from_arrow(pa.table({"x": range(5)})) as rows:
        for old, new in (("share", "split"), ("join", "uneven")):
            with pytest.warns(
                DeprecationWarning, match=f'remainder="{old}".*remainder="{new}"'
            ) as told:
                batches = rows.numpy(2, remainder=old, rank=1, size=2)  # type: ignore[arg-type]
            again = rows.numpy(2, remainder=new, rank=1, size=2)  # type: ignore[arg-type]
            assert [b["x"].tolist() for b in batches] == [b["x"].tolist() for b in again]
            assert told[0].filename == masked[0].filename == __file__


def test_a_handle_is_small_and_reads_elsewhere(rows: DataSet) -> None:
    pickled = pickle.dumps(rows)
    assert len(pickled) < 2000
    elsewhere = pickle.loads(pickled)
    assert len(elsewhere) == ROWS
    assert numbers(elsewhere.numpy(100)) == list(range(1000))
    with pytest.raises(DataError, match="the driver: it alone deletes it"):
        elsewhere.delete()


def test_a_relative_cache_dir_means_the_same_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with data.from_arrow(pa.table({"x": [1, 2]}), "cache") as rows:
        monkeypatch.chdir("/")
        assert [batch["x"].tolist() for batch in rows.numpy(2)] == [[1, 2]]


def test_reading_what_is_deleted_says_so(table: pa.Table, tmp_path: Path) -> None:
    rows = data.from_arrow(table, tmp_path)
    batches = iter(rows.numpy(1))
    next(batches)
    rows.delete()
    rows.delete()
    with pytest.raises(DataError, match=rf"{socket.gethostname()} cannot read .*was deleted"):
        rows.numpy(10)
    with pytest.raises(DataError, match="was deleted"):
        list(batches)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"shuffle": "yes"}, "shuffle='yes'"),
        ({"epoch": -1}, "epoch=-1"),
        ({"remainder": "keep"}, "'drop', 'pad', 'split' or 'uneven'"),
        ({"rank": 0}, "give both"),
        ({"rank": 2, "size": 2}, "from 0 to 1"),
        ({"threads": -1}, "threads=-1"),
        ({"shuffle_window": 0}, "shuffle_window=0"),
    ],
)
def test_options_are_refused_before_anything_is_read(
    rows: DataSet, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=words):
        rows.numpy(**{"batch_size": 10, **options})


def test_rank_and_size_come_from_the_environment(
    rows: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert numbers(rows.numpy(100))[:100] == list(range(100, 200))
    monkeypatch.setenv("HOROVOD_RANK", "3")
    monkeypatch.setenv("HOROVOD_SIZE", "4")
    assert numbers(rows.numpy(100))[:100] == list(range(300, 400))


def test_behind_a_url_blocks_are_copied_to_this_host_and_deleted(
    table: pa.Table, tmp_path: Path
) -> None:
    base = f"file://{tmp_path}/remote"
    with data.from_arrow(table, base) as rows:
        batches = rows.numpy(50, shuffle=True, remainder="uneven")
        assert sorted(numbers(batches)) == list(range(ROWS))
        copy = batches._reader._host_copy._directory
        assert len(list(copy.glob("*.block"))) == len(batches._reader.block_rows)
        other = rows.numpy(50)
        assert numbers(other) == list(range(1000))
        del batches
        assert copy.exists()  # the other one still reads
        del other
        assert not copy.exists()
    assert list((tmp_path / "remote").iterdir()) == []


def encoded(kind: str, shade: int, height: int = 10, width: int = 20) -> bytes:
    import io

    import PIL.Image

    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (shade, 0, 255 - shade)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"num_workers": 2}])
def test_images_are_decoded_in_threads_and_processes(options: dict[str, Any]) -> None:
    images = [encoded("PNG" if shade % 2 else "JPEG", shade) for shade in range(0, 200, 5)]
    with data.from_arrow(pa.table({"image": images, "shade": range(0, 200, 5)})) as rows:
        decode = data.decode_images("image", size=(8, 16))
        batches = rows.torch(10, shuffle=True, batch_transform=decode, **options)
        found = list(batches)
    assert len(found) == 4
    for batch in found:
        assert batch["image"].shape == (10, 8, 16, 3)
        difference = batch["image"][:, 3, 5, 0].int() - batch["shade"]
        assert int(difference.abs().max()) <= 3  # JPEG rounds


def test_what_is_no_image_is_named() -> None:
    images = [encoded("PNG", 0), b"nothing"]
    with data.from_arrow(pa.table({"image": images})) as rows:
        with pytest.raises(DataError, match=r"row 1 of the batch has no image in 'image'"):
            list(rows.numpy(2, batch_transform=data.decode_images("image")))
        with pytest.raises(DataError, match="no column 'picture' to decode; there are image"):
            list(rows.numpy(2, batch_transform=data.decode_images("picture")))
    sizes = [encoded("PNG", 0), encoded("PNG", 0, height=11)]
    with (
        data.from_arrow(pa.table({"image": sizes})) as rows,
        pytest.raises(DataError, match=r"different sizes.*give decode_images a size"),
    ):
        list(rows.numpy(2, batch_transform=data.decode_images("image", mode="L")))
    with pytest.raises(ArgumentValueError, match="height and width"):
        data.decode_images("image", size=(0, 5))


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)"])
def test_the_end_of_the_driver_deletes_what_it_stored(tmp_path: Path, ending: str) -> None:
    (tmp_path / "of-others").touch()
    script = f"""
import pyarrow as pa
from horovodrunner import data
rows = data.from_arrow(pa.table({{"x": [1, 2]}}), {str(tmp_path)!r})
print(rows.location)
{ending}
"""
    command = [sys.executable, "-c", script]
    done = processes.run(command, capture_output=True)
    assert done.stdout.startswith(f"{tmp_path}/horovodrunner-data-")
    assert [path.name for path in tmp_path.iterdir()] == ["of-others"]


@pytest.mark.parametrize(
    ("cache_dir", "text"),
    [
        (Path("s3://bucket/rows"), r"cache_dir=.*is a URL in a path object, .* give it as a str"),
        ("", "cache_dir='': it must not be empty"),
        ("dbfs:/rows", "on Databricks write the path /dbfs/rows/"),
        ("C:/rows", "a path of Windows"),
        ("~no-such-user/rows", "the directory ~no-such-user/rows is unknown"),
    ],
    ids=["path object", "empty", "dbfs", "Windows", "home"],
)
def test_a_cache_dir_that_cannot_be_one_is_told_with_what_to_write(
    cache_dir: Any, text: str, table: pa.Table
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        data.from_arrow(table, cache_dir)
