"""A task's own log that is slow or stands still: real pipes."""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from horovodrunner.flows.logs import task as log_module
from horovodrunner.flows.logs.task import LineSender, TaskLog
from horovodrunner.wire.events import Event, Lines, Note

LINES = b"".join(b"%03d\n" % number for number in range(100))


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A pipe of one page, before a buffer of ten blocks of lines."""
    monkeypatch.setattr(log_module, "MAX_WAITING_BYTES", 10 * len(LINES))
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    yield read, write
    for fd in (read, write):
        os.close(fd)


def read_to(fd: int, mark: bytes) -> bytes:
    text = b""
    while mark not in text:
        text += os.read(fd, 4096)
    return text


def test_a_log_that_stands_still_holds_nobody_up_for_ever_and_counts_what_it_lost(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "PATIENCE_SECONDS", 0.05)
    log = TaskLog(pipe[1])
    for _ in range(1000):
        log.write(LINES)  # nobody reads: this thread could not, it is here
    assert log._waiting_bytes <= 11 * len(LINES)
    text = read_to(pipe[0], b"are missing here: this log stood still\n")
    missing = re.search(rb"HorovodRunner: (\d+) lines", text)
    assert missing
    assert len(re.findall(rb"^\d{3}$", text, re.MULTILINE)) + int(missing[1]) == 1000 * 100
    log.write(b"it moves again\n")
    log.close()
    assert text.endswith(b"still\n")
    assert os.read(pipe[0], 4096) == b"it moves again\n"


def test_a_log_that_is_merely_slow_loses_nothing(pipe: tuple[int, int]) -> None:
    text = b""

    def read_slowly() -> None:
        nonlocal text
        while b"end" not in text:
            text += os.read(pipe[0], 512)

    thread = threading.Thread(target=read_slowly)
    thread.start()
    log = TaskLog(pipe[1])
    for _ in range(1000):
        log.write(LINES)
    log.write(b"end\n")
    log.close()
    thread.join()
    assert text == LINES * 1000 + b"end\n"


def test_what_was_lost_at_the_end_is_counted_too(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "PATIENCE_SECONDS", 0.05)
    log = TaskLog(pipe[1])
    for _ in range(100):
        log.write(LINES)
    text = b""

    def read() -> None:
        nonlocal text
        text = read_to(pipe[0], b"still\n")

    thread = threading.Thread(target=read)
    closing = threading.Thread(target=log.close)
    closing.start()
    thread.start()
    closing.join()
    thread.join()
    assert text.count(b"\n") + sum(map(int, re.findall(rb"(\d+) lines are", text))) == 10_001


def test_a_log_that_is_closed_does_not_end_the_run() -> None:
    read, write = os.pipe()
    os.close(read)
    log = TaskLog(write)
    for _ in range(100):
        log.write(LINES)
    log.close()
    os.close(write)
    assert not log._thread.is_alive()


class SlowPeer:
    """A connection whose peer takes nothing until `unsent_bytes` is lowered."""

    def __init__(self) -> None:
        self.unsent_bytes = log_module.MAX_UNSENT_BYTES + 1
        self.sent: list[Event] = []
        self.send = self.sent.append


def test_lines_of_all_ranks_that_were_dropped_are_told_as_those_of_none() -> None:
    mark = "2 lines are missing here: the reader was too slow; the executor's log has them"
    last = Lines(1, "stderr", b"c\n")
    of_one_rank = Lines(1, "stdout", f"HorovodRunner: {mark}\n".encode())
    for of_all_ranks, told in ((True, Note(mark)), (False, of_one_rank)):
        peer: Any = SlowPeer()
        sender = LineSender(peer, of_all_ranks=of_all_ranks)
        sender.send(Lines(0, "stdout", b"a\n"))
        sender.send(Lines(1, "stdout", b"b\n"))
        peer.unsent_bytes = 0
        sender.send(last)
        assert peer.sent == [told, last]
