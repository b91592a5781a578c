"""Ranks, classes, errors and long texts, for messages. Runs in: every process."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "class_names",
    "cut",
    "format_bytes",
    "full_name",
    "in_one_line",
    "printable",
    "ranks_in_words",
    "short_name",
]

_MAX_NAMED = 8
_MAX_CLASSES = 100
_MAX_NAME = 200

_MODULE, _MRO, _QUALNAME = (
    vars(type)[name].__get__ for name in ("__module__", "__mro__", "__qualname__")
)
"""What ``type`` itself knows of a class: a metaclass may answer with anything."""

_TEXT_CHARS = 500
"""As much of an error's text is repeated."""


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Return "rank 2", "ranks 0, 1 and 3", "ranks 8-23", or how many they are."""
    numbers = sorted(ranks)
    names = [str(rank) for rank in numbers]
    if len(names) == 1:
        return f"rank {names[0]}"
    if len(names) > _MAX_NAMED:
        if numbers[-1] - numbers[0] == len(numbers) - 1:
            return f"ranks {names[0]}-{names[-1]}"
        return f"{len(names)} ranks"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def class_names(cls: type) -> tuple[str, ...]:
    """Return the qualified names of a class and its bases, in the order of its MRO."""
    return tuple(full_name(each) for each in _MRO(cls)[:_MAX_CLASSES])


def full_name(cls: type) -> str:
    """Return a class's module and qualified name."""
    module = _MODULE(cls)
    return (f"{module[:_MAX_NAME]}." if type(module) is str else "") + short_name(cls)


def short_name(cls: type) -> str:
    """Return a class's name within its module."""
    return str.__str__(_QUALNAME(cls))[:_MAX_NAME]


def cut(text: str, most: int, *, keep_end: bool = False) -> str:
    """Cut a text that is too long, with a mark that says how long it was."""
    if len(text) <= most:
        return text
    mark = f"...(truncated: {len(text):,} characters)"
    if not keep_end:
        return text[:most] + mark
    return f"{text[: most // 2]}\n{mark}...\n{text[-(most // 2) :]}"


def in_one_line(error: BaseException) -> str:
    """Return an error's type and text, however broken it is."""
    try:
        text = cut(str(error), _TEXT_CHARS)
    except KeyboardInterrupt:
        raise
    except BaseException as broken:  # noqa: BLE001 - it is the user's code
        text = f"(its text cannot be had: {short_name(type(broken))})"
    name = short_name(type(error))
    return f"{name}: {text}".replace("\n", " ") if text else name


def printable(text: str) -> str:
    """Return a text as one line, without what moves a cursor or has no encoding."""
    if text.isprintable():
        return text
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def format_bytes(count: int) -> str:
    """Return a number of bytes with a binary unit."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
