"""Ranks and errors in words, for messages. Runs in: every process."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["in_one_line", "ranks_in_words"]

_MAX_NAMED = 8

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
        text = str(error)[:_TEXT_CHARS]
    except Exception as broken:  # noqa: BLE001 - it is the user's code
        text = f"(its text cannot be had: {type(broken).__name__})"
    name = type.__dict__["__name__"].__get__(type(error))
    return f"{name}: {text}".replace("\n", " ") if text else str(name)
