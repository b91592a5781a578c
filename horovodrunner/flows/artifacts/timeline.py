"""Horovod's timeline as valid JSON, however its writer ended. Runs in: the driver.

Horovod writes ``[``, events with commas between them and, after each event, a ``]`` that the next
event overwrites. When its process dies, what is left may end anywhere. And it writes names of
tensors as they are: a quotation mark in one makes an event that is no JSON.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator

__all__ = ["TimelineRepair"]

MAX_EVENT_CHARACTERS = 1024 * 1024
"""An event that is longer is dropped; Horovod's have about a hundred characters."""

_BETWEEN = re.compile(r"[\s,\[\]]*")
_EVENT_BEGINS = re.compile(r',\s*(?=\{"(?:ph|name)": ")')


class TimelineRepair:
    """Copies a timeline and leaves out what is torn; memory is bounded, whatever its size.

    `collectives` counts the events of tensors, `dropped` those in the middle that are no JSON.
    """

    def __init__(self) -> None:
        self.collectives = 0
        self.dropped = 0
        self._has_written = False

    def repair(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
        """Make of what Horovod wrote a whole JSON array, one event a line."""
        yield b"["
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = ""
        for piece in pieces:
            text += decoder.decode(piece)
            # An event is judged when all of it must be there.
            if len(text) >= 2 * MAX_EVENT_CHARACTERS:
                events, end = self._events(text, len(text) - MAX_EVENT_CHARACTERS)
                yield events
                text = text[end:]
        events, _ = self._events(text, len(text))
        yield events
        yield b"\n]\n"

    def _events(self, text: str, stop: int) -> tuple[bytes, int]:
        """Return the events that begin before `stop`, and where the first one after it begins."""
        scan = json.JSONDecoder().raw_decode
        lines: list[str] = []
        position = _skip(text, 0)
        while position < stop:
            try:
                event, end = scan(text, position)
                is_event = isinstance(event, dict) and "ph" in event
            except (ValueError, RecursionError):
                is_event = False
            if not is_event:
                following = _EVENT_BEGINS.search(text, position)
                if following is None:
                    # Torn, or longer than any event: the rest of it may still come.
                    return self._lines(lines), stop
                self.dropped += 1
                position = following.end()
                continue
            lines.append(text[position:end])
            if event["ph"] != "M" and "pid" in event:
                self.collectives += 1
            position = _skip(text, end)
        return self._lines(lines), position

    def _lines(self, events: list[str]) -> bytes:
        if not events:
            return b""
        start = ",\n" if self._has_written else "\n"
        self._has_written = True
        return (start + ",\n".join(events)).encode()


def _skip(text: str, position: int) -> int:
    between = _BETWEEN.match(text, position)
    return between.end() if between is not None else position
