"""Bytes of a pipe to whole, rank-prefixed lines. Runs in: the task and the driver."""

from __future__ import annotations

import codecs
import re

__all__ = ["CUT_MARK", "LineAssembler", "count_lines", "missing_mark", "prefix_lines"]

CUT_MARK = b" ...(line cut)"

_MISSING = b" lines are missing here"
_MISSING_MARK = re.compile(rb"HorovodRunner: (\d+)" + _MISSING)


class LineAssembler:
    r"""Turns chunks of a byte stream into whole lines, in bounded memory.

    A carriage return ends a line as a newline does, so that progress bars are shown while they
    advance. A line longer than `max_line_bytes` is given out in pieces that end in `CUT_MARK`; it
    is not cut inside a UTF-8 character. All other bytes pass as they are, whatever they encode.

    Parameters
    ----------
    max_line_bytes
        Longest line, in bytes, that is kept while waiting for its end.

    Examples
    --------
    >>> lines = LineAssembler()
    >>> lines.feed(b"one\ntw")
    b'one\n'
    >>> lines.feed(b"o\r\nthree")
    b'two\n'
    >>> lines.close()
    b'three\n'
    """

    def __init__(self, max_line_bytes: int = 256 * 1024) -> None:
        self._max_line_bytes = max_line_bytes
        self._rest = bytearray()
        self._half_end = b""

    def feed(self, data: bytes) -> bytes:
        r"""Take the next bytes of the stream.

        Parameters
        ----------
        data
            Any bytes.

        Returns
        -------
        bytes
            The lines that are now complete, each ending in ``\n``; empty when there are none.
        """
        # Only the new bytes are searched and copied: the rest may be long, and data one byte.
        data = self._half_end + data
        self._half_end = b""
        if b"\r" in data:
            # A "\r" at the very end may be half of "\r\n": it waits for the next chunk.
            if data.endswith(b"\r"):
                data, self._half_end = data[:-1], b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        pieces: list[bytes | bytearray] = []
        if end := data.rfind(b"\n") + 1:
            pieces += [self._rest, data[:end]]
            self._rest = bytearray(data[end:])
        else:
            self._rest += data
        if len(self._rest) > self._max_line_bytes:
            pieces += self._cut()
        return b"".join(pieces)

    def _cut(self) -> list[bytes | bytearray]:
        pieces: list[bytes | bytearray] = []
        start = 0
        while len(self._rest) - start > self._max_line_bytes:
            end = _character_start(self._rest, start, start + self._max_line_bytes)
            pieces += [self._rest[start:end], CUT_MARK, b"\n"]
            start = end
        del self._rest[:start]
        return pieces

    def close(self) -> bytes:
        r"""Give out what is left when the stream ends.

        Returns
        -------
        bytes
            The last, unfinished line with a ``\n`` added, or nothing.
        """
        rest = bytes(self._rest)
        self._rest.clear()
        self._half_end = b""
        return rest + b"\n" if rest else b""


def _character_start(text: bytearray, start: int, end: int) -> int:
    """Find where to cut `text` at or up to 3 bytes before `end`, but after `start`."""
    for lead in range(end - 1, max(end - 4, start), -1):
        if text[lead] & 0xC0 == 0x80:
            continue  # not a character's first byte
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            if decoder.decode(text[lead:end]):
                return end  # it is complete
            for position in range(end, min(end + 3, len(text))):
                if decoder.decode(text[position : position + 1]):
                    break
        except UnicodeDecodeError:
            return end
        return lead
    return end


def prefix_lines(lines: bytes, rank: int, stream: str) -> bytes:
    r"""Put ``[rank]<stream>:`` before every line, as horovodrun does.

    Parameters
    ----------
    lines
        Whole lines, each ending in ``\n``.
    rank
        The rank that printed them.
    stream
        ``"stdout"`` or ``"stderr"``.

    Returns
    -------
    bytes
        The same lines, prefixed.

    Examples
    --------
    >>> prefix_lines(b"a\nb\n", 1, "stdout")
    b'[1]<stdout>:a\n[1]<stdout>:b\n'
    """
    if not lines:
        return b""
    prefix = f"[{rank}]<{stream}>:".encode()
    return prefix + lines.removesuffix(b"\n").replace(b"\n", b"\n" + prefix) + b"\n"


def missing_mark(count: int, why: str) -> bytes:
    r"""Give the line that stands for lines which were dropped.

    Parameters
    ----------
    count
        How many.
    why
        What dropped them, and where they are.

    Returns
    -------
    bytes
        One line.
    """
    return b"HorovodRunner: %d%b: %b\n" % (count, _MISSING, why.encode())


def count_lines(lines: bytes) -> int:
    r"""Count the lines that would be missing without these: a mark stands for those it counts.

    Parameters
    ----------
    lines
        Whole lines.

    Returns
    -------
    int
        How many.

    Examples
    --------
    >>> count_lines(b"a\nb\n" + missing_mark(40, "too fast"))
    42
    """
    count = lines.count(b"\n")
    if _MISSING in lines:
        marks = _MISSING_MARK.findall(lines)
        count += sum(map(int, marks)) - len(marks)
    return count
