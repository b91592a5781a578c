"""What rank 0 returned: into a file, to the driver, and back to an object."""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest

from horovodrunner import PayloadError
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.outcome.driver import open_outcome
from horovodrunner.flows.outcome.outcome import Outcome, Success
from horovodrunner.flows.results import driver as driver_module
from horovodrunner.flows.results import task as results
from horovodrunner.flows.results.driver import ResultStore, read_result
from horovodrunner.flows.results.sequence import RankResults
from horovodrunner.flows.results.task import ResultUpload
from horovodrunner.pickling import buffers as buffers_module
from horovodrunner.pickling.buffers import BufferedPickle, Layout, SinkError, write_pickle
from horovodrunner.pickling.pickler import on_device
from horovodrunner.processes.driver.channel import DriverChannel
from horovodrunner.wire.events import UploadResult
from horovodrunner.wire.upload import PeerFailedError, Piece, TransferClient

TOKEN = b"t" * 32
LARGE = 8 * 1024 * 1024


class File:
    """The file of one task."""

    def __init__(self) -> None:
        self.descriptor = results.file_without_a_name()

    def write(self, value: object) -> Layout:
        return write_pickle(value, self.descriptor)

    def read(self, layout: Layout) -> BufferedPickle:
        return read_result(self.descriptor, layout)


@pytest.fixture
def file() -> Iterator[File]:
    file = File()
    yield file
    os.close(file.descriptor)


