"""Checkpoints travel between a task and the driver, over real sockets and the real channel."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import struct
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from horovodrunner.flows.artifacts.driver import BroughtFiles
from horovodrunner.flows.checkpoints.driver import CheckpointReceiver
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.store import CheckpointStore, draft
from horovodrunner.flows.checkpoints.task.backend import DriverBackend
from horovodrunner.flows.checkpoints.tree import pieces_of_tree
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.processes.driver.channel import DriverChannel
from horovodrunner.wire import upload
from horovodrunner.wire.auth import AuthenticationError
from horovodrunner.wire.events import (
    End,
    Event,
    FetchCheckpoint,
    FindCheckpoint,
    Go,
    PieceFollows,
    Started,
    TransferFailed,
    UploadCheckpoint,
    UploadFile,
    UploadResult,
    encode,
)
from horovodrunner.wire.upload import Piece, Transfer, TransferClient, TransferHandler
from tests import processes
from tests.waiting import wait_until

TOKEN = b"t" * 32
MEGABYTE = 1_000_000


class GatedStore(CheckpointStore):
    """A store on a slow disk: nothing is read or written before the gate opens."""

    def __init__(self, location: Path) -> None:
        super().__init__(location, keep=3)
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()

    def _write_file(self, path: str, chunks: Iterable[bytes | memoryview]) -> int:
        self.reached.set()
        self.gate.wait(30)
        return super()._write_file(path, chunks)


@dataclass
class Driver:
    channel: DriverChannel
    console: Console
    store: GatedStore
    port: int

    def client(self, token: bytes = TOKEN, run_id: str = "run-1") -> TransferClient:
        return TransferClient(run_id, token, ("127.0.0.1", self.port))

    def backend(self, token: bytes = TOKEN, run_id: str = "run-1") -> DriverBackend:
        return DriverBackend(self.client(token, run_id))

    def put(self, step: int, *pieces: Piece, hashes: object = None) -> None:
        """Upload what no task of ours would."""
        known = {piece.name: "0" * 64 for piece in pieces} if hashes is None else hashes
        content = json.dumps(known).encode()
        manifest = Piece("manifest.json", len(content), [content])
        self.client().upload(UploadCheckpoint("run-1", step), [*pieces, manifest])

    @property
    def location(self) -> Path:
        return Path(self.store.location)

    def steps(self) -> list[int]:
        return sorted(manifest.step for manifest in self.store.manifests())

    def incoming(self) -> list[str]:
        return [path.name for path in self.location.glob(".*")]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    console, store = Console(), GatedStore(tmp_path / "kept")
    files = BroughtFiles({"HOROVOD_TIMELINE": str(tmp_path / "timeline.json")})
    results = ResultStore()
    results.begin(1)
    with DriverChannel(
        "run-1", TOKEN, console, console.wake, store=store, files=files, results=results
    ) as channel:
        yield Driver(channel, console, store, channel.open("127.0.0.1", 0))
        store.gate.set()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a main wrote: nested, empty, and longer than one piece."""
    root = tmp_path / "source"
    (root / "variables" / "deep").mkdir(parents=True)
    (root / "assets" / "none").mkdir(parents=True)
    (root / "model.pt").write_bytes(os.urandom(3_333_333))
    (root / "variables" / "deep" / "index").write_bytes(b"index")
    (root / "empty").touch()
    (root / "name with späces").write_bytes(b"\0\n")
    return root


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything below a directory; None stands for a directory."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
    }


def stored_tree(driver: Driver, step: int) -> dict[str, bytes | None]:
    found = tree(Path(driver.store.path_of(step)))
    del found["manifest.json"]
    return found


def transfer_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "horovodrunner-transfer"]


