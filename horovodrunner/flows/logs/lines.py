"""Bytes of a pipe to whole, rank-prefixed lines. Runs in: the task and the driver."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

__all__ = ["CUT_MARK", "LineAssembler", "count_lines", "missing_mark", "prefix_lines"]

CUT_MARK = b" ...(line cut)"

MAX_ROWS = 64
"""So many lines above the last one may still be overwritten."""

# What moves a cursor to the line's beginning (\r, G), back (\b, D) or to another line (A, B, E, F),
# and what erases a line (K). Colours pass.
_SEQUENCES = rb"\x08+|\x1b\[(?:\d{0,4}[ABDEF]|1?G|[12]K)"
_MOVE = re.compile(rb"\r|" + _SEQUENCES)
_CONTROL = re.compile(rb"\n|\x1b\[0?[JK]|" + _SEQUENCES)
_HALF_SEQUENCE = re.compile(rb"\x1b(?:\[\d{0,4})?\Z")
_LONGEST_SEQUENCE = 7
_UNSEEN = re.compile(rb"\x1b\[[\d;?]*[a-zA-Z]|\s+")

_MISSING = b" lines are missing here"
_MISSING_MARK = re.compile(rb"HorovodRunner: (\d+)" + _MISSING)


class LineAssembler:
    r"""Turns chunks of a byte stream into whole lines, in bounded memory.

    A line longer than `max_line_bytes` is given out in pieces that end in `CUT_MARK`; it is not cut
    inside a UTF-8 character. All other bytes pass as they are, whatever they encode, but for those
    that move a terminal's cursor: what they overwrite, such as a progress bar's earlier states, is
    left out. What a line shows that has been overwritten, and has not ended yet, is its state.
    """

    _rest: bytearray
    _rows: list[_Row]
    _row: int
    _steps_back: int
    _is_moved: bool
    _is_redrawn: bool
    _has_gone_up: bool

    def __init__(self, max_line_bytes: int = 256 * 1024) -> None:
        self._max_line_bytes = max_line_bytes
        self._half_end = b""
        self._begin_line()

    def feed(self, data: bytes) -> bytes:
        r"""Take the next bytes of the stream, and return the lines that are now complete."""
        # Only the new bytes are searched and copied: the rest may be long, and data one byte.
        data = self._half_end + data
        self._half_end = b""
        if half := _HALF_SEQUENCE.search(data, max(0, len(data) - _LONGEST_SEQUENCE)):
            data, self._half_end = data[: half.start()], half[0]
        data = data.replace(b"\r\n", b"\n")
        pieces: list[bytes | bytearray] = []
        self._draw(data, pieces)
        self._cut(pieces)
        return b"".join(pieces)

    @property
    def has_states(self) -> bool:
        """Whether :meth:`take_states` would return something."""
        return any(row.state for row in self._rows) or bool(self._state_of_rest())

    def take_states(self) -> bytes:
        r"""Return what unfinished lines show now, unless it was returned before."""
        if state := self._state_of_rest():
            self._rows[self._row].state = state
        states = []
        for row in self._rows:
            if row.state:
                row.shown, row.state = row.state, b""
                states.append(row.shown + b"\n")
        return b"".join(states)

    def close(self) -> bytes:
        r"""Return what is left when the stream ends, with a ``\n`` added."""
        self._write(self._half_end)
        self._half_end = b""
        if self._is_moved:
            self._leave_segment()
            rest = self.take_states()
        else:
            rest = bytes(self._rest) + b"\n" if self._rest else b""
        self._begin_line()
        return rest

    def _append(self, data: bytes, pieces: list[bytes | bytearray]) -> None:
        if end := data.rfind(b"\n") + 1:
            pieces += [self._rest, data[:end]]
            self._rest = bytearray(data[end:])
        else:
            self._rest += data

    def _draw(self, data: bytes, pieces: list[bytes | bytearray]) -> None:
        """Do what a terminal does with text and moves of its cursor."""
        position = 0
        while position < len(data):
            found = (_CONTROL if self._is_moved else _MOVE).search(data, position)
            end = len(data) if found is None else found.start()
            text, position = data[position:end], end
            if not self._is_moved:  # up to the first move all passes as it is
                self._append(text, pieces)
                self._is_moved = found is not None
                continue
            self._write(text)
            if found is not None:
                position = found.end()
                if found[0] == b"\n":
                    self._end_row(pieces)
                else:
                    self._move(found[0])

    def _write(self, text: bytes) -> None:
        """Write over the cursor's row, from its beginning after each return."""
        first, *others = text.split(b"\r")
        if first and self._steps_back:
            del self._rest[_before_characters(self._rest, self._steps_back) :]
            self._steps_back = 0
        self._rest += first
        if not others:
            return
        *overwritten, last = others
        is_erasing = _is_blank(overwritten[-1] if overwritten else bytes(self._rest))
        self._leave_segment()
        # What was overwritten last is on the row; what could be seen last is its state.
        overwritten = [segment for segment in overwritten if segment]
        seen = next((each for each in reversed(overwritten) if not _is_blank(each)), b"")
        for segment in (seen, *overwritten[-1:]):
            self._rest += segment
            self._leave_segment()
        self._rest += last
        self._is_redrawn = not is_erasing

    def _move(self, control: bytes) -> None:
        kind, digits = control[-1:], control[2:-1]
        if kind in b"\bD":
            self._steps_back += len(control) if kind == b"\b" else int(digits or 1)
            return
        if kind in b"JK" and self._rest and digits in b"0":
            return  # nothing is behind the cursor
        self._leave_segment()
        self._is_redrawn = kind != b"A"
        if kind in b"JK":
            row = self._rows[self._row]
            row.text, row.is_erased, row.is_wiped = b"", True, True
        elif kind in b"AF":
            above = min(int(digits or 1), MAX_ROWS - len(self._rows) + self._row)
            self._rows[:0] = [_Row() for _ in range(above - self._row)]
            self._row = max(0, self._row - above)
            self._has_gone_up = True
        elif kind in b"BE":
            self._row = min(self._row + int(digits or 1), len(self._rows) - 1)

    def _leave_segment(self) -> None:
        """Note what was written on the cursor's row since the cursor was at its beginning."""
        row = self._rows[self._row]
        if self._rest:
            row.text = bytes(self._rest)
            row.is_erased, row.is_wiped = _is_blank(row.text), False
            if not row.is_erased:
                row.state = row.text if row.text != row.shown else b""
        self._rest.clear()
        self._steps_back = 0

    def _end_row(self, pieces: list[bytes | bytearray]) -> None:
        row = self._rows[self._row]
        is_drawn = self._is_redrawn or not self._rest
        is_last = self._row == len(self._rows) - 1
        self._leave_segment()
        if not is_drawn or (is_last and not self._has_gone_up):
            # A line of its own, also among bars: tqdm.write() erases them and draws them again.
            for above in self._rows[: self._row]:
                if above.state and not above.is_erased:
                    above.shown, above.state = above.state, b""
                    pieces += [above.shown, b"\n"]
            if not row.text or row.text != row.shown:
                pieces += [row.text, b"\n"]
            if is_last:
                self._begin_line()
                return
            row.shown = row.text
            for each in self._rows:
                if each.is_erased or each is row:
                    each.state = b""
        if is_last:  # one of several bars
            self._rows.append(_Row())
            if len(self._rows) > MAX_ROWS:
                top = self._rows.pop(0)
                pieces += [top.state, b"\n"] if top.state else []
                self._row -= 1
        self._row += 1
        self._is_redrawn = self._rows[self._row].is_wiped

    def _begin_line(self) -> None:
        self._rest = bytearray()
        self._rows = [_Row()]
        self._row = 0
        self._steps_back = 0
        self._is_moved = False  # whether the cursor has been moved since the last line's end
        self._is_redrawn = False  # whether a return began what is written now
        self._has_gone_up = False

    def _state_of_rest(self) -> bytes:
        if not (self._is_moved and self._rest) or _is_blank(self._rest):
            return b""
        whole = _character_start(self._rest, 0, len(self._rest))
        state = bytes(self._rest[:whole])
        return b"" if state == self._rows[self._row].shown else state

    def _cut(self, pieces: list[bytes | bytearray]) -> None:
        start = 0
        while len(self._rest) - start > self._max_line_bytes:
            end = _character_start(self._rest, start, start + self._max_line_bytes)
            pieces += [self._rest[start:end], CUT_MARK, b"\n"]
            start = end
        del self._rest[:start]


