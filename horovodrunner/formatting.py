"""Ranks, classes, errors and long texts, for messages. Runs in: every process."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["class_names", "cut", "in_one_line", "ranks_in_words", "short_name"]

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
    """Name some ranks.

    Parameters
    ----------
    ranks
        The ranks, in any order.

    Returns
    -------
    str
        All of them when they are few, else how many they are.

    Examples
    --------
    >>> ranks_in_words([2])
    'rank 2'
    >>> ranks_in_words({3, 0, 1})
    'ranks 0, 1 and 3'
    """
    names = [str(rank) for rank in sorted(ranks)]
    if len(names) == 1:
        return f"rank {names[0]}"
    if len(names) > _MAX_NAMED:
        return f"{len(names)} ranks"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def class_names(cls: type) -> tuple[str, ...]:
    """Return the qualified names of a class and its bases, in the order of its MRO.

    Parameters
    ----------
    cls
        The class.

    Returns
    -------
    tuple of str
        ``module.qualname`` of each.

    Examples
    --------
    >>> class_names(ConnectionResetError)[:3]
    ('builtins.ConnectionResetError', 'builtins.ConnectionError', 'builtins.OSError')
    """
    names = []
    for each in _MRO(cls)[:_MAX_CLASSES]:
        module = _MODULE(each)
        prefix = f"{module[:_MAX_NAME]}." if type(module) is str else ""
        names.append(prefix + short_name(each))
    return tuple(names)


def short_name(cls: type) -> str:
    """Return a class's name within its module.

    Parameters
    ----------
    cls
        The class.

    Returns
    -------
    str
        Its ``__qualname__``.

    Examples
    --------
    >>> short_name(OSError)
    'OSError'
    """
    return str.__str__(_QUALNAME(cls))[:_MAX_NAME]


def cut(text: str, most: int, *, keep_end: bool = False) -> str:
    """Cut a text that is too long, with a mark that says how long it was.

    Parameters
    ----------
    text
        Any text.
    most
        Characters to keep.
    keep_end
        Whether half of them are kept from its end.

    Returns
    -------
    str
        The text, or what is kept of it with the mark.

    Examples
    --------
    >>> cut("no space left on the device", 8)
    'no space...(truncated: 27 characters)'
    """
    if len(text) <= most:
        return text
    mark = f"...(truncated: {len(text):,} characters)"
    if not keep_end:
        return text[:most] + mark
    return f"{text[: most // 2]}\n{mark}...\n{text[-(most // 2) :]}"


def in_one_line(error: BaseException) -> str:
    """Return an error's type and text, however broken it is.

    Parameters
    ----------
    error
        Any.

    Returns
    -------
    str
        One line of bounded length.
    """
    try:
        text = cut(str(error), _TEXT_CHARS)
    except KeyboardInterrupt:
        raise
    except BaseException as broken:  # noqa: BLE001 - it is the user's code
        text = f"(its text cannot be had: {short_name(type(broken))})"
    name = short_name(type(error))
    return f"{name}: {text}".replace("\n", " ") if text else name
