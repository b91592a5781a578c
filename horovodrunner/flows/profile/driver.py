"""Profiles as speedscope reads them. Runs in: the driver.

The format is that of https://www.speedscope.app/file-format-schema.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from horovodrunner.wire.events import Profile

__all__ = ["Stacks", "speedscope"]

SCHEMA = "https://www.speedscope.app/file-format-schema.json"


@dataclass(frozen=True)
class Stacks:
    """Frames (name, file, line), and the seconds of each stack of them, the outermost first."""

    frames: tuple[tuple[str, str, int], ...]
    seconds: Mapping[tuple[int, ...], float]

    @classmethod
    def of(cls, event: Profile) -> Stacks | None:
        """Read what a rank sent; None if it is no such thing."""
        try:
            fields = json.loads(bytes(event.stacks))
            frames = tuple(
                (str(name), str(file), int(line)) for name, file, line in fields["frames"]
            )
            seconds = {tuple(map(int, stack)): float(each) for stack, each in fields["stacks"]}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None
        is_whole = all(0 <= each < len(frames) for stack in seconds for each in stack)
        return cls(frames, seconds) if is_whole else None


def speedscope(profiles: Mapping[str, Stacks], title: str) -> dict[str, Any]:
    """Return one file of several profiles by their names."""
    numbers: dict[tuple[str, str, int], int] = {}
    listed = []
    for name, stacks in profiles.items():
        known = [numbers.setdefault(frame, len(numbers)) for frame in stacks.frames]
        listed.append(
            {
                "type": "sampled",
                "name": name,
                "unit": "seconds",
                "startValue": 0,
                "endValue": sum(stacks.seconds.values()),
                "samples": [[known[each] for each in stack] for stack in stacks.seconds],
                "weights": list(stacks.seconds.values()),
            }
        )
    return {
        "$schema": SCHEMA,
        "name": title,
        "exporter": "horovodrunner",
        "activeProfileIndex": max(0, len(listed) - 1),
        "shared": {
            "frames": [
                {"name": name, "file": file, "line": line} if file else {"name": name}
                for name, file, line in numbers
            ]
        },
        "profiles": listed,
    }
