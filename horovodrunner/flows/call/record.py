"""What a run was called with, so that a later one can tell what differs. Runs in: every process.

A record holds texts alone. It is made on the driver, stands in the manifest of every checkpoint
that the run saves, and is compared where the next run finds that checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["HIDDEN", "MAX_ENTRIES", "MAX_TEXT", "RunRecord", "calls_another_main", "changes"]

HIDDEN = "(not shown)"
"""How the text begins that stands for what may be a secret."""

MAX_ENTRIES = 200
"""How many arguments, or items of a configuration, or variables, or functions a record names."""

MAX_TEXT = 160
"""Most characters of a name or a value; longer ones are cut."""

_MAX_LISTED = 8


@dataclass(frozen=True)
class RunRecord:
    """What a run was called with, as texts.

    `arguments` has main's, the items of a configuration one by one; `variables` what main and its
    helpers use of the notebook; `code` a digest of main's code, as ``""``, and of its helpers'.
    """

    run_id: str
    size: int
    python: str = ""
    main: str = ""
    arguments: dict[str, str] = field(default_factory=dict, repr=False)
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    code: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_fields(cls, fields: Any) -> RunRecord | None:
        """Read what `dataclasses.asdict` gave, and trust nothing in it; None for anything else."""
        try:
            record = cls(**fields)
        except TypeError:
            return None
        is_record = (
            isinstance(record.run_id, str)
            and type(record.size) is int
            and isinstance(record.python, str)
            and _are_texts({"": record.main})
            and all(map(_are_texts, (record.arguments, record.variables, record.code)))
        )
        return record if is_record else None


def changes(old: RunRecord, new: RunRecord) -> list[str]:
    """List what differs between two runs: ``"lr was 0.1, is 0.01"`` and the like."""
    found = []
    if is_another := calls_another_main(old, new):
        found.append(f"main was {old.main}, is {new.main}")
    for name in dict.fromkeys([*new.arguments, *old.arguments]):
        if name not in new.arguments:
            if not is_another:
                found.append(f"{name} was {old.arguments[name]}, is gone")
        elif name not in old.arguments:
            found.append(f"{name} is new: {new.arguments[name]}")
        else:
            found += _change(name, old.arguments[name], new.arguments[name])
    for name in new.variables:
        if name in old.variables:
            found += _change(f"the variable {name}", old.variables[name], new.variables[name])
    if new.size and old.size != new.size:  # np=0 is not known at first
        found.append(f"the number of ranks was {old.size}, is {new.size}")
    if old.python == new.python:
        changed = [
            name or "main"
            for name in new.code
            if old.code.get(name, new.code[name]) != new.code[name] and (name or not is_another)
        ]
        if changed:
            names = ", ".join(changed[:_MAX_LISTED]) + ", …" * (len(changed) > _MAX_LISTED)
            found.append(f"the code of {names} has changed")
    if len(found) > _MAX_LISTED + 1:
        found[_MAX_LISTED:] = [f"{len(found) - _MAX_LISTED} more"]
    return found


def calls_another_main(old: RunRecord, new: RunRecord) -> bool:
    """Return whether two runs call functions of different names and code: it was not renamed."""
    return (
        "" not in (old.main, new.main)
        and old.main != new.main
        and old.code.get("") != new.code.get("")
    )


def _change(name: str, was: str, now: str) -> list[str]:
    if was == now:
        return []
    if was.startswith(HIDDEN) and now.startswith(HIDDEN):
        return [f"{name} has changed (not shown, because it may be a secret)"]
    return [f"{name} was {was}, is {now}"]


def _are_texts(texts: Any) -> bool:
    # they are shown in a terminal
    return (
        isinstance(texts, dict)
        and len(texts) <= MAX_ENTRIES
        and all(
            isinstance(text, str) and len(text) <= 2 * MAX_TEXT and text.isprintable()
            for pair in texts.items()
            for text in pair
        )
    )
