"""The code directory as one file. Runs in: the driver.

What a checkout has beside its code stays behind; what links lead to travels in their place.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from horovodrunner.errors import ConfigurationError
from horovodrunner.formatting import format_bytes

__all__ = ["MAX_BYTES", "digests_of_modules", "largest_entries", "pack"]

MAX_BYTES = 100 * 1000 * 1000
"""More than this is data or results, not code."""

MAX_FILES = 50_000
_LARGEST = 5

_NEVER = frozenset({"__pycache__", "node_modules"})
_MARKS = ("pyvenv.cfg", "conda-meta")
"""A directory with one of these is an environment."""

_ADVICE = (
    "name a directory that has only the code with code_dir=, and keep data where the executors can "
    "read it: a shared directory, a URL or a DataFrame"
)


def pack(root: Path, left_out: Sequence[str] = ()) -> bytes:
    """Return the files of a directory as a compressed tar file.

    Raises ConfigurationError where they are too many or too large, or one cannot be read.
    """
    left = frozenset(os.path.realpath(each) for each in left_out)
    files: list[tuple[str, str, os.stat_result]] = []
    total = 0
    for name, path, facts in _files(str(root), "", left, ()):
        files.append((name, path, facts))
        total += facts.st_size if stat.S_ISREG(facts.st_mode) else 0
        if len(files) > MAX_FILES:
            raise ConfigurationError(
                f"the code directory {root} has more than {MAX_FILES:,} files, which every "
                f"executor would have to get: {_ADVICE}"
            )
    if total > MAX_BYTES:
        raise ConfigurationError(
            f"the code directory {root} has {format_bytes(total)}, and at most "
            f"{format_bytes(MAX_BYTES)} travel to the executors. Largest: "
            f"{_largest([(n, f.st_size) for n, _, f in files if stat.S_ISREG(f.st_mode)])}. "
            f"Instead {_ADVICE}"
        )
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", compresslevel=1, dereference=True) as tar:
        for name, path, facts in files:
            if stat.S_ISDIR(facts.st_mode):
                member = tarfile.TarInfo(name)
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(member)
            else:
                _add(tar, name, path)
    return made.getvalue()


def digests_of_modules(root: Path, left_out: Sequence[str] = ()) -> dict[str, str]:
    """Return a digest of each Python file of a directory that would travel, by its name."""
    left = frozenset(os.path.realpath(each) for each in left_out)
    found = {}
    for name, path, _ in _files(str(root), "", left, ()):
        if name.endswith((".py", ".pyx", ".so")):
            with contextlib.suppress(OSError):  # gone meanwhile, or unreadable for the ranks, too
                found[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        if len(found) > MAX_FILES:
            break
    return found


def largest_entries(archive: bytes) -> str:
    """Name what is largest in a packed directory."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return _largest([(member.name, member.size) for member in tar])


def _files(
    directory: str, prefix: str, left_out: frozenset[str], outer: tuple[str, ...]
) -> Iterator[tuple[str, str, os.stat_result]]:
    """Yield names, paths and facts of what travels; `outer` are the directories around it."""
    real = os.path.realpath(directory)
    if real in outer:  # a link to one of them
        return
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(directory, error) from error
    for entry in entries:
        try:
            facts = entry.stat()
        except OSError:  # a link to nothing, or gone meanwhile
            continue
        name = f"{prefix}{entry.name}"
        if stat.S_ISDIR(facts.st_mode):
            if not _stays_behind(entry, left_out):
                yield name, entry.path, facts
                yield from _files(entry.path, f"{name}/", left_out, (*outer, real))
        elif stat.S_ISREG(facts.st_mode):
            yield name, entry.path, facts


def _stays_behind(entry: os.DirEntry[str], left_out: frozenset[str]) -> bool:
    return (
        entry.name.startswith(".")
        or entry.name in _NEVER
        or any(os.path.exists(os.path.join(entry.path, mark)) for mark in _MARKS)  # noqa: PTH110, PTH118
        or os.path.realpath(entry.path) in left_out
    )


def _add(tar: tarfile.TarFile, name: str, path: str) -> None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            member = tar.gettarinfo(arcname=name, fileobj=file)
            member.type = tarfile.REGTYPE  # not a link to another name of the same file
            member.size = os.fstat(file.fileno()).st_size
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            tar.addfile(member, file)
    except FileNotFoundError:  # gone meanwhile
        return
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is in the code directory and cannot be read ({error.strerror or error}): make it "
        "readable, or name another directory with code_dir="
    )


def _largest(sizes: list[tuple[str, int]]) -> str:
    """Sum up what lies in a directory of the top, and name the largest of all."""
    tops: dict[str, int] = {}
    for name, size in sizes:
        top, slash, _ = name.partition("/")
        tops[top + slash] = tops.get(top + slash, 0) + size
    ranked = sorted(tops.items(), key=lambda each: -each[1])[:_LARGEST]
    return ", ".join(f"{name} ({format_bytes(size)})" for name, size in ranked)
