"""Ranks in words, for messages. Runs in: every process."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["ranks_in_words"]

_MAX_NAMED = 8


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
