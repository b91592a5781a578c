"""Bytes to lines."""

import pytest

from horovodrunner.core.lines import CUT_MARK, LineAssembler, prefix_lines


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
