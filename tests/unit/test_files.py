"""Files that Horovod writes come to the driver: whole, in one step, and each attempt's own."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import ConfigurationError
from horovodrunner.flows.artifacts import task as module
from horovodrunner.flows.artifacts.driver import BroughtFiles, copy_file
from horovodrunner.flows.artifacts.task import upload_file
from horovodrunner.flows.logs.driver import Console
from horovodrunner.processes.driver.channel import DriverChannel
from horovodrunner.wire.upload import TransferClient, chunks_of

TOKEN = b"t" * 32
EVENT = '{"ph": "B", "name": "ALLREDUCE", "ts": 1, "pid": 1}'
TIMELINE, LOG = "HOROVOD_TIMELINE", "HOROVOD_AUTOTUNE_LOG"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """What Horovod wrote in the task's directory."""
    path = tmp_path / "scratch"
    path.write_text(f"[\n{EVENT},{EVENT}")
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Where the user wants files."""
    path = tmp_path / "kept"
    path.mkdir()
    return path


class Driver:
    """The driver's end of the channel, and a task's."""

    def __init__(self, channel: DriverChannel, files: BroughtFiles, console: Console) -> None:
        port = channel.open("127.0.0.1", 0)
        client = TransferClient("run-1", TOKEN, ("127.0.0.1", port))
        self.upload = functools.partial(upload_file, client)
        self.files = files
        self.console = console


@pytest.fixture
def driver(kept: Path) -> Iterator[Driver]:
    files, console = BroughtFiles({TIMELINE: str(kept / "t.json")}), Console()
    with DriverChannel("run-1", TOKEN, console, console.wake, files=files) as channel:
        yield Driver(channel, files, console)


def test_a_task_sends_its_file_and_the_driver_completes_it(
    driver: Driver, written: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.upload(TIMELINE, written)
    assert json.loads((kept / "t.json").read_text()) == [json.loads(EVENT)] * 2
    assert [path.name for path in kept.iterdir()] == ["t.json"]
    assert driver.files.missing() == ""
    driver.console.show(0)
    assert f"timeline: 2 events in {kept}/t.json\n" in capsys.readouterr().out


def test_a_missing_file_makes_an_empty_timeline_and_says_why(
    driver: Driver, tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept / "t.json").write_text("of a run before")
    driver.upload(TIMELINE, tmp_path / "none")
    assert json.loads((kept / "t.json").read_text()) == []
    driver.console.show(0)
    assert "t.json: hvd.init() was not called on rank 0" in capsys.readouterr().out


def test_what_the_driver_cannot_store_is_said_to_the_task(
    driver: Driver, written: Path, kept: Path
) -> None:
    kept.rmdir()
    with pytest.raises(OSError, match=r"FileNotFoundError: .*kept"):
        driver.upload(TIMELINE, written)
    assert "t.json" in driver.files.missing()


def test_only_files_that_the_user_asked_for_are_taken(
    driver: Driver, written: Path, kept: Path
) -> None:
    with pytest.raises(OSError, match="HOROVOD_AUTOTUNE_LOG"):
        driver.upload(LOG, written)
    assert list(kept.iterdir()) == []


def test_a_transfer_that_breaks_off_leaves_what_was_there(written: Path, kept: Path) -> None:
    target = kept / "t.json"
    target.write_text("[]")
    files = BroughtFiles({TIMELINE: str(target)})

    def broken() -> Iterator[bytes]:
        yield written.read_bytes()
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        files.take(TIMELINE, broken())
    assert [(path.name, path.read_text()) for path in kept.iterdir()] == [("t.json", "[]")]
    assert str(target) in files.missing()


def test_a_file_that_still_grows_is_sent_as_it_was(
    driver: Driver, written: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def growing(*arguments: Any) -> Iterator[memoryview]:
        with written.open("a") as target:
            target.write(f",{EVENT}")
        yield from chunks_of(*arguments)

    monkeypatch.setattr(module, "chunks_of", growing)
    driver.upload(TIMELINE, written)
    assert len(json.loads((kept / "t.json").read_text())) == 2


def test_each_attempt_has_a_file_of_its_own(written: Path, kept: Path) -> None:
    target = kept / "run.of.may.json"
    target.write_text("of a run before")
    notes: list[str] = []
    files = BroughtFiles({TIMELINE: str(target)})
    files.begin(1)
    assert target.read_text() == "of a run before"
    copy_file(files, notes.append, TIMELINE, written)
    files.begin(2)  # whose rank 0 is lost, with its file
    files.begin(3)
    written.write_text("[")
    copy_file(files, notes.append, TIMELINE, written)
    assert len(json.loads((kept / "run.of.may.attempt-1.json").read_text())) == 2
    assert json.loads(target.read_text()) == []
    assert sorted(path.name for path in kept.iterdir()) == [
        "run.of.may.attempt-1.json",
        "run.of.may.json",
    ]
    assert "no collective operation of Horovod's began" in notes[-1]


def test_the_autotune_log_comes_as_it_is(written: Path, kept: Path) -> None:
    files = BroughtFiles({LOG: str(kept / "log.csv"), TIMELINE: ""})
    assert files.variables == (LOG,)
    assert "HOROVOD_AUTOTUNE is not 1" in files.take(LOG, None)
    assert list(kept.iterdir()) == []
    copy_file(files, lambda text: None, LOG, written)
    assert (kept / "log.csv").read_bytes() == written.read_bytes()


def test_a_link_stays_one(written: Path, kept: Path) -> None:
    (kept / "link").symlink_to(kept / "real.json")
    files = BroughtFiles({TIMELINE: str(kept / "link")})
    copy_file(files, lambda text: None, TIMELINE, written)
    assert (kept / "link").is_symlink()
    assert len(json.loads((kept / "real.json").read_text())) == 2


@pytest.mark.parametrize("value", ["", "DYNAMIC"])
def test_a_timeline_that_main_starts_itself_is_left_alone(value: str) -> None:
    assert BroughtFiles({TIMELINE: value}).variables == ()


def test_a_relative_path_is_the_drivers(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kept)
    files = BroughtFiles({TIMELINE: "t.json"})
    monkeypatch.chdir("/")
    assert f"{TIMELINE}={kept}/t.json" in files.missing()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("s3://bucket/t.json", "not a URL"),
        ("{kept}/no/t.json", "no directory {kept}/no on the driver"),
        ("{kept}", "it is not a file; name one, such as {kept}.json"),
        ("/dev/null", "it is not a file"),
    ],
)
def test_where_no_file_can_be_put_is_refused(kept: Path, value: str, text: str) -> None:
    value = value.format(kept=kept)
    with pytest.raises(ConfigurationError) as caught:
        BroughtFiles({TIMELINE: value})
    assert f"HOROVOD_TIMELINE={value!r}: " in str(caught.value)
    assert text.format(kept=kept) in str(caught.value)


def test_a_directory_that_cannot_be_written_to_is_refused(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ConfigurationError, match="cannot be written to"):
        BroughtFiles({TIMELINE: str(kept / "t.json")})