def large_array() -> Any:
    return np.arange(LARGE // 8, dtype=np.int64)


def read_only_array() -> Any:
    array = large_array()
    array.flags.writeable = False
    return array


def tensors() -> Any:
    import torch

    return {"weight": torch.arange(1_000_000.0), "bias": torch.zeros(0)}


KINDS: dict[str, Callable[[], Any]] = {
    "numpy": large_array,
    "fortran": lambda: np.asfortranarray(large_array().reshape(1024, -1)),
    "not contiguous": lambda: large_array().reshape(1024, -1)[:, ::2],
    "read-only": read_only_array,
    "zero length": lambda: np.empty((0, 7)),
    "small": lambda: np.arange(3),
    "objects": lambda: np.array(["a", None], dtype=object),
    "nested": lambda: [{"a": (large_array()[:100_000], "text")}, {1: large_array()}, None],
    "bytes": lambda: bytes(LARGE),
    "bytearray": lambda: bytearray(LARGE),
    "pandas": lambda: pd.DataFrame({"x": large_array(), "y": large_array() / 2, "z": "s"}),
    "pyarrow": lambda: pa.table({"x": large_array(), "s": ["one", None] * (LARGE // 16)}),
    "torch": tensors,
    "nothing": lambda: None,
}
"""Things of the kinds that people return."""


def assert_same(value: Any, expected: Any) -> None:
    assert type(value) is type(expected)
    if isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(value, expected)
        assert value.dtype == expected.dtype
        assert value.flags.writeable == expected.flags.writeable
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(value, expected)
    elif isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for name in expected:
            assert_same(value[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_same(one, other)
    elif type(expected).__module__ == "torch":
        assert value.equal(expected)
    else:
        assert value == expected


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_a_value_comes_back_as_it_was(make: Callable[[], Any], file: File, tmp_path: Path) -> None:
    expected = make()
    layout = file.write(expected)
    assert os.fstat(file.descriptor).st_size == sum(layout)
    result = file.read(layout)
    assert result.size == sum(layout)
    with (tmp_path / "kept").open("wb") as kept:
        result.keep(kept)
    assert_same(pickle.loads((tmp_path / "kept").read_bytes()), expected)
    assert_same(result.load(), expected)


def test_large_buffers_stand_beside_the_pickle_and_small_ones_do_not(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = large_array()
    pickle_bytes, *beside = file.write([array, array[:10], array[:100_000], array[::2][:10]])
    assert beside == [LARGE, 800_000]
    assert pickle_bytes < 2000
    monkeypatch.setattr(buffers_module, "MOST_BESIDE", 3)
    with os.fdopen(results.file_without_a_name(), "wb") as other:
        _, *beside = write_pickle([array[i:] for i in range(9)], other.fileno())
    assert len(beside) == 3


def test_tensors_stand_beside_the_pickle_once_and_share_memory_as_before(file: File) -> None:
    import torch

    layer = torch.nn.Linear(512, 512)
    layer.register_buffer("tied", layer.weight.detach()[1:])
    bits = torch.arange(70_000).to(torch.uint16)  # torch itself does not unpickle that type
    pickle_bytes, *beside = layout = file.write([layer, bits])
    assert beside == [512 * 512 * 4, 140_000]
    assert pickle_bytes < 5000
    arrived, same_bits = file.read(layout).load()
    assert type(arrived.weight) is torch.nn.Parameter
    assert arrived.weight.requires_grad
    assert arrived.weight.equal(layer.weight)
    with torch.no_grad():
        arrived.weight[1:] = 3
    assert (arrived.tied == 3).all()
    assert same_bits.equal(bits)


def test_memory_of_a_gpu_stays_on_the_cpu_where_there_is_none() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: scripts/gpu_check.sh sees more of it")
    memory = torch.arange(3).untyped_storage()
    assert on_device(memory, "cuda:1").tolist() == memory.tolist()


def test_a_small_array_that_is_kept_keeps_no_large_one(file: File) -> None:
    process = psutil.Process()
    big = 32 * LARGE
    layout = file.write([np.ones(big, np.uint8), np.ones(70_000, np.uint8)])
    before = process.memory_info().rss
    result = file.read(layout)
    small = result.load()[1]
    assert process.memory_info().rss - before < big // 2
    small[:] = 5
    assert small.sum() == 350_000


def test_a_full_file_is_an_error_that_says_so(file: File) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE // 2, limits[1]))
    try:
        with pytest.raises(SinkError, match="File too large"):
            file.write(large_array())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_without_files_in_memory_there_is_one_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = File()
    assert file.read(file.write("value")).load() == "value"
    assert list(tmp_path.iterdir()) == []
    os.close(file.descriptor)


@pytest.mark.parametrize("row_bytes", [7, 10_000, LARGE // 3])
def test_a_result_survives_being_cut_into_rows(file: File, row_bytes: int) -> None:
    expected = [large_array()[: 20_000 if row_bytes < 100 else None], "text"]
    layout = file.write(expected)
    task = upload_of(JobSpec("run-1", 1, b"", TOKEN))
    task.take(file.descriptor, layout, 0, reaches_driver=False)
    outcome = Outcome(Success(0, layout))
    rows = [outcome.to_bytes(), *task.rows(row_bytes)]
    task.close()
    assert all(len(row) <= row_bytes for row in rows[2:])
    assert_same(open_outcome(ResultStore().take_rows(rows)), expected)
    with pytest.raises(EOFError, match="last"):
        ResultStore().take_rows(rows[:-1])


def test_where_only_spark_can_carry_it_its_limit_is_told_before_anything_is_tried(
    file: File,
) -> None:
    layout = file.write(bytes(2_000_000))
    task = upload_of(JobSpec("r", 1, b"", TOKEN, driver_address=("db", 1), max_result_bytes=10**6))
    expected = r"1\.9 MiB .* 976\.6 KiB .* db:1: .*driver\.port.* spark\.driver\.maxResultSize"
    with pytest.raises(PayloadError, match=expected):
        task.take(file.descriptor, layout, 0, reaches_driver=False)
    task.take(file.descriptor, (1000,), 0, reaches_driver=False)
    task.close()


def upload_of(job: JobSpec) -> ResultUpload:
    return ResultUpload(job, TransferClient(job.run_id, job.token, job.driver_address))


class Driver:
    """The driver's end of the channel, and a task's."""

    def __init__(
        self, channel: DriverChannel, console: Console, results_store: ResultStore
    ) -> None:
        self.channel, self.console, self.results = channel, console, results_store
        self.job = JobSpec(
            "run-1",
            1,
            b"",
            TOKEN,
            driver_address=("127.0.0.1", channel.open("127.0.0.1", 0)),
            max_result_bytes=10**6,
        )
        self.client = TransferClient(self.job.run_id, TOKEN, self.job.driver_address)
        self.task = ResultUpload(self.job, self.client)


@pytest.fixture
def driver() -> Iterator[Driver]:
    console = Console()
    store = ResultStore(of_all_ranks=True)
    store.begin(16)
    with DriverChannel("run-1", TOKEN, console, console.wake, results=store) as channel:
        yield Driver(channel, console, store)


def test_a_result_above_sparks_limit_comes_through_the_channel(file: File, driver: Driver) -> None:
    expected = {"large": large_array(), "small": np.arange(3), "text": "x"}
    layout = file.write(expected)
    driver.task.take(file.descriptor, layout, 0, reaches_driver=True)
    assert list(driver.task.rows(1000)) == []
    assert driver.results.first is not None
    assert_same(driver.results.first.load(), expected)


def test_a_driver_without_memory_says_so_before_anything_is_sent(
    file: File, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = (file.write("x")[0], 1 << 60)
    sent = []

    def noted(*_: object) -> Iterator[bytes]:
        sent.append(1)
        yield b""

    monkeypatch.setattr(results, "_mapped_chunks", noted)
    with pytest.raises(PeerFailedError, match=r"no memory .* 1073741824\.0 GiB on the driver"):
        driver.task.take(file.descriptor, layout, 0, reaches_driver=True)
    assert not sent
    assert driver.results.first is None


def test_a_result_that_cannot_travel_alone_is_kept_for_the_rows(file: File, driver: Driver) -> None:
    driver.channel.close()
    layout = file.write("x" * 1000)
    driver.task.take(file.descriptor, layout, 0, reaches_driver=True)
    assert sum(map(len, [*driver.task.rows(100)][1:])) == sum(layout)
    driver.task.close()
    with pytest.raises(PayloadError, match=r"cannot be reached: .*refused.*driver\.maxResult"):
        driver.task.take(file.descriptor, file.write(bytes(2_000_000)), 0, reaches_driver=True)


@pytest.mark.parametrize("who", ["task", "driver"])
def test_an_abort_in_the_middle_ends_both_sides(
    who: str, file: File, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = file.write(large_array())
    mapped_chunks = results._mapped_chunks

    def aborting(descriptor: int, size: int) -> Iterator[memoryview]:
        for chunk in mapped_chunks(descriptor, size):
            yield chunk
            if who == "task":
                driver.client.abort()
            else:
                driver.channel.close()

    monkeypatch.setattr(results, "_mapped_chunks", aborting)
    with pytest.raises((OSError, PayloadError)):
        driver.task.take(file.descriptor, layout, 0, reaches_driver=True)
    driver.channel.close()
    assert driver.results.first is None


def test_what_does_not_fit_its_announcement_is_refused(driver: Driver) -> None:
    with pytest.raises(PeerFailedError, match="5 bytes where 3 were announced"):
        driver.client.upload(UploadResult("run-1", (3,)), [Piece("result", 5, [b"12345"])])
    assert driver.results.first is None


def test_a_result_of_another_attempt_is_not_taken(driver: Driver) -> None:
    other = TransferClient("run-2", TOKEN, driver.job.driver_address)
    with pytest.raises(ConnectionError):
        other.upload(UploadResult("run-2", (3,)), [Piece("result", 3, [b"123"])])
    assert driver.results.first is None


def test_a_result_that_cannot_be_unpickled_is_kept_in_a_file_that_pickle_reads(
    file: File,
) -> None:
    module = types.ModuleType("only_in_the_worker")
    exec("class Model:\n    pass", module.__dict__)
    sys.modules[module.__name__] = module
    model = module.Model()
    model.weights = large_array()
    layout = file.write({"model": model})
    del sys.modules[module.__name__]
    outcome = Outcome(Success(0, layout, file.read(layout)))
    with pytest.raises(PayloadError, match=r"needs only_in_the_worker\.Model") as caught:
        open_outcome(outcome)
    path = Path(str(caught.value).split("kept in ")[1].split(": make")[0])
    assert "Its 8.0 MiB are kept" in str(caught.value)
    sys.modules[module.__name__] = module
    try:
        with path.open("rb") as kept:
            value = pickle.load(kept)
        assert_same(value["model"].weights, large_array())
        value["model"].weights[0] = 3
    finally:
        del sys.modules[module.__name__]
        path.unlink()


class Frozen:
    """Cannot be restored: pickle sets slots as anybody does."""

    __slots__ = ("a",)

    def __init__(self) -> None:
        object.__setattr__(self, "a", 1)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("frozen")


class Leaves:
    def __init__(self) -> None:
        self.a = 1

    def __setstate__(self, state: object) -> None:
        sys.exit(3)


class Asks:
    def __init__(self) -> None:
        self.inner = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Unspeakable:
    """What it raises when it is restored leaves when it is asked for its text."""

    def __init__(self) -> None:
        self.a = 1

    def __setstate__(self, state: object) -> None:
        class Problem(Exception):  # noqa: N818
            def __str__(self) -> str:
                return str(sys.exit(3))

        raise Problem


@pytest.mark.parametrize("kind", [Frozen, Leaves, Asks, Unspeakable])
def test_a_result_whose_class_cannot_be_restored_is_named_and_kept(
    kind: Callable[[], Any], file: File
) -> None:
    layout = file.write(["before", kind()])
    outcome = Outcome(Success(0, layout, file.read(layout)))
    with pytest.raises(PayloadError) as caught:
        open_outcome(outcome)
    text = str(caught.value)
    assert f"fails where {Frozen.__module__}.{kind.__qualname__} is restored" in text
    path = Path(text.split("kept in ")[1].split(": once", maxsplit=1)[0])
    assert path.stat().st_size == layout[0]
    path.unlink()


def test_a_result_that_cannot_even_be_kept_is_still_explained(
    file: File, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layout = file.write(Leaves())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(PayloadError, match=r"could not be kept in .*gone \(No such file"):
        open_outcome(Outcome(Success(0, layout, file.read(layout))))


def test_results_of_all_ranks_come_through_the_channel_few_at_a_time(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them waits for its turn, and none is given up meanwhile."""
    monkeypatch.setattr("horovodrunner.wire.upload.WAIT_SECONDS", 0.01)
    driver.results.begin(2 * driver_module.AT_ONCE + 1)
    write, now, most = driver.results._came.write, [0], [0]
    counting, all_there = threading.Lock(), threading.Barrier(driver_module.AT_ONCE)

    def counted(*arguments: Any) -> None:
        with counting:
            now[0] += 1
            most[0] = max(most[0], now[0])
        all_there.wait()
        with counting:
            now[0] -= 1
        write(*arguments)

    monkeypatch.setattr(driver.results._came, "write", counted)
    files = [File() for _ in range(driver.results.size)]

    def send(rank: int) -> None:
        layout = files[rank].write([rank, large_array()[:20_000] + rank])
        driver.task.take(files[rank].descriptor, layout, rank, reaches_driver=True)

    with concurrent.futures.ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(send, range(1, len(files))))
    assert most == [driver_module.AT_ONCE]
    assert driver.results.missing() == []
    for rank in range(1, len(files)):
        assert_same(driver.results.read(rank).load(), [rank, large_array()[:20_000] + rank])
    for each in files:
        os.close(each.descriptor)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_result_that_is_late_gets_not_among_those_of_the_next_attempt(
    file: File, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultStore(of_all_ranks=True)
    store.begin(2)
    with os.fdopen(results.file_without_a_name(), "wb") as late:
        layouts = [write_pickle("late", late.fileno()), file.write("next")]
        read = os.preadv if rank == 0 else os.pread

        def reading(descriptor: int, *arguments: Any) -> Any:
            if descriptor == late.fileno():  # on its way; meanwhile the run is launched again
                monkeypatch.undo()
                store.begin(2)
                store.take(file.descriptor, layouts[1], rank)
            return read(descriptor, *arguments)

        monkeypatch.setattr(os, read.__name__, reading)
        store.take(late.fileno(), layouts[0], rank)
    found = store.first if rank == 0 else store.read(1)
    assert found is not None
    assert found.load() == "next"


@pytest.mark.parametrize("rank", [-1, 16, 10**20])
def test_a_result_of_no_rank_is_refused(driver: Driver, rank: int) -> None:
    with pytest.raises(PeerFailedError, match=f"a result of rank {rank}, which is not wanted"):
        driver.client.upload(UploadResult("run-1", (3,), rank), [Piece("result", 3, [b"123"])])


def test_a_result_that_breaks_off_is_missing(driver: Driver) -> None:
    def broken() -> Iterator[bytes]:
        yield b"1"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        driver.client.upload(UploadResult("run-1", (3,), 2), [Piece("result", 3, broken())])
    driver.client.upload(UploadResult("run-1", (3,), 3), [Piece("result", 3, [b"123"])])
    assert driver.results.missing() == [1, 2, *range(4, 16)]
    with pytest.raises(PayloadError, match="what 14 ranks returned did not come"):
        RankResults.of(driver.results, None)


def test_results_of_a_tasks_ranks_survive_the_rows(file: File) -> None:
    task, store = upload_of(JobSpec("run-1", 3, b"", TOKEN)), ResultStore(of_all_ranks=True)
    store.begin(3)
    layouts = []
    for rank in range(3):
        layouts.append(file.write([rank, large_array()[:50_000]]))
        with os.fdopen(results.file_without_a_name(), "wb") as own:
            layout = write_pickle([rank, large_array()[:50_000]], own.fileno())
            task.take(own.fileno(), layout, rank, reaches_driver=False)
    rows = [Outcome(Success(0, layouts[0])).to_bytes(), *task.rows(100_000)]
    task.close()
    assert open_outcome(store.take_rows(rows))[0] == 0
    assert [store.read(rank).load()[0] for rank in (1, 2)] == [1, 2]
    with pytest.raises(EOFError, match="last"):
        store.take_rows(rows[:-1])
