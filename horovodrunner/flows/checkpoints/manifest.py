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
from typing import Any

from horovodrunner.flows.call.record import RunRecord

__all__ = ["MANIFEST_NAME", "Manifest", "StoredFile", "safe_path"]

MANIFEST_NAME = "manifest.json"
"""Name of the file, at the root of a checkpoint, that holds its manifest."""

_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"step": int, "sequence": int, "saved_at": str, "files": list, "directories": list}
_FIELDS_OF_A_FILE = {"path": str, "size": int, "sha256": str}


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
        try:
            offset = datetime.fromisoformat(self.saved_at).utcoffset()
        except ValueError as error:
            raise ValueError(f"'saved_at' is no time: {error}") from error
        if offset != timedelta(0):
            raise ValueError(f"'saved_at' is {self.saved_at!r}, which is not in UTC")
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
        found = _checked_fields("the manifest", fields, _FIELDS)
        files = [_checked_fields("a file", each, _FIELDS_OF_A_FILE) for each in found["files"]]
        for each in found["directories"]:
            _check("a directory", each, str)
        found["files"] = tuple(StoredFile(**each) for each in files)
        found["directories"] = tuple(found["directories"])
        return cls(**found, run=RunRecord.from_fields(fields.get("run")))


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


def _check(what: str, value: Any, kind: type) -> None:
    if type(value) is not kind:  # to isinstance, true is a number of bytes
        raise ValueError(f"{what} is {value!r:.100}, not of type {kind.__name__}")


def _checked_fields(what: str, fields: Any, kinds: dict[str, type]) -> dict[str, Any]:
    """Return the fields that `kinds` names, if each is there and of its type; no int below 0."""
    _check(what, fields, dict)
    for name, kind in kinds.items():
        if name not in fields:
            raise ValueError(f"{name!r} is not in it")
        _check(repr(name), fields[name], kind)
        if kind is int and fields[name] < 0:
            raise ValueError(f"{name!r} is {fields[name]}, below 0")
    return {name: fields[name] for name in kinds}