class Putting(threading.Thread):
    """A put in a thread of its own, as the task does it."""

    def __init__(self, backend: DriverBackend, step: int, directory: Path) -> None:
        super().__init__(daemon=True)
        self._call = (backend, step, directory)
        self.error: BaseException | None = None

    def run(self) -> None:
        backend, step, directory = self._call
        try:
            backend.put(step, directory)
        except BaseException as error:
            self.error = error

    def wait_for_error(self, seconds: float) -> BaseException | None:
        self.join(seconds)
        assert not self.is_alive(), "the put still waits"
        return self.error


def large_directory(tmp_path: Path, size: int) -> Path:
    """A sparse file: much to send, nothing to write."""
    root = tmp_path / "large"
    root.mkdir()
    with (root / "zeros").open("wb") as file:
        file.truncate(size)
    return root


def read_so_far(path: Path) -> int:
    """How much of a file this process has read, as the kernel tells it."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if descriptor.readlink() == path:
                info = Path("/proc/self/fdinfo", descriptor.name).read_text()
                return int(info.split("pos:")[1].split()[0])
    return 0


def test_what_is_put_is_kept_with_a_manifest(driver: Driver, source: Path) -> None:
    driver.backend().put(7, source)
    (manifest,) = driver.store.manifests()
    assert manifest.step == 7
    assert {file.path: file.size for file in manifest.files} == {
        "model.pt": 3_333_333,
        "variables/deep/index": 5,
        "empty": 0,
        "name with späces": 2,
    }
    assert manifest.directories == ("assets/none",)
    assert driver.store.verify(manifest) == ""
    assert stored_tree(driver, 7) == tree(source)
    assert driver.incoming() == []


def test_what_is_fetched_is_what_was_put(driver: Driver, source: Path, tmp_path: Path) -> None:
    backend = driver.backend()
    backend.put(1, source)
    (source / "model.pt").write_bytes(b"newer")
    backend.put(2, source)
    manifest, damaged = backend.find_latest()
    assert manifest is not None
    assert (manifest.step, damaged) == (2, [])
    copy = tmp_path / "copy"
    copy.mkdir()
    backend.fetch(manifest, copy)
    assert tree(copy) == tree(source)


def test_a_large_file_comes_back_whole(driver: Driver, tmp_path: Path) -> None:
    content = os.urandom(50 * MEGABYTE)
    large, copy = tmp_path / "large", tmp_path / "copy"
    large.mkdir()
    copy.mkdir()
    (large / "model.pt").write_bytes(content)
    backend = driver.backend()
    backend.put(3, large)
    manifest, _ = backend.find_latest()
    assert manifest is not None
    backend.fetch(manifest, copy)
    assert (copy / "model.pt").read_bytes() == content


def test_an_empty_checkpoint_is_one(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    driver.backend().put(0, tmp_path / "nothing")
    assert driver.steps() == [0]


def test_without_a_checkpoint_there_is_no_latest(driver: Driver) -> None:
    assert driver.backend().find_latest() == (None, [])


def test_the_damaged_ones_on_the_driver_are_told_to_the_task(driver: Driver, source: Path) -> None:
    backend = driver.backend()
    backend.put(1, source)
    backend.put(2, source)
    flip_a_byte(Path(driver.store.path_of(2), "model.pt"))
    manifest, damaged = backend.find_latest()
    assert manifest is not None
    assert manifest.step == 1
    (sentence,) = damaged
    assert "step-00000002 is damaged and skipped: model.pt" in sentence


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_file_that_is_damaged_on_the_way_is_not_taken(
    driver: Driver, source: Path, tmp_path: Path
) -> None:
    backend = driver.backend()
    backend.put(1, source)
    manifest, _ = backend.find_latest()
    assert manifest is not None
    flip_a_byte(Path(driver.store.path_of(1), "model.pt"))
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(OSError, match=r"model\.pt of the checkpoint of step 1 .* another SHA-256"):
        backend.fetch(manifest, copy)


def test_a_checkpoint_that_is_gone_cannot_be_fetched(
    driver: Driver, source: Path, tmp_path: Path
) -> None:
    backend = driver.backend()
    backend.put(1, source)
    manifest, _ = backend.find_latest()
    assert manifest is not None
    shutil.rmtree(driver.store.path_of(1))
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(OSError, match="no checkpoint of step 1 any more"):
        backend.fetch(manifest, copy)


def test_a_file_that_is_gone_is_told(driver: Driver, source: Path, tmp_path: Path) -> None:
    backend = driver.backend()
    backend.put(1, source)
    manifest, _ = backend.find_latest()
    assert manifest is not None
    Path(driver.store.path_of(1), "variables/deep/index").unlink()
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(OSError, match=r"FileNotFoundError: .*variables/deep/index"):
        backend.fetch(manifest, copy)


def what_is_shown(driver: Driver, capsys: pytest.CaptureFixture[str], until: str) -> str:
    text = ""

    def has_come() -> bool:
        nonlocal text
        driver.console.show(0.05)
        text += capsys.readouterr().out
        return until in text

    wait_until(has_come)
    return text


def test_a_peer_without_the_token_gets_nothing(driver: Driver, source: Path) -> None:
    driver.backend().put(1, source)
    stranger = driver.backend(token=b"w" * 32)
    for call in (lambda: stranger.put(2, source), stranger.find_latest):
        with pytest.raises(OSError, match=f"127.0.0.1:{driver.port} cannot be reached"):
            call()
    assert driver.steps() == [1]
    assert driver.incoming() == []


def test_another_run_gets_nothing(driver: Driver, source: Path) -> None:
    driver.backend().put(1, source)
    other = driver.backend(run_id="run-0")
    for call in (lambda: other.put(2, source), other.find_latest):
        with pytest.raises(ConnectionError):
            call()
    assert driver.steps() == [1]
    assert driver.incoming() == []


def test_a_driver_that_keeps_no_checkpoints_takes_none(source: Path) -> None:
    console = Console()
    with DriverChannel("run-1", TOKEN, console, console.wake) as channel:
        address = ("127.0.0.1", channel.open("127.0.0.1", 0))
        backend = DriverBackend(TransferClient("run-1", TOKEN, address))
        with pytest.raises(ConnectionError):
            backend.put(1, source)


def test_a_task_that_dies_in_the_middle_of_a_file_leaves_nothing(
    driver: Driver, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.backend().put(1, source)

    def one_chunk_then_death() -> Iterator[bytes]:
        yield bytes(MEGABYTE)
        wait_until(driver.incoming)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        driver.put(2, Piece("model.pt", 10 * MEGABYTE, one_chunk_then_death()))
    assert "transfer (put) broke off" in what_is_shown(driver, capsys, "broke off")
    wait_until(lambda: not transfer_threads())
    assert driver.incoming() == []
    assert driver.steps() == [1]
    assert stored_tree(driver, 1) == tree(source)


def abc(name: str) -> Piece:
    return Piece(name, 3, [b"abc"])


MANY = {"model.pt": "0" * 64, "more.pt": "0" * 64}


@pytest.mark.parametrize("hashes", [MANY, {}, [], 3, {"model.pt": None}, {"model.pt": "0"}])
def test_every_file_that_arrived_needs_its_hash(driver: Driver, hashes: object) -> None:
    with pytest.raises(OSError, match=r"hashes that came are not those|'sha256' of 'model\.pt'"):
        driver.put(1, abc("model.pt"), hashes=hashes)
    assert driver.steps() == []
    assert driver.incoming() == []


def test_what_arrived_and_is_not_what_was_hashed_is_damaged(driver: Driver) -> None:
    driver.put(1, abc("model.pt"))
    found, damaged = driver.backend().find_latest()
    assert found is None
    assert "model.pt does not have the content that was saved" in damaged[0]


UNSAFE = ["../x", "a/../../x", "/tmp/horovodrunner-outside", "manifest.json/x", "", "a//b"]


@pytest.mark.parametrize("path", UNSAFE)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_nothing_is_written_outside(driver: Driver, kind: str, path: str, tmp_path: Path) -> None:
    piece = abc(path) if kind == "file" else Piece(f"{path}/", 0, [])
    with pytest.raises(OSError, match="ValueError: the path"):
        driver.put(1, piece)
    assert [each.name for each in tmp_path.rglob("*")] == ["kept"]
    assert not Path("/tmp/horovodrunner-outside").exists()


def test_a_full_disk_on_the_driver_is_told_at_once_in_its_own_words(
    tmp_path: Path, source: Path
) -> None:
    """The driver is a process whose files may not grow over 20 MB."""
    location = tmp_path / "kept"
    script = f"""
        import resource, sys
        from horovodrunner.processes.driver.channel import DriverChannel
        from horovodrunner.flows.logs.driver import Console
        from horovodrunner.flows.checkpoints.store import CheckpointStore
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
        console = Console()
        store = CheckpointStore({str(location)!r}, keep=3)
        with DriverChannel("run-1", {TOKEN!r}, console, console.wake, store=store) as channel:
            print(channel.open("127.0.0.1", 0), flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with processes.started(command, stdin=processes.PIPE, stdout=processes.PIPE) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        address = ("127.0.0.1", int(driver.stdout.readline()))
        backend = DriverBackend(TransferClient("run-1", TOKEN, address))
        backend.put(1, source)
        with pytest.raises(OSError, match="File too large") as caught:
            backend.put(2, large_directory(tmp_path, 500 * MEGABYTE))
        assert not isinstance(caught.value, ConnectionError)  # trying again would not help
        backend.put(3, source)
        driver.stdin.close()
        assert driver.wait() == 0
    assert sorted(path.name for path in location.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_location_that_vanishes_in_the_middle_is_told(driver: Driver) -> None:
    def vanished() -> Iterator[bytes]:
        wait_until(lambda: list(driver.location.glob(".incoming-*/first")))
        shutil.rmtree(driver.location)
        driver.location.write_text("a file in its place")
        yield b"abc"

    with pytest.raises(OSError, match="NotADirectoryError: .*" + str(driver.location)):
        driver.put(1, abc("first"), Piece("second", 3, vanished()))
    assert driver.location.read_text() == "a file in its place"


def test_a_source_that_cannot_be_read_leaves_nothing(driver: Driver, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        driver.backend().put(1, tmp_path / "never written")
    assert driver.steps() == []
    assert driver.incoming() == []


def test_a_file_that_shrinks_while_it_is_sent_is_told_at_once(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "SILENCE_SECONDS", 3.0)
    large = large_directory(tmp_path, 100 * MEGABYTE)
    driver.store.gate.clear()
    putting = Putting(driver.backend(), 1, large)
    putting.start()
    assert driver.store.reached.wait(10)
    wait_until(lambda: read_so_far(large / "zeros"))
    os.truncate(large / "zeros", 0)  # the socket's buffers do not hold 100 MB
    driver.store.gate.set()
    error = putting.wait_for_error(10)
    wait_until(lambda: not transfer_threads())
    assert isinstance(error, OSError)
    assert "were announced" in str(error)


def test_abort_makes_a_put_that_waits_raise_soon(driver: Driver, tmp_path: Path) -> None:
    driver.store.gate.clear()
    client = driver.client()
    large = large_directory(tmp_path, 100 * MEGABYTE)
    putting = Putting(DriverBackend(client), 1, large)
    putting.start()
    wait_until(lambda: waits_in_the_middle_of(large / "zeros"))
    client.abort()
    assert isinstance(putting.wait_for_error(3), OSError)
    driver.store.gate.set()
    wait_until(lambda: not transfer_threads())
    assert driver.steps() == []
    assert driver.incoming() == []


def waits_in_the_middle_of(path: Path) -> bool:
    before = read_so_far(path)
    time.sleep(0.2)
    return 0 < before == read_so_far(path)


def test_abort_makes_a_put_that_runs_raise_soon(driver: Driver, tmp_path: Path) -> None:
    client = driver.client()
    large = large_directory(tmp_path, 100_000 * MEGABYTE)
    putting = Putting(DriverBackend(client), 1, large)
    putting.start()
    wait_until(lambda: read_so_far(large / "zeros"))
    client.abort()
    error = putting.wait_for_error(3)
    wait_until(lambda: not transfer_threads())
    assert isinstance(error, OSError), repr(error)
    assert driver.steps() == []
    assert driver.incoming() == []


def test_after_abort_nothing_begins(driver: Driver, source: Path) -> None:
    client = driver.client()
    client.abort()
    with pytest.raises(ConnectionAbortedError, match="the run has ended"):
        DriverBackend(client).put(1, source)


def test_closing_the_channel_ends_a_transfer_that_waits(driver: Driver) -> None:
    threads: list[list[str]] = []

    def closed() -> Iterator[bytes]:
        yield b"abc"
        wait_until(lambda: list(driver.location.glob(".incoming-*/first")))
        threads.append(transfer_threads())
        driver.channel.close()
        threads.append(transfer_threads())

    with pytest.raises(ConnectionError):
        driver.put(1, Piece("first", 3, closed()), abc("second"))
    assert threads == [["horovodrunner-transfer"], []]
    assert driver.incoming() == []
    assert driver.steps() == []


def test_closing_the_channel_ends_a_transfer_that_runs(driver: Driver, tmp_path: Path) -> None:
    putting = Putting(driver.backend(), 1, large_directory(tmp_path, 100_000 * MEGABYTE))
    putting.start()
    wait_until(lambda: list(driver.location.glob(".incoming-*/zeros")))
    driver.channel.close()
    assert transfer_threads() == []
    assert isinstance(putting.wait_for_error(5), OSError)
    assert driver.incoming() == []
    assert driver.steps() == []


def test_checkpoints_travel_beside_each_other(driver: Driver, source: Path, tmp_path: Path) -> None:
    """Every host fetches at the start, and a put may be under way."""
    driver.backend().put(1, source)
    manifest, _ = driver.backend().find_latest()
    assert manifest is not None
    errors: list[BaseException] = []

    def fetch(directory: Path, manifest: Manifest) -> None:
        directory.mkdir()
        try:
            driver.backend().fetch(manifest, directory)
        except BaseException as error:
            errors.append(error)

    copies = [tmp_path / f"copy-{number}" for number in range(4)]
    threads = [threading.Thread(target=fetch, args=(copy, manifest)) for copy in copies]
    putting = Putting(driver.backend(), 2, source)
    for thread in (*threads, putting):
        thread.start()
    for thread in (*threads, putting):
        thread.join(30)
    assert (errors, putting.error) == ([], None)
    assert all(tree(copy) == tree(source) for copy in copies)
    assert driver.steps() == [1, 2]


def test_a_process_with_thousands_of_open_files_sends_and_serves(
    driver: Driver, source: Path, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("this machine allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    copy = tmp_path / "copy"
    copy.mkdir()
    with contextlib.ExitStack() as files:
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            files.enter_context(open(os.devnull))  # noqa: PTH123 - just a descriptor
        backend = driver.backend()
        backend.put(1, source)
        manifest, _ = backend.find_latest()
        assert manifest is not None
        backend.fetch(manifest, copy)
    assert tree(copy) == tree(source)


def test_a_driver_that_is_gone_is_named(source: Path) -> None:
    with socket.socket() as keeper:
        keeper.bind(("127.0.0.1", 0))  # bound, not listening
        port = keeper.getsockname()[1]
        backend = DriverBackend(TransferClient("run-1", TOKEN, ("127.0.0.1", port)))
        with pytest.raises(ConnectionError, match=f"the driver at 127.0.0.1:{port} cannot be"):
            backend.put(1, source)


@pytest.mark.parametrize(
    ("greeting", "kind"), [(b"HTTP/1.1 400 Bad Request\r\n", AuthenticationError), (b"", OSError)]
)
def test_what_is_no_channel_is_refused(greeting: bytes, kind: type[OSError]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(greeting)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(kind):
            Transfer.open("127.0.0.1", server.getsockname()[1], TOKEN)
        thread.join()


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "SILENCE_SECONDS", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(TimeoutError),
    ):
        Transfer.open("127.0.0.1", server.getsockname()[1], TOKEN)


@pytest.fixture
def pair() -> Iterator[tuple[Transfer, Transfer]]:
    """A task's end and the driver's."""
    one, other = (Transfer(end) for end in socket.socketpair())
    with contextlib.closing(one), contextlib.closing(other):
        yield one, other


Incoming = Iterator[upload.IncomingPiece]


class Serving(threading.Thread):
    """The driver's end of a transfer, served with a handler."""

    def __init__(self, driver: Transfer, handle: Callable[[Event, Incoming], Any]) -> None:
        super().__init__(daemon=True)
        self._serve = (driver, TransferHandler("a test's transfer", handle))
        self.notes: list[str] = []
        self.errors: list[BaseException] = []

    def run(self) -> None:
        driver, handler = self._serve
        try:
            driver.serve(handler, UploadCheckpoint("run-1", 1), self.notes.append)
        except BaseException as error:
            self.errors.append(error)

    def end(self) -> None:
        """An error would be a traceback of a thread's in the user's notebook."""
        self.join(30)
        assert not self.is_alive()
        assert self.errors == []


def test_pieces_come_as_they_were_sent_also_where_nobody_reads_them_to_the_end(
    pair: tuple[Transfer, Transfer],
) -> None:
    came: list[tuple[str, int, bytes]] = []

    def handle(request: Event, pieces: Incoming) -> None:
        for piece in pieces:
            view = memoryview(bytearray(2))
            if piece.name == "in part":
                piece.read_into(view)
            came.append((piece.name, piece.size, bytes(view) + piece.read()[: 10 * piece.size]))

    serving = Serving(pair[1], handle)
    serving.start()
    large = os.urandom(3 * upload.CHUNK_BYTES + 1)
    pair[0].upload(
        [
            Piece("empty", 0, []),
            Piece("in part", 5, [b"ab", b"", b"cde"]),
            Piece("large", len(large), [large[:7], large[7:]]),
        ]
    )
    serving.end()
    assert came == [
        ("empty", 0, b"\0\0"),
        ("in part", 5, b"abcde"),
        ("large", len(large), b"\0\0" + large),
    ]


@pytest.mark.parametrize("chunks", [[b"abcd"], [b"abc", b"d"], [b"ab"], []])
def test_a_piece_of_another_size_than_announced_is_an_error(
    pair: tuple[Transfer, Transfer], chunks: list[bytes]
) -> None:
    serving = Serving(pair[1], lambda request, pieces: [piece.read() for piece in pieces] and None)
    serving.start()
    with pytest.raises(OSError, match="announced"):
        pair[0].upload([Piece("file", 3, chunks)])
    pair[0].close()
    serving.end()
    assert "a test's transfer broke off" in serving.notes[0]


def test_the_sender_stops_when_the_driver_does_not_want_the_rest(
    pair: tuple[Transfer, Transfer],
) -> None:
    def handle(request: Event, pieces: Incoming) -> None:
        next(pieces)
        raise OSError("the disk is full")

    serving = Serving(pair[1], handle)
    serving.start()
    sent: list[int] = []

    def endless() -> Iterator[bytes]:
        while True:
            sent.append(upload.CHUNK_BYTES)
            yield bytes(upload.CHUNK_BYTES)

    with pytest.raises(OSError, match="the disk is full"):
        pair[0].upload([Piece("file", 1 << 60, endless())])
    pair[0].close()
    serving.end()


@pytest.mark.parametrize("ready", ["never", "go"])
def test_serving_a_task_that_is_gone_ends_without_an_error(
    pair: tuple[Transfer, Transfer], tmp_path: Path, ready: str
) -> None:
    task, driver = pair
    handler = CheckpointReceiver(CheckpointStore(tmp_path, keep=3)).handlers[UploadCheckpoint]
    serving = Serving(driver, handler.handle)
    if ready == "never":
        task._socket.shutdown(socket.SHUT_RD)
    serving.start()
    if ready == "go":
        task._expect(Go)
        task._socket.shutdown(socket.SHUT_RD)
        task.send(PieceFollows("../x/", 0))
    task.close()
    serving.end()
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_within_a_piece_breaks_off(pair: tuple[Transfer, Transfer]) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"ab"
        raise OSError("the disk is broken")

    serving = Serving(pair[1], lambda request, pieces: [Piece("file", 3, chunks())])
    serving.start()
    (piece, *_) = [next(pair[0].download())]
    serving.end()
    pair[1].close()
    with pytest.raises(ConnectionError):
        piece.read()
    assert serving.notes == ["a test's transfer broke off: the disk is broken"]


REQUESTS = [
    UploadResult("run-1", (3,)),
    UploadResult("run-1", ()),
    UploadFile("run-1", "HOROVOD_TIMELINE"),
    UploadCheckpoint("run-1", 1),
    FindCheckpoint("run-1"),
    FetchCheckpoint("run-1", 0),
]
"""One of each kind of transfer that there is."""


def encoded(event: Event) -> bytes:
    return b"".join(encode(event))


def piece(size: Any, name: str = "x", body_bytes: int = 0) -> bytes:
    """Announce a piece, whatever may be wrong with it."""
    header = json.dumps({"kind": "PieceFollows", "name": name, "size": size}).encode()
    return struct.pack(">IQ", len(header), body_bytes) + header


HOSTILE = {
    "noise": os.urandom(64),
    "zeros": bytes(64),
    "a large header": b"\xff" * 12,
    "a body": piece(1, body_bytes=1 << 40),
    "no JSON": struct.pack(">IQ", 3, 0) + b"{{{",
    "a list": struct.pack(">IQ", 2, 0) + b"[]",
    "deep": struct.pack(">IQ", 200_000, 0) + b"[" * 200_000,
    "another kind": encoded(Started(0)),
    "no name": struct.pack(">IQ", 24, 0) + b'{"kind": "PieceFollows"}',
    "a negative size": piece(-1),
    "a size that is text": piece("many"),
    "too large": piece(1 << 62),
    "a surrogate": piece(0, name="\udcff/\0"),
    "cut off": piece(3) + b"ab",
    "many": (piece(3) + b"abc") * 3 + encoded(End()),
    "the end": encoded(End()),
    "a failure": encoded(TransferFailed("x" * 1000)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("asked", REQUESTS, ids=str)
def test_whatever_a_peer_sends_the_driver_goes_on_and_keeps_nothing(
    driver: Driver, source: Path, asked: Event, content: bytes
) -> None:
    driver.backend().put(1, source)
    transfer = Transfer.open("127.0.0.1", driver.port, TOKEN)
    with contextlib.closing(transfer):
        transfer.send(asked)
        with contextlib.suppress(OSError):
            transfer._socket.sendall(content)
            transfer._socket.shutdown(socket.SHUT_WR)
            while transfer._socket.recv(1 << 20):
                pass
    wait_until(lambda: not transfer_threads())
    assert driver.incoming() == []
    assert stored_tree(driver, 1) == tree(source)
    assert driver.backend().find_latest()[1] == []


def test_a_commit_whose_answer_did_not_arrive_may_be_sent_again(
    driver: Driver, source: Path
) -> None:
    backend = driver.backend()
    place = backend.begin(4)
    part = backend.put_part(place, 0, pieces_of_tree(source))
    manifest = draft(4, [part], world_size=1)
    for _ in range(2):
        backend.commit(place, manifest)
    assert [each.step for each in driver.store.manifests()] == [4]
    with pytest.raises(OSError, match="KeyError"):
        backend.commit(backend.begin(5), manifest)
