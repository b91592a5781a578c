"""What reaches the cell."""

from __future__ import annotations

import threading

import pytest

from horovodrunner.driver import console as console_module
from horovodrunner.driver.console import Console


def test_everything_taken_is_printed_in_order_by_the_thread_that_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console()
    console.note("hello")

    def produce() -> None:
        console.lines(b"[0]<stdout>:a\n")
        console.message(0, b"m")
        console.wake()

    thread = threading.Thread(target=produce)
    thread.start()
    assert console.show(timeout=10)
    thread.join()
    assert capsys.readouterr().out == "HorovodRunner: hello\n[0]<stdout>:a\nm\n"


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
    for _ in range(1000):
        console.lines(b"123456789\n")
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
