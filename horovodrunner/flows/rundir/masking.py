"""Hides secrets in texts that a record keeps. Runs in: the driver."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from horovodrunner.flows.call.record import HIDDEN
from horovodrunner.flows.call.recording import looks_secret, may_be_secret
from horovodrunner.placement.forwarding import Variables, named_by

__all__ = ["Mask", "secret_variables", "without_secrets"]

MIN_SECRET = 4
"""A shorter value may stand anywhere in a text by chance."""

MIN_WORD = 12
"""So may a shorter one that is a word, if its name only may say a secret: ``auth="default"``."""

MAX_SECRETS = 1000
_MAX_DEPTH = 5

_IN_URL = re.compile(rb"://[^/\s:@'\"]*:[^/\s@'\"]+@")


class Mask:
    """Replaces the values of variables and arguments whose names say that they are secret.

    So it does with what a URL names before an ``@``, and with `values`, whatever they are.
    """

    def __init__(self, *sources: Mapping[str, Any], values: Iterable[str] = ()) -> None:
        secrets = {each for source in sources for each in _secrets_in(source, 0)}
        secrets.update(each for value in values for each in _lines(value))
        # the longest first: one may be a part of another
        known = sorted(secrets, key=len, reverse=True)[:MAX_SECRETS]
        self._known = re.compile(b"|".join(map(re.escape, known))) if known else None

    def hide(self, content: bytes) -> bytes:
        """Hide secrets in bytes, whatever else they are."""
        content = _IN_URL.sub(f"://{HIDDEN}@".encode(), content)
        return content if self._known is None else self._known.sub(HIDDEN.encode(), content)

    def text(self, text: str) -> str:
        """Hide secrets in a text."""
        return self.hide(text.encode(errors="backslashreplace")).decode()


def _secrets_in(source: Any, depth: int) -> Iterator[bytes]:
    if depth > _MAX_DEPTH:
        return
    for name, value in _named(source):
        if isinstance(value, str):
            if may_be_secret(name, value) and _is_telling(name, value):
                yield from _lines(value)
        else:
            yield from _secrets_in(value, depth + 1)


def _lines(secret: str) -> Iterator[bytes]:
    """Yield a secret's lines, which are shown one by one, but none that anything may have."""
    for line in secret.splitlines():
        if len(line.strip()) >= MIN_SECRET:
            yield line.strip().encode(errors="backslashreplace")


def secret_variables(of_run: Mapping[str, str], chosen: Variables) -> frozenset[str]:
    """Return the names of a run's variables that are secret whatever their names are."""
    look_so = [name for name in chosen.environment if looks_secret(of_run.get(name, ""))]
    return named_by(chosen.patterns, of_run).union(look_so)


def without_secrets(
    variables: Mapping[str, str | None], secret: Collection[str] = ()
) -> dict[str, str | None]:
    """Return environment variables as they may be shown; those in `secret` never are.

    >>> without_secrets({"WANDB_MODE": "offline", "WANDB_API_KEY": "0123"})
    {'WANDB_MODE': 'offline', 'WANDB_API_KEY': '(not shown)'}
    """
    return {
        name: HIDDEN
        if value is not None
        and (name in secret or may_be_secret(name, value) or looks_secret(value))
        else value
        for name, value in variables.items()
    }


def _is_telling(name: str, value: str) -> bool:
    """Return whether a value in a text would tell the secret; a directory (``PWD``) does not."""
    if len(value) < MIN_SECRET or value.startswith("/"):
        return False
    is_surely_secret = may_be_secret(name, 0)  # as for numbers, few names will do
    return is_surely_secret or len(value) >= MIN_WORD or not value.isalpha()


def _named(source: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(source, Mapping):
        return [(name, value) for name, value in source.items() if isinstance(name, str)]
    if isinstance(source, (list, tuple)):
        return [("", value) for value in source[:MAX_SECRETS]]
    return []
