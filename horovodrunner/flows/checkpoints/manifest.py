"""What a checkpoint consists of, and the proof that all of it is there. Runs in: every process.

The manifest is written last. A checkpoint without one is incomplete, and one whose files do not
have the sizes and hashes that the manifest names is damaged.
"""

from __future__ import annotations

import json
import re
from collections import Counter
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
    """One file of a checkpoint, below its root, with ``/`` between the parts of its path."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        safe_path(self.path)
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(
                f"the 'sha256' of {self.path!r} is {self.sha256!r:.100}, not 64 hexadecimal digits"
            )


@dataclass(frozen=True)
class Manifest:
    """All that belongs to one checkpoint."""

    step: int
    sequence: int
    """The highest is the newest, because a run that starts over may save lower steps later."""
    saved_at: str
    """ISO 8601, in UTC."""
    files: tuple[StoredFile, ...]
    directories: tuple[str, ...] = ()
    """The empty ones, which some formats need (TensorFlow's SavedModel has ``assets/``)."""
    run: RunRecord | None = None
    """What the run was called with that saved it; None in checkpoints of earlier releases."""

    def __post_init__(self) -> None:
        files = [file.path for file in self.files]
        paths = [*files, *map(safe_path, self.directories)]
        for path, count in Counter(paths).items():
            if count > 1:
                raise ValueError(f"the path {path!r} is in it twice")
        parents = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        for path in files:
            if path in parents:
                raise ValueError(f"the path {path!r} is a file and a directory at once")

    @property
    def size(self) -> int:
        """Number of bytes in all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> str:
        """Return JSON text that people can read."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what :meth:`to_json` wrote; raise a ValueError for anything else."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from error
        _check("the manifest", fields, dict)
        if type(fields.get("format")) is not int or fields["format"] != _FORMAT:
            raise ValueError(f"its format is {fields.get('format')!r}; known is {_FORMAT}")
        return cls(
            step=_number(fields, "step"),
            sequence=_number(fields, "sequence"),
            saved_at=_time(fields, "saved_at"),
            files=tuple(map(_stored_file, _field(fields, "files", list))),
            directories=tuple(
                _check("a directory", each, str) for each in _field(fields, "directories", list)
            ),
            run=RunRecord.from_fields(fields.get("run")),
        )


def safe_path(path: str) -> str:
    """Refuse a path that could lead out of a checkpoint or into its manifest.

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


def _check(what: str, value: Any, kind: type[_T]) -> _T:
    if type(value) is not kind:  # to isinstance, true is a number of bytes
        raise ValueError(f"{what} is {value!r:.100}, not of type {kind.__name__}")
    return value


def _field(fields: dict[str, Any], name: str, kind: type[_T]) -> _T:
    if name not in fields:
        raise ValueError(f"{name!r} is not in it")
    return _check(repr(name), fields[name], kind)


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
    _check("a file", fields, dict)
    path, sha256 = _field(fields, "path", str), _field(fields, "sha256", str)
    return StoredFile(path, _number(fields, "size"), sha256)
