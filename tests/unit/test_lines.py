"""Bytes to lines."""

import io
import random
import re
import time
from collections.abc import Callable

import psutil
import pytest
from tqdm import tqdm

from horovodrunner.flows.logs.lines import (
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
    assert assemble(chunks) == "one\n\ntwo\nzähler 20%\n\nlast without end\n".encode()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tqdm_alone(out: Terminal) -> None:
    for i in tqdm(range(20), file=out, mininterval=0):
        if i % 7 == 0:
            tqdm.write(f"written {i}", file=out)
    print("after", file=out)


def tqdm_nested(out: Terminal) -> None:
    for epoch in tqdm(range(2), file=out, mininterval=0, desc="outer"):
        for i in tqdm(range(3), file=out, mininterval=0, leave=False):
            tqdm.write(f"written {epoch} {i}", file=out)
        print("after inner", file=out)


def tqdm_with_positions(out: Terminal) -> None:
    bars = [tqdm(total=5, file=out, mininterval=0, position=k, desc=f"bar {k}") for k in range(3)]
    for _ in range(5):
        for bar in bars:
            bar.update()
    for bar in bars:
        bar.close()
    print("after", file=out)


def rich_bars(out: Terminal) -> None:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=out, force_terminal=True, width=80)
    with Progress(console=console, auto_refresh=False) as progress:
        bars = [progress.add_task(f"bar {k}", total=5) for k in range(3)]
        for i in range(5):
            for bar in bars:
                progress.update(bar, advance=1)
            progress.refresh()
            if i == 2:
                console.print("a message")
    print("after", file=out)


def keras_bar(out: Terminal) -> None:
    """As Keras 2 and 3 draw it, who write to sys.stdout alone."""
    for i in range(20):
        bar = f"\x1b[1m{i + 1}/20\x1b[0m - loss: 0.1"
        print("\b" * len(bar) * (i > 0) + "\r" + bar, end="", file=out)
    print(file=out)
    print("after", file=out)


@pytest.mark.parametrize(
    ("draw", "lines"),
    [
        (tqdm_alone, ["written 0", "written 7", "written 14", "100%.* 20/20.*", "after"]),
        (
            tqdm_nested,
            [
                "outer: *0%.*",
                *(f"written 0 {i}" for i in range(3)),
                "after inner",
                *(f"written 1 {i}" for i in range(3)),
                "after inner",
                "outer: 100%.* 2/2.*",
            ],
        ),
        (
            tqdm_with_positions,
            # that of the first bar before there is another one
            ["bar 0: *0%.*", *(f"bar {k}: 100%.*" for k in range(3)), "after"],
        ),
        (
            rich_bars,
            [
                "bar 0 .*  0%.*",
                "a message",
                *(f"bar {k} .*100%.*" for k in range(3)),
                ".*after",
            ],
        ),
        (keras_bar, [".*20/20.* - loss: 0.1", "after"]),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 100_000])
def test_of_a_bar_the_last_state_is_a_line(
    draw: Callable[[Terminal], None], lines: list[str], size: int
) -> None:
    out = Terminal()
    draw(out)
    text = out.getvalue().encode()
    shown = assemble([text[i : i + size] for i in range(0, len(text), size)]).decode().splitlines()
    assert len(shown) == len(lines), shown
    for line, pattern in zip(shown, lines, strict=True):
        assert re.fullmatch(pattern, line)


