"""What a checkpoint consists of, and the proof that all of it is there. Runs in: every process.

The manifest is written last. A checkpoint without one is incomplete, and one whose files do not
have the sizes and hashes that the manifest names is damaged.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from horovodrunner.flows.call.record import RunRecord

__all__ = ["MANIFEST_NAME", "Manifest", "Part", "StoredFile", "directory_of", "safe_path"]

MANIFEST_NAME = "manifest.json"
"""Name of the file, at the root of a checkpoint, that holds its manifest."""

_FORMAT, _FORMAT_OF_ALL_RANKS = 1, 2
"""Releases that know only what rank 0 saves are not to take a rank's files for all of them."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"step": int, "sequence": int, "saved_at": str, "files": list, "directories": list}
_FIELDS_OF_A_FILE = {"path": str, "size": int, "sha256": str}
_RANK = re.compile(r"rank-([0-9]+)")


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
class Part:
    """What one rank has saved, or rank 0 for all."""

    files: tuple[StoredFile, ...]
    directories: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Part:
        """Read what :meth:`to_json` wrote; raise a ValueError for anything else."""
        fields = _parsed("the part", text)
        return cls(*_checked_tree("the part", fields))


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
    world_size: int | None = None
    """How many ranks have saved into directories of their own; None: rank 0 has for all."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Paths of files that are stored once for several ranks, and the path where they are."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the checkpoint was saved with, to compare it with others."""

    def __post_init__(self) -> None:
        try:
            offset = datetime.fromisoformat(self.saved_at).utcoffset()
        except ValueError as error:
            raise ValueError(f"'saved_at' is no time: {error}") from error
        if offset != timedelta(0):
            raise ValueError(f"'saved_at' is {self.saved_at!r}, which is not in UTC")
        files = [*(file.path for file in self.files), *map(safe_path, self.copies)]
        paths = [*files, *map(safe_path, self.directories)]
        for path, count in Counter(paths).items():
            if count > 1:
                raise ValueError(f"the path {path!r} is in it twice")
        parents = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        for path in files:
            if path in parents:
                raise ValueError(f"the path {path!r} is a file and a directory at once")
        if missing := set(self.copies.values()) - {file.path for file in self.files}:
            raise ValueError(f"{min(missing)!r}, of which there are copies, is not in it")
        if self.world_size is not None:
            self._check_ranks(self.world_size, paths)

    def _check_ranks(self, world_size: int, paths: list[str]) -> None:
        if world_size < 1:
            raise ValueError(f"'world_size' is {world_size}, below 1")
        for path in paths:
            match = _RANK.fullmatch(path.partition("/")[0])
            if match is None or int(match[1]) >= world_size or match[0] == path:
                raise ValueError(f"the path {path!r} is in no directory of {world_size} ranks")

    def files_of(self, rank: int | None) -> dict[str, StoredFile]:
        """Return the files of a rank, or (None) of rank 0 for all, by their paths for main."""
        if rank is None:
            return {file.path: file for file in self.files}
        root = f"{directory_of(rank)}/"
        by_path = {file.path: file for file in self.files}
        by_path |= {path: by_path[stored] for path, stored in self.copies.items()}
        return {
            path.removeprefix(root): file for path, file in by_path.items() if path.startswith(root)
        }

    def directories_of(self, rank: int | None) -> list[str]:
        """Return the empty directories that belong to the same."""
        if rank is None:
            return list(self.directories)
        root = f"{directory_of(rank)}/"
        return [each.removeprefix(root) for each in self.directories if each.startswith(root)]

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every file, by its path; those that are stored once for several, too."""
        found = {file.path: file.sha256 for file in self.files}
        return found | {path: found[stored] for path, stored in self.copies.items()}

    @property
    def size(self) -> int:
        """Number of bytes in all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> str:
        """Return JSON text that people can read."""
        known = _FORMAT if self.world_size is None else _FORMAT_OF_ALL_RANKS
        fields = asdict(self)
        for name in ("world_size", "copies", "metrics"):
            if not fields[name]:
                del fields[name]
        return json.dumps({"format": known, **fields}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what :meth:`to_json` wrote; raise a ValueError for anything else."""
        fields = _parsed("the manifest", text)
        known = _FORMAT if fields.get("world_size") is None else _FORMAT_OF_ALL_RANKS
        if type(fields.get("format")) is not int or fields["format"] != known:
            raise ValueError(f"its format is {fields.get('format')!r}; known is {known}")
        found = _checked_fields("the manifest", fields, _FIELDS)
        found["files"], found["directories"] = _checked_tree("the manifest", fields)
        if known == _FORMAT_OF_ALL_RANKS:
            found |= _checked_fields("the manifest", fields, {"world_size": int})
        copies, metrics = fields.get("copies", {}), fields.get("metrics", {})
        _check("'copies'", copies, dict)
        _check("'metrics'", metrics, dict)
        for each in copies.values():
            _check("a path", each, str)
        for name, value in metrics.items():
            _check(repr(name), value, float)
        run = RunRecord.from_fields(fields.get("run"))
        return cls(**found, run=run, copies=copies, metrics=metrics)


def directory_of(rank: int) -> str:
    """Return the name of a rank's directory in a checkpoint of all ranks.

    >>> directory_of(3)
    'rank-3'
    """
    return f"rank-{rank}"


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


def _parsed(what: str, text: str | bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    _check(what, fields, dict)
    return dict(fields)


def _checked_tree(what: str, fields: Any) -> tuple[tuple[StoredFile, ...], tuple[str, ...]]:
    found = _checked_fields(what, fields, {"files": list, "directories": list})
    files = [_checked_fields("a file", each, _FIELDS_OF_A_FILE) for each in found["files"]]
    for each in found["directories"]:
        _check("a directory", each, str)
    return tuple(StoredFile(**each) for each in files), tuple(found["directories"])


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
