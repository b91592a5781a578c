"""What a checkpoint consists of, and the proof that all of it is there. Runs in: every process.

The manifest is written last. A checkpoint without one is incomplete, and one whose files do not
have the sizes and hashes that the manifest names is damaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any, TypeVar

from horovodrunner.flows.call.record import RunRecord

__all__ = ["MANIFEST_NAME", "Manifest", "StoredFile", "safe_path"]

MANIFEST_NAME = "manifest.json"
"""Name of the file, at the root of a checkpoint, that holds its manifest."""

_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint.

    Parameters
    ----------
    path
        Where it is below the checkpoint's root, with ``/`` between the parts.
    size
        Number of bytes.
    sha256
        The content's SHA-256 in 64 lower-case hexadecimal digits.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that belongs to one checkpoint.

    Parameters
    ----------
    step
        The training step it was saved at; it names the checkpoint.
    sequence
        The highest is the newest, because a run that starts over may save lower steps later.
    saved_at
        ISO 8601 time in UTC.
    files
        The files with their hashes.
    directories
        The empty directories, which some formats need (TensorFlow's SavedModel has ``assets/``).
    run
        What the run was called with that saved it; None where that is not known, as in checkpoints
        of earlier releases.
    """

    step: int
    sequence: int
    saved_at: str
    files: tuple[StoredFile, ...]
    directories: tuple[str, ...] = ()
    run: RunRecord | None = None

    @property
    def size(self) -> int:
        """Number of bytes in all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> str:
        """Give the fields as JSON text that people can read.

        Returns
        -------
        str
            What :meth:`from_json` takes.
        """
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what :meth:`to_json` gave, and trust nothing in it.

        Parameters
        ----------
        text
            JSON text.

        Returns
        -------
        Manifest
            An equal object.

        Raises
        ------
        ValueError
            When anything is not as :meth:`to_json` writes it; the text says what.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from error
        fields = _checked("the manifest", fields, dict)
        if type(fields.get("format")) is not int or fields["format"] != _FORMAT:
            raise ValueError(f"its format is {fields.get('format')!r}; known is {_FORMAT}")
        manifest = cls(
            step=_number(fields, "step"),
            sequence=_number(fields, "sequence"),
            saved_at=_time(fields, "saved_at"),
            files=tuple(_stored_file(each) for each in _field(fields, "files", list)),
            directories=tuple(
                safe_path(_checked("a directory", each, str))
                for each in _field(fields, "directories", list)
            ),
            run=RunRecord.from_fields(fields.get("run")),
        )
        _refuse_conflicts([file.path for file in manifest.files], manifest.directories)
        return manifest


def safe_path(path: str) -> str:
    """Refuse a path that could lead out of a checkpoint or into its manifest.

    Parameters
    ----------
    path
        A path below the checkpoint's root, with ``/`` between the parts.

    Returns
    -------
    str
        The same path.

    Raises
    ------
    ValueError
        When the path is empty or absolute, has an empty part, ``.`` or ``..``, a backslash or a
        NUL, or is ``manifest.json`` at the root.

    Examples
    --------
    >>> safe_path("variables/variables.index")
    'variables/variables.index'
    """
    parts = path.split("/")
    if any(part in {"", ".", ".."} for part in parts) or "\\" in path or "\0" in path:
        raise ValueError(
            f"the path {path!r} is not safe: it must be relative, without '.', '..', "
            "empty parts, backslashes or NUL"
        )
    if parts[0] == MANIFEST_NAME:
        raise ValueError(f"the path {path!r} is taken: the checkpoint's own {MANIFEST_NAME}")
    return path


def _checked(what: str, value: Any, kind: type[_T]) -> _T:
    # bool is an int to isinstance, and true is no number of bytes
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{what} is {value!r:.100}, not of type {kind.__name__}")
    return value


def _field(fields: dict[str, Any], name: str, kind: type[_T]) -> _T:
    if name not in fields:
        raise ValueError(f"{name!r} is not in it")
    return _checked(repr(name), fields[name], kind)


def _number(fields: dict[str, Any], name: str) -> int:
    number = _field(fields, name, int)
    if number < 0:
        raise ValueError(f"{name!r} is {number}, below 0")
    return number


def _time(fields: dict[str, Any], name: str) -> str:
    text = _field(fields, name, str)
    try:
        offset = datetime.fromisoformat(text).utcoffset()
    except ValueError as error:
        raise ValueError(f"{name!r} is no time: {error}") from error
    if offset != timedelta(0):
        raise ValueError(f"{name!r} is {text!r}, which is not in UTC")
    return text


def _stored_file(fields: Any) -> StoredFile:
    fields = _checked("a file", fields, dict)
    path = safe_path(_field(fields, "path", str))
    sha256 = _field(fields, "sha256", str)
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"the 'sha256' of {path!r} is {sha256!r:.100}, not 64 hexadecimal digits")
    return StoredFile(path, _number(fields, "size"), sha256)


def _refuse_conflicts(files: Iterable[str], directories: Iterable[str]) -> None:
    seen: set[str] = set()
    parents: set[str] = set()
    files = list(files)
    for path in [*files, *directories]:
        if path in seen:
            raise ValueError(f"the path {path!r} is in it twice")
        seen.add(path)
        parents.update(str(parent) for parent in PurePosixPath(path).parents)
    for path in files:
        if path in parents:
            raise ValueError(f"the path {path!r} is a file and a directory at once")
