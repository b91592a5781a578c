"""Bytes to lines."""

import random
import time

import psutil
import pytest

from horovodrunner.core.lines import (
    CUT_MARK,
    LineAssembler,
    count_lines,
    missing_mark,
    prefix_lines,
)


def assemble(chunks: list[bytes], max_line_bytes: int = 1000) -> bytes:
    lines = LineAssembler(max_line_bytes)
    return b"".join([*(lines.feed(chunk) for chunk in chunks), lines.close()])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_do_not_depend_on_how_the_bytes_are_chunked(size: int) -> None:
    text = "one\n\ntwo\r\nzähler 10%\rzähler 20%\r\n\nlast without end".encode()
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    assert assemble(chunks) == "one\n\ntwo\nzähler 10%\nzähler 20%\n\nlast without end\n".encode()


def test_an_incomplete_line_waits() -> None:
    lines = LineAssembler()
    assert lines.feed(b"half") == b""
    assert lines.feed(b" done\nnext") == b"half done\n"
    assert lines.close() == b"next\n"
    assert lines.close() == b""


def test_a_line_without_end_is_cut_and_memory_stays_bounded() -> None:
    lines = LineAssembler(max_line_bytes=100)
    given = b"".join(lines.feed(b"x" * 64) for _ in range(100))
    assert len(lines._rest) <= 164
    whole = given + lines.close()
    assert whole.count(b"x") == 6400
    assert all(len(line) <= 100 + len(CUT_MARK) for line in whole.split(b"\n"))
    assert CUT_MARK in whole


def test_every_line_gets_the_prefix_of_its_rank() -> None:
    assert (
        prefix_lines(b"a\n\nb\n", 12, "stderr")
        == b"[12]<stderr>:a\n[12]<stderr>:\n[12]<stderr>:b\n"
    )


def test_lines_without_an_end_or_without_bytes_are_prefixed_whole() -> None:
    assert prefix_lines(b"cut off", 0, "stdout") == b"[0]<stdout>:cut off\n"
    assert prefix_lines(b"", 0, "stdout") == b""


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("shift", range(4))
def test_a_long_line_is_not_cut_inside_a_character(character: str, size: int, shift: int) -> None:
    text = ("x" * shift + character * 250).encode()
    whole = assemble([text[i : i + size] for i in range(0, len(text), size)], max_line_bytes=30)
    pieces = [line.removesuffix(CUT_MARK) for line in whole.split(b"\n")]
    assert b"".join(pieces) == text
    for piece in pieces:
        piece.decode()
    assert {len(piece) for piece in pieces[:-2]} <= {27, 28, 29, 30}


@pytest.mark.parametrize(
    "text",
    [
        b"\x80" * 100,  # no character's first byte
        b"\xff" * 100,
        b"\xe2\x82" * 50,  # begins a character of three bytes, and does not end it
        b"x" * 9 + b"\xe2" + b"y" * 90,
        b"x" * 9 + b"\xe0" + b"\x80" * 90,  # longer than UTF-8 allows for it
    ],
)
def test_bytes_that_are_not_utf8_are_cut_where_the_limit_is(text: bytes) -> None:
    pieces = assemble([text], max_line_bytes=10).split(CUT_MARK + b"\n")
    assert [len(piece) for piece in pieces] == [10] * 9 + [11]


def test_any_bytes_pass_unchanged() -> None:
    chance = random.Random(7)
    for limit in (1, 2, 3, 4, 50):
        text = bytes(chance.choices(b"a\n\x80\xbf\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\xff\0", k=3000))
        chunks, at = [], 0
        while at < len(text):
            size = chance.randrange(1, 120)
            chunks.append(text[at : at + size])
            at += size
        whole = assemble(chunks, limit)
        assert whole.replace(CUT_MARK + b"\n", b"").rstrip(b"\n") == text.rstrip(b"\n")


def test_a_gigabyte_without_a_newline_passes_fast_in_bounded_memory() -> None:
    process = psutil.Process()
    lines = LineAssembler()
    chunk = "é".encode() * 32 * 1024
    before, most, given = process.memory_info().rss, 0, 0
    started = time.process_time()
    for count in range(16 * 1024):
        given += lines.feed(chunk).replace(CUT_MARK + b"\n", b"").count(b"\xc3\xa9")
        if count % 1024 == 0:
            most = max(most, process.memory_info().rss)
    used = time.process_time() - started
    given += lines.close().count(b"\xc3\xa9")
    assert given == 16 * 1024 * 32 * 1024
    assert most - before < 32 * 1024 * 1024
    assert used < 20  # seconds; about two, and most of them for the counting


def test_one_byte_at_a_time_does_not_copy_the_line_each_time() -> None:
    lines = LineAssembler(max_line_bytes=2**20)
    started = time.process_time()
    given = b"".join(lines.feed(b".") for _ in range(500_000)) + lines.close()
    assert given == b"." * 500_000 + b"\n"
    assert time.process_time() - started < 4  # seconds; half of one, but over ten with copying


def test_one_large_chunk_is_cut_in_linear_time() -> None:
    lines = LineAssembler()
    started = time.process_time()
    given = lines.feed(b"x" * 2**27)
    assert given.count(CUT_MARK) == 511
    assert time.process_time() - started < 5  # seconds; half of one, but 25 with copying


def test_a_mark_that_is_dropped_counts_as_the_lines_it_stands_for() -> None:
    """Lines may be dropped on several parts of their way."""
    first = prefix_lines(b"a\n" + missing_mark(1000, "slow") + b"b\n", 1, "stdout")
    second = missing_mark(count_lines(first), "slow")
    assert second == b"HorovodRunner: 1002 lines are missing here: slow\n"
    assert count_lines(second * 2) == 2004