def test_an_incomplete_line_waits() -> None:
    lines = LineAssembler()
    assert lines.feed(b"half") == b""
    assert lines.feed(b" done\nnext") == b"half done\n"
    assert lines.close() == b"next\n"
    assert lines.close() == b""


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (b"a\r\nb\r\r\n\r\n\n", b"a\nb\n\n\n"),
        (b"print(end='\\r')\r 1\r 2\r", b" 2\n"),
        (b"busy |\b/\b-\b\\\bdone\n", b"busy done\n"),
        ("zähl\b\b\bö\n".encode(), "zö\n".encode()),
        (b"1%\x1b[1000D2%\x1b[1000D3%", b"3%\n"),
        (b"\x1b[2K\x1b[1G1%\x1b[2K\x1b[1G2%", b"2%\n"),
        (b"\r99%\r    \r", b"99%\n"),  # wiped at the end, as by tqdm(leave=False)
        (b"\r99%\r    \rafter\n", b"after\n"),
        (b"1 of 9\rerror: no space\nleft", b"error: no space\nleft\n"),
        (b"\r50%print\n\r51%", b"50%print\n51%\n"),
        (b"\x1b[31m\x1b[Kred\x1b[m\x1b[K rest\n", b"\x1b[31m\x1b[Kred\x1b[m\x1b[K rest\n"),
        (b"a 1\nb 1\n\x1b[2Aa 2\nb 2\n", b"a 1\nb 1\na 2\nb 2\n"),
        (b"\r1%\xff\r2%\xff", b"2%\xff\n"),
        (b"cut \x1b[", b"cut \x1b[\n"),
        (b"\x1b[999A" * 99 + b"\rx", b"x\n"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_what_is_overwritten_is_left_out(text: bytes, lines: bytes, size: int) -> None:
    assert assemble([text[i : i + size] for i in range(0, len(text), size)]) == lines


def test_states_are_given_out_once_and_whole_characters_only() -> None:
    lines = LineAssembler()
    assert lines.feed(b"no state yet") == b""
    assert lines.take_states() == b""
    assert lines.feed("\r10% ä".encode()[:-1]) == b""
    assert lines.take_states() == b"10% \n"
    assert lines.take_states() == b""
    assert lines.feed("ä".encode()[-1:]) == b""
    assert lines.take_states() == "10% ä\n".encode()
    assert lines.feed("\r10% ä\r".encode()) == b""
    assert lines.take_states() == b""
    assert lines.feed(b"\n") == b""  # it has been shown
    assert lines.feed(b"next\n") == b"next\n"
    assert lines.close() == b""


def test_lines_and_states_do_not_pass_each_other() -> None:
    lines = LineAssembler()
    assert lines.feed(b"\rbar 0: 1%\n\rbar 1: 1%\x1b[A\rbar 0: 100%") == b"bar 0: 1%\n"
    assert lines.feed(b"\nprinted\n") == b"bar 0: 100%\nprinted\n"


def test_states_beyond_measure_stay_in_bounded_memory() -> None:
    lines = LineAssembler(max_line_bytes=100)
    for i in range(1000):
        lines.feed(b"\x1b[A" + b"\r%d %b" % (i, b"x" * 90))
        lines.feed(b"\n\n\r" + b"y" * 90)
    assert sum(len(row.text + row.state + row.shown) for row in lines._rows) < 64 * 400


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


def test_128_mebibytes_without_a_newline_pass_in_bounded_memory() -> None:
    process = psutil.Process()
    lines = LineAssembler()
    chunk = "é".encode() * 32 * 1024
    before, most, given = process.memory_info().rss, 0, 0
    for count in range(2 * 1024):
        given += lines.feed(chunk).replace(CUT_MARK + b"\n", b"").count(b"\xc3\xa9")
        if count % 128 == 0:
            most = max(most, process.memory_info().rss)
    given += lines.close().count(b"\xc3\xa9")
    assert given == 2 * 1024 * 32 * 1024
    assert most - before < 32 * 1024 * 1024


def growth(work: Callable[[int], object], size: int) -> float:
    """Return how many times as long four times the work takes."""
    times = []
    for each in (size, 4 * size):
        started = time.process_time()
        work(each)
        times.append(time.process_time() - started)
    return times[1] / times[0]


def test_one_byte_at_a_time_does_not_copy_the_line_each_time() -> None:
    def feed(count: int) -> None:
        lines = LineAssembler(max_line_bytes=2**20)
        given = b"".join(lines.feed(b".") for _ in range(count)) + lines.close()
        assert given == b"." * count + b"\n"

    assert growth(feed, 60_000) < 8


def test_one_large_chunk_is_cut_in_linear_time() -> None:
    def feed(count: int) -> None:
        assert LineAssembler().feed(b"x" * count).count(CUT_MARK) == count // 2**18 - 1

    assert growth(feed, 2**23) < 8


def test_a_mark_that_is_dropped_counts_as_the_lines_it_stands_for() -> None:
    """Lines may be dropped on several parts of their way."""
    first = prefix_lines(b"a\n" + missing_mark(1000, "slow") + b"b\n", 1, "stdout")
    second = missing_mark(count_lines(first), "slow")
    assert second == b"HorovodRunner: 1002 lines are missing here: slow\n"
    assert count_lines(second * 2) == 2004
