"""One fault, as it travels from a test to the ranks. Runs in: the driver and the worker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

__all__ = ["Fault", "from_text", "to_text"]


@dataclass(frozen=True)
class Fault:
    """What is to happen to a rank when it gets to a step."""

    kind: str
    rank: int
    at_step: int
    attempt: int = 1
    """The launch of the run that it happens in; 0: in each."""
    seconds: float = 0.0
    exception: str = ""
    """A pickled exception, in hexadecimal digits."""
    place: str = ""
    """A file through which the rank and the test wait for each other."""
    told: str = ""
    """A file that is made when it happens."""
    went_on: str = ""
    """A file that is made when a rank of a later attempt asks for its checkpoint."""
    checkpoints: str = ""
    """A directory in which a checkpoint is to be complete before it happens."""


def to_text(faults: Sequence[Fault]) -> str:
    """Write faults into the value of a variable."""
    return json.dumps([asdict(fault) for fault in faults])


def from_text(text: str) -> list[Fault]:
    """Read what `to_text` has written."""
    return [Fault(**fields) for fields in json.loads(text)]