@dataclass
class _Row:
    """A line of a terminal that may still be overwritten."""

    text: bytes = b""
    state: bytes = b""  # what it showed last, unless that was returned
    shown: bytes = b""  # what of it was returned
    is_erased: bool = False  # since
    is_wiped: bool = False  # by the terminal rather than by blanks


def _is_blank(text: bytes | bytearray) -> bool:
    """Whether text overwrites others and shows nothing; no text does not overwrite any."""
    return bool(text) and not _UNSEEN.sub(b"", text)


def _before_characters(text: bytearray, count: int) -> int:
    """Return where the last `count` characters of UTF-8 text begin."""
    at = len(text)
    while at and count:
        at -= 1
        count -= text[at] & 0xC0 != 0x80
    return at


def _character_start(text: bytearray, start: int, end: int) -> int:
    """Find where to cut `text` at or up to 3 bytes before `end`, but after `start`."""
    for lead in range(end - 1, max(end - 4, start), -1):
        if (first := text[lead]) & 0xC0 == 0x80:
            continue  # not a character's first byte
        size = 2 + (first >= 0xE0) + (first >= 0xF0)
        try:
            _, complete = codecs.utf_8_decode(text[lead:end])
            codecs.utf_8_decode(text[lead : max(end, lead + size)])
        except UnicodeDecodeError:
            return end
        return end if complete else lead
    return end


def prefix_lines(lines: bytes, rank: int, stream: str) -> bytes:
    r"""Put ``[rank]<stream>:`` before every line, as horovodrun does."""
    if not lines:
        return b""
    prefix = f"[{rank}]<{stream}>:".encode()
    return prefix + lines.removesuffix(b"\n").replace(b"\n", b"\n" + prefix) + b"\n"


def missing_mark(count: int, why: str) -> bytes:
    """Return the line that stands for lines which were dropped, with what dropped them."""
    return b"HorovodRunner: %d%b: %b\n" % (count, _MISSING, why.encode())


def count_lines(lines: bytes) -> int:
    r"""Count the lines that would be missing without these: a mark stands for those it counts."""
    count = lines.count(b"\n")
    if _MISSING in lines:
        marks = _MISSING_MARK.findall(lines)
        count += sum(map(int, marks)) - len(marks)
    return count
