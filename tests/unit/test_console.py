"""What reaches the cell."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from horovodrunner import log_to_driver
from horovodrunner.flows.logs import driver as console_module
from horovodrunner.flows.logs import showing
from horovodrunner.flows.logs.driver import Console
from horovodrunner.wire.events import Lines, Message
from tests import processes
from tests.waiting import wait_until


def test_everything_taken_is_printed_in_order_by_the_thread_that_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console()
    console.note("hello")

    def produce() -> None:
        console.lines(b"[0]<stdout>:a\n")
        console.message("m")
        console.wake()

    thread = threading.Thread(target=produce)
    thread.start()
    assert console.show(timeout=10)
    thread.join()
    assert capsys.readouterr().out == "HorovodRunner: hello\n[0]<stdout>:a\nm\n"


def test_output_that_is_only_kept_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(shows_lines=False)
    for event in (Lines(0, "stdout", b"printed\n"), Message(0, "sent")):
        console.handlers[type(event)](event)
    console.show(timeout=0)
    assert capsys.readouterr().out == "sent\n"


def test_show_returns_when_its_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.lines(b"x\n")
    assert not console.show(timeout=0)
    assert capsys.readouterr().out == "x\n"


def test_bytes_that_are_not_utf8_are_shown_as_replacements(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console()
    console.lines(b"caf\xc3\xa9 \xff\n")
    console.show(timeout=0)
    assert capsys.readouterr().out == "café �\n"


def test_what_nobody_prints_is_bounded_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console_module, "MAX_WAITING_BYTES", 1000)
    console = Console()
    for _ in range(500):
        console.lines(b"123456789\n" * 2)
    assert console._waiting_bytes < 1100
    console.show(timeout=0)
    shown = capsys.readouterr().out
    missing = 1000 - shown.count("123456789\n")
    assert f"{missing} lines are missing here" in shown


def test_the_mark_names_an_executors_log_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console_module, "MAX_WAITING_BYTES", 0)
    for there_is_one in (True, False):
        console = Console(executors_have_lines=there_is_one)
        console.lines(b"shown\n")
        console.lines(b"dropped\n")
        console.show(timeout=0)
        assert ("executor" in capsys.readouterr().out) == there_is_one


def encoded(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


class Listed:
    """What a notebook may have put in the place of the stream: it has nothing but write()."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def write(self, text: str) -> None:
        self.texts.append(text)


def broken(*_: Any) -> NoReturn:
    raise RuntimeError("this stream is the user's")


class Terminal(Listed):
    isatty = broken


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def terminal_is_gone() -> Any:
    stream = Listed()
    stream.write = broken  # type: ignore[method-assign, assignment]
    return stream


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "\\xe9 \\u258f \\ufffd"),
        ("latin-1", "é \\u258f \\ufffd"),
        ("cp1251", "\\xe9 \\u258f \\ufffd"),
        ("utf-16", "é \u258f \ufffd"),
    ],
)
def test_what_the_streams_encoding_lacks_is_shown_as_escapes(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    stream = encoded(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    console = Console()
    console.message("é \u258f \ufffd")
    console.show(timeout=0)
    log_to_driver("é \u258f \ufffd")  # outside a run: here
    written = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert written == f"{shown}\n" * 2


def test_a_stream_without_an_encoding_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    below = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", codecs.getwriter("ascii")(below))
    assert not showing.show_text("é\n")
    assert below.getvalue() == b"\\xe9\n"


@pytest.mark.parametrize("kind", [Listed, Terminal])
def test_write_is_all_that_a_stream_needs(
    monkeypatch: pytest.MonkeyPatch, kind: type[Listed]
) -> None:
    stream = kind()
    monkeypatch.setattr(sys, "stdout", stream)
    console = Console()
    console.note("é")
    console.show(timeout=0)
    assert stream.texts == ["HorovodRunner: é\n"]


@pytest.mark.parametrize("make", [object, lambda: None, io.BytesIO, closed, terminal_is_gone])
def test_what_cannot_be_shown_ends_nothing_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    errors = Listed()
    monkeypatch.setattr(sys, "stdout", make())
    monkeypatch.setattr(sys, "stderr", errors)
    console = Console()
    for _ in range(2):
        console.note("hello")
        console.show(timeout=0)
    (told,) = errors.texts
    assert told.startswith("HorovodRunner: nothing can be written to sys.stdout (")
    assert "Error: " in told  # and why
    monkeypatch.setattr(sys, "stderr", object())
    Console().note("hello")
    console.show(timeout=0)


def test_a_pipe_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as raw:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=True))
        assert showing.show_text("hello\n") == "BrokenPipeError: [Errno 32] Broken pipe"


def test_a_warning_that_cannot_be_shown_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warnings.showwarning", broken)
    monkeypatch.setattr("warnings._showwarnmsg_impl", broken)
    with pytest.warns(UserWarning, match="large"):  # recorded, not shown
        showing.warn("large")
    with pytest.raises(UserWarning, match="large"):  # the filters say so
        showing.warn("large")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        showing.warn("large")


INTERRUPTS = """
import random, signal, threading
from horovodrunner.flows.logs.driver import Console

console = Console()
signal.signal(signal.SIGALRM, signal.default_int_handler)
for _ in range(3000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-5))
        while True:
            console.show(timeout=1e-5)
    except KeyboardInterrupt:
        waking = threading.Thread(target=console.wake)
        waking.start()
        waking.join()  # for ever, if what was interrupted holds a lock
        assert console.show()
"""


def test_an_interrupt_at_any_place_leaves_nothing_locked() -> None:
    assert processes.run([sys.executable, "-c", INTERRUPTS]).returncode == 0


def test_an_interrupt_that_another_thread_takes_for_the_main_one_is_met() -> None:
    """The kernel may give it to any thread, and it may come just before the wait begins."""
    console = Console()
    main_thread = threading.main_thread()

    def waits() -> bool:
        frame = sys._current_frames()[main_thread.ident or 0]
        return frame.f_code.co_name == "_wait_for_change"

    def interrupt() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        wait_until(waits)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            console.show()
    finally:
        thread.join()
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
