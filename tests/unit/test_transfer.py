"""Checkpoints travel between a task and the driver, over real sockets and the real channel."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from horovodrunner.flows.checkpoints import backend as depot_module
from horovodrunner.flows.checkpoints.backend import DriverDepot, serve_depot
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.store import CheckpointStore, IncomingCheckpoint
from horovodrunner.flows.logs.driver import Console
from horovodrunner.processes.driver.channel import DriverChannel
from horovodrunner.wire.bulk import BulkConnection
from horovodrunner.wire.connection import AuthenticationError
from horovodrunner.wire.job import JobSpec
from tests import processes
from tests.waiting import wait_until

TOKEN = b"t" * 32
MEGABYTE = 1_000_000


class GatedStore(CheckpointStore):
    """A store on a slow disk: nothing begins before the gate opens."""

    def __init__(self, location: Path) -> None:
        super().__init__(location, keep=3)
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()

    def begin(self, step: int) -> IncomingCheckpoint:
        self.reached.set()
        self.gate.wait(30)
        return super().begin(step)


@dataclass
class Driver:
    channel: DriverChannel
    console: Console
    store: GatedStore
    port: int

    def depot(self, token: bytes = TOKEN, run_id: str = "run-1") -> DriverDepot:
        return DriverDepot(JobSpec(run_id, 2, b"", token, driver_address=("127.0.0.1", self.port)))

    def request(self, operation: str, step: int) -> BulkConnection:
        """Open a connection and speak for a task by hand."""
        connection = BulkConnection.open("127.0.0.1", self.port, TOKEN, 10)
        connection.send("checkpoint", run_id="run-1", operation=operation, step=step)
        connection.expect("go")
        return connection

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
    with DriverChannel("run-1", TOKEN, console, console.wake, store=store) as channel:
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

    def __init__(self, depot: DriverDepot, step: int, directory: Path) -> None:
        super().__init__(daemon=True)
        self._call = (depot, step, directory)
        self.error: BaseException | None = None

    def run(self) -> None:
        depot, step, directory = self._call
        try:
            depot.put(step, directory)
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
    driver.depot().put(7, source)
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
    depot = driver.depot()
    depot.put(1, source)
    (source / "model.pt").write_bytes(b"newer")
    depot.put(2, source)
    manifest, damaged = depot.find_latest()
    assert manifest is not None
    assert (manifest.step, damaged) == (2, [])
    copy = tmp_path / "copy"
    copy.mkdir()
    depot.fetch(manifest, copy)
    assert tree(copy) == tree(source)


def test_a_large_file_comes_back_whole(driver: Driver, tmp_path: Path) -> None:
    content = os.urandom(50 * MEGABYTE)
    large, copy = tmp_path / "large", tmp_path / "copy"
    large.mkdir()
    copy.mkdir()
    (large / "model.pt").write_bytes(content)
    depot = driver.depot()
    depot.put(3, large)
    manifest, _ = depot.find_latest()
    assert manifest is not None
    depot.fetch(manifest, copy)
    assert (copy / "model.pt").read_bytes() == content


def test_an_empty_checkpoint_is_one(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    driver.depot().put(0, tmp_path / "nothing")
    assert driver.steps() == [0]


def test_without_a_checkpoint_there_is_no_latest(driver: Driver) -> None:
    assert driver.depot().find_latest() == (None, [])


def test_the_damaged_ones_on_the_driver_are_told_to_the_task(driver: Driver, source: Path) -> None:
    depot = driver.depot()
    depot.put(1, source)
    depot.put(2, source)
    flip_a_byte(Path(driver.store.path_of(2), "model.pt"))
    manifest, damaged = depot.find_latest()
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
    depot = driver.depot()
    depot.put(1, source)
    manifest, _ = depot.find_latest()
    assert manifest is not None
    flip_a_byte(Path(driver.store.path_of(1), "model.pt"))
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(OSError, match=r"model\.pt of the checkpoint of step 1 .* another SHA-256"):
        depot.fetch(manifest, copy)


def test_a_checkpoint_that_is_gone_cannot_be_fetched(
    driver: Driver, source: Path, tmp_path: Path
) -> None:
    depot = driver.depot()
    depot.put(1, source)
    manifest, _ = depot.find_latest()
    assert manifest is not None
    shutil.rmtree(driver.store.path_of(1))
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(OSError, match="no checkpoint of step 1 any more"):
        depot.fetch(manifest, copy)


def test_a_file_that_is_gone_breaks_the_fetch_off(
    driver: Driver, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    depot = driver.depot()
    depot.put(1, source)
    manifest, _ = depot.find_latest()
    assert manifest is not None
    Path(driver.store.path_of(1), "variables/deep/index").unlink()
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(OSError, match="closed the connection"):
        depot.fetch(manifest, copy)
    assert "transfer (fetch) broke off" in what_is_shown(driver, capsys, "broke off")


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
    driver.depot().put(1, source)
    stranger = driver.depot(token=b"w" * 32)
    for call in (lambda: stranger.put(2, source), stranger.find_latest):
        with pytest.raises(OSError, match=f"127.0.0.1:{driver.port} cannot be reached"):
            call()
    assert driver.steps() == [1]
    assert driver.incoming() == []


def test_another_run_gets_nothing(driver: Driver, source: Path) -> None:
    driver.depot().put(1, source)
    other = driver.depot(run_id="run-0")
    for call in (lambda: other.put(2, source), other.find_latest):
        with pytest.raises(ConnectionError):
            call()
    assert driver.steps() == [1]
    assert driver.incoming() == []


def test_a_driver_that_keeps_no_checkpoints_takes_none(source: Path) -> None:
    console = Console()
    with DriverChannel("run-1", TOKEN, console, console.wake) as channel:
        address = ("127.0.0.1", channel.open("127.0.0.1", 0))
        depot = DriverDepot(JobSpec("run-1", 2, b"", TOKEN, driver_address=address))
        with pytest.raises(ConnectionError):
            depot.put(1, source)


def test_a_task_that_dies_in_the_middle_of_a_file_leaves_nothing(
    driver: Driver, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.depot().put(1, source)
    connection = driver.request("put", 2)

    def one_piece_then_death() -> Iterator[bytes]:
        yield bytes(MEGABYTE)
        wait_until(driver.incoming)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        connection.send_body("file", 10 * MEGABYTE, one_piece_then_death(), path="model.pt")
    connection.close()
    assert "transfer (put) broke off" in what_is_shown(driver, capsys, "broke off")
    wait_until(lambda: not transfer_threads())
    assert driver.incoming() == []
    assert driver.steps() == [1]
    assert stored_tree(driver, 1) == tree(source)


MANY = {"model.pt": "0" * 64, "more.pt": "0" * 64}


@pytest.mark.parametrize("digests", [MANY, {}, {"model.pt": None}, {"model.pt": "0"}])
def test_every_file_that_arrived_needs_its_hash(driver: Driver, digests: dict[str, str]) -> None:
    with driver.request("put", 1) as connection:
        connection.send_body("file", 3, [b"abc"], path="model.pt")
        connection.send_bytes("end", json.dumps(digests).encode())
        with pytest.raises(OSError, match="hashes that came are not those of the files"):
            connection.expect("stored")
    assert driver.steps() == []
    assert driver.incoming() == []


def test_what_arrived_and_is_not_what_was_hashed_is_damaged(driver: Driver) -> None:
    with driver.request("put", 1) as connection:
        connection.send_body("file", 3, [b"abc"], path="model.pt")
        connection.send_bytes("end", json.dumps({"model.pt": "0" * 64}).encode())
        connection.expect("stored")
    found, damaged = driver.depot().find_latest()
    assert found is None
    assert "model.pt does not have the content that was saved" in damaged[0]


UNSAFE = ["../x", "a/../../x", "/tmp/horovodrunner-outside", "manifest.json", "", "a//b"]


@pytest.mark.parametrize("path", UNSAFE)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_nothing_is_written_outside(driver: Driver, kind: str, path: str, tmp_path: Path) -> None:
    with driver.request("put", 1) as connection:
        if kind == "file":
            connection.send_body("file", 3, [b"abc"], path=path)
        else:
            connection.send("directory", path=path)
        with pytest.raises(OSError, match="ValueError: the path"):
            connection.expect("stored")
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
        depot = DriverDepot(JobSpec("run-1", 2, b"", TOKEN, driver_address=address))
        depot.put(1, source)
        with pytest.raises(OSError, match="File too large") as caught:
            depot.put(2, large_directory(tmp_path, 500 * MEGABYTE))
        assert not isinstance(caught.value, ConnectionError)  # trying again would not help
        depot.put(3, source)
        driver.stdin.close()
        assert driver.wait() == 0
    assert sorted(path.name for path in location.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_location_that_vanishes_in_the_middle_is_told(driver: Driver) -> None:
    connection = driver.request("put", 1)
    with connection:
        connection.send_body("file", 3, [b"abc"], path="first")
        wait_until(lambda: list(driver.location.glob(".incoming-*/first")))
        shutil.rmtree(driver.location)
        driver.location.write_text("a file in its place")
        connection.send_body("file", 3, [b"abc"], path="second")
        with pytest.raises(OSError, match="NotADirectoryError: .*" + str(driver.location)):
            connection.expect("stored")
    assert driver.location.read_text() == "a file in its place"


def test_a_source_that_cannot_be_read_leaves_nothing(driver: Driver, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        driver.depot().put(1, tmp_path / "never written")
    assert driver.steps() == []
    assert driver.incoming() == []


def test_a_file_that_shrinks_while_it_is_sent_is_told_at_once(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depot_module, "SILENCE_SECONDS", 3.0)
    large = large_directory(tmp_path, 100 * MEGABYTE)
    driver.store.gate.clear()
    putting = Putting(driver.depot(), 1, large)
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
    depot = driver.depot()
    large = large_directory(tmp_path, 100 * MEGABYTE)
    putting = Putting(depot, 1, large)
    putting.start()
    wait_until(lambda: waits_in_the_middle_of(large / "zeros"))
    depot.abort()
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
    depot = driver.depot()
    large = large_directory(tmp_path, 100_000 * MEGABYTE)
    putting = Putting(depot, 1, large)
    putting.start()
    wait_until(lambda: read_so_far(large / "zeros"))
    depot.abort()
    error = putting.wait_for_error(3)
    wait_until(lambda: not transfer_threads())
    assert isinstance(error, OSError), repr(error)
    assert driver.steps() == []
    assert driver.incoming() == []


def test_after_abort_nothing_begins(driver: Driver, source: Path) -> None:
    depot = driver.depot()
    depot.abort()
    with pytest.raises(ConnectionAbortedError, match="the run has ended"):
        depot.put(1, source)


def test_closing_the_channel_ends_a_transfer_that_waits(driver: Driver) -> None:
    with driver.request("put", 1) as connection:
        connection.send_body("file", 3, [b"abc"], path="first")
        wait_until(lambda: list(driver.location.glob(".incoming-*/first")))
        assert transfer_threads()
        driver.channel.close()
        assert transfer_threads() == []
        with pytest.raises(ConnectionError):
            connection.expect("stored")
    assert driver.incoming() == []
    assert driver.steps() == []


def test_closing_the_channel_ends_a_transfer_that_runs(driver: Driver, tmp_path: Path) -> None:
    putting = Putting(driver.depot(), 1, large_directory(tmp_path, 100_000 * MEGABYTE))
    putting.start()
    wait_until(lambda: list(driver.location.glob(".incoming-*/zeros")))
    driver.channel.close()
    assert transfer_threads() == []
    assert isinstance(putting.wait_for_error(5), OSError)
    assert driver.incoming() == []
    assert driver.steps() == []


def test_checkpoints_travel_beside_each_other(driver: Driver, source: Path, tmp_path: Path) -> None:
    """Every host fetches at the start, and a put may be under way."""
    driver.depot().put(1, source)
    manifest, _ = driver.depot().find_latest()
    assert manifest is not None
    errors: list[BaseException] = []

    def fetch(directory: Path, manifest: Manifest) -> None:
        directory.mkdir()
        try:
            driver.depot().fetch(manifest, directory)
        except BaseException as error:
            errors.append(error)

    copies = [tmp_path / f"copy-{number}" for number in range(4)]
    threads = [threading.Thread(target=fetch, args=(copy, manifest)) for copy in copies]
    putting = Putting(driver.depot(), 2, source)
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
        depot = driver.depot()
        depot.put(1, source)
        manifest, _ = depot.find_latest()
        assert manifest is not None
        depot.fetch(manifest, copy)
    assert tree(copy) == tree(source)


def test_a_driver_that_is_gone_is_named(source: Path) -> None:
    with socket.socket() as keeper:
        keeper.bind(("127.0.0.1", 0))  # bound, not listening
        port = keeper.getsockname()[1]
        depot = DriverDepot(JobSpec("run-1", 2, b"", TOKEN, driver_address=("127.0.0.1", port)))
        with pytest.raises(ConnectionError, match=f"the driver at 127.0.0.1:{port} cannot be"):
            depot.put(1, source)


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
            BulkConnection.open("127.0.0.1", server.getsockname()[1], TOKEN, 5)
        thread.join()


def test_a_server_that_says_nothing_is_given_up() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(TimeoutError),
    ):
        BulkConnection.open("127.0.0.1", server.getsockname()[1], TOKEN, 0.2)


@pytest.fixture
def pair() -> Iterator[tuple[BulkConnection, BulkConnection]]:
    one, other = (BulkConnection(end, 5) for end in socket.socketpair())
    with one, other:
        yield one, other


def test_frames_and_bodies_follow_each_other(pair: tuple[BulkConnection, BulkConnection]) -> None:
    one, other = pair
    one.send("first", number=3)
    one.send_body("second", 5, [b"ab", b"", b"cde"], path="x")
    one.send("third")
    assert other.receive() == ({"kind": "first", "number": 3}, 0)
    header, size = other.receive()
    assert header == {"kind": "second", "path": "x"}
    assert b"".join(bytes(piece) for piece in other.body(size)) == b"abcde"
    assert other.expect("third") == ({"kind": "third"}, 0)


@pytest.mark.parametrize("pieces", [[b"abcd"], [b"abc", b"d"], [b"ab"], []])
def test_a_body_of_another_size_than_announced_is_an_error(
    pair: tuple[BulkConnection, BulkConnection], pieces: list[bytes]
) -> None:
    with pytest.raises(OSError, match="announced"):
        pair[0].send_body("file", 3, pieces)


def test_the_sender_stops_when_the_peer_has_something_to_say(
    pair: tuple[BulkConnection, BulkConnection],
) -> None:
    one, other = pair
    other.send("failed", why="the disk is full")
    with pytest.raises(ConnectionError, match="does not want the rest"):
        one.send_body("file", 3, [b"abc"])
    with pytest.raises(OSError, match="the disk is full"):
        one.expect("stored")


@pytest.mark.parametrize("listens_until", ["never", "go"])
def test_serving_a_task_that_is_gone_ends_without_an_error(
    pair: tuple[BulkConnection, BulkConnection], tmp_path: Path, listens_until: str
) -> None:
    """An error would be a traceback of a thread's in the user's notebook."""
    task, driver = pair
    store = CheckpointStore(tmp_path, keep=3)
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            serve_depot(driver, {"operation": "put", "step": 1}, store, lambda text: None)
        except BaseException as error:
            errors.append(error)

    if listens_until == "never":
        task._socket.shutdown(socket.SHUT_RD)
    thread = threading.Thread(target=serve)
    thread.start()
    if listens_until == "go":
        task.expect("go")
        task._socket.shutdown(socket.SHUT_RD)
        task.send("directory", path="../x")
    task.close()
    thread.join(10)
    assert errors == []
