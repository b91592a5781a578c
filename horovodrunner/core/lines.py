"""Bytes of a pipe to whole, rank-prefixed lines. Runs in: the task and the driver."""

from __future__ import annotations

__all__ = ["CUT_MARK", "LineAssembler", "prefix_lines"]

CUT_MARK = b" ...(line cut)"


class LineAssembler:
    r"""Turns chunks of a byte stream into whole lines, in bounded memory.

    A carriage return ends a line as a newline does, so that progress bars are shown while they
    advance. A line longer than `max_line_bytes` is given out in pieces that end in `CUT_MARK`.

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
        self._rest = b""

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
        data = self._rest + data
        if b"\r" in data:
            # A "\r" at the very end may be half of "\r\n": it waits for the next chunk.
            held = b"\r" if data.endswith(b"\r") else b""
            data = (
                data[: len(data) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
            )
        end = data.rfind(b"\n") + 1
        complete, rest = data[:end], data[end:]
        pieces = [complete]
        while len(rest) > self._max_line_bytes:
            pieces += [rest[: self._max_line_bytes], CUT_MARK, b"\n"]
            rest = rest[self._max_line_bytes :]
        self._rest = rest
        return b"".join(pieces)

    def close(self) -> bytes:
        r"""Give out what is left when the stream ends.

        Returns
        -------
        bytes
            The last, unfinished line with a ``\n`` added, or nothing.
        """
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        return rest + b"\n" if rest else b""


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
    prefix = f"[{rank}]<{stream}>:".encode()
    return prefix + lines[:-1].replace(b"\n", b"\n" + prefix) + b"\n"
