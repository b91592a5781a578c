"""A directory, or an fsspec file system, with checkpoints or data sets. Runs in: every process.

Local files need no fsspec and are put in their place by a rename, which object stores do not have.
Nothing is forced to the disk. What a power failure tears, the hashes in the manifest show.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TypeAlias, cast

from horovodrunner.errors import ArgumentValueError, ConfigurationError
from horovodrunner.flows.checkpoints.manifest import MANIFEST_NAME
from horovodrunner.formatting import in_one_line

__all__ = [
    "LocalStorage",
    "RemoteStorage",
    "Storage",
    "as_os_error",
    "is_url",
    "local_path",
    "open_file_system",
    "open_storage",
    "path_of_file_url",
]

_LEFTOVER_SECONDS = 24 * 3600
_INCOMING = ".incoming-"
_REPLACED = ".replaced-"
_UNFINISHED = ".unfinished-"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")

_CREATE_ONCE = frozenset({"abfs", "abfss", "az", "gcs", "gs", "memory", "s3", "s3a"})
"""Schemes whose implementations create a file only where there is none, in one step."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What writing to an open file raises, without saying on which disk."""

SETTLE_SECONDS = 3.0
"""How long a file that was written may take to be listed, with other schemes."""

_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("abfs", "abfss", "az"), "adlfs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "oss": "ossfs",
}
"""What pip installs for a scheme."""

_INSTEAD = {
    "dbfs": (
        "on Databricks write the path /dbfs/{path}; elsewhere fsspec needs the workspace's address "
        "and a token, fsspec.config.conf['dbfs'] = {{'instance': ..., 'token': ...}}"
    ),
    "s3n": "write s3://{path} instead",
    **dict.fromkeys(
        ("wasb", "wasbs"), "write abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/... instead"
    ),
    "hdfs": (
        "it needs Hadoop's client: set JAVA_HOME, HADOOP_HOME and CLASSPATH (what `hadoop "
        "classpath --glob` prints)"
    ),
    "viewfs": "write the hdfs:// URL that it stands for instead",
    **dict.fromkeys(
        ("runs", "models", "mlflow-artifacts"),
        "it is MLflow's: mlflow.artifacts.download_artifacts(...) gives a path",
    ),
}
"""What to do where fsspec does not open a scheme."""


def is_url(location: str | os.PathLike[str]) -> bool:
    """Return whether a location starts with a scheme of two or more characters, and needs fsspec.

    Examples
    --------
    >>> is_url("s3://bucket/run-1"), is_url("dbfs:/run-1"), is_url("/dbfs/run-1")
    (True, True, False)
    """
    return _SCHEME.match(os.fspath(location)) is not None


def local_path(text: str) -> Path:
    """Return an absolute path, which means the same in processes with another working directory."""
    if os.name == "posix" and _OF_WINDOWS.match(text):
        raise ConfigurationError(
            f"{text!r} is a path of Windows, which this machine would take for one name: write the "
            "path that it has here, such as /mnt/share/..."
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigurationError(f"the directory {text} is unknown: {error}") from error


def path_of_file_url(url: str) -> str | None:
    """Return the path that a ``file:`` URL names; None for other schemes.

    Examples
    --------
    >>> path_of_file_url("file:/a/b"), path_of_file_url("s3://a/b")
    ('/a/b', None)
    """
    scheme, _, path = url.partition(":")
    if scheme.lower() != "file":
        return None
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
        if host not in {"", "localhost"}:
            raise ArgumentValueError(
                f"{url!r} names the host {host!r}: three slashes come before a path, "
                f"file:///{host}{path}"
            )
    return path


def open_storage(location: str | os.PathLike[str]) -> Storage:
    """Open a path or a URL, which need not exist yet."""
    text = os.fspath(location)
    if not is_url(text):
        return LocalStorage(local_path(text))
    if isinstance(location, PurePath):
        raise ConfigurationError(
            f"{location!r} is a URL in a path object, which drops slashes. Give it as a str."
        )
    return RemoteStorage(text)


class LocalStorage:
    """A directory of a mounted file system; paths in it have ``/`` between their parts."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def url(self, path: str) -> str:
        """Return the full path of what is at `path`."""
        return str(self.root / path)

    def make(self, path: str) -> None:
        """Create a directory, and those above it, unless it is there."""
        (self.root / path).mkdir(parents=True, exist_ok=True)

    def directories(self) -> list[str]:
        """List the names of the directories at the top; none where there is nothing."""
        try:
            return [each.name for each in self.root.iterdir() if each.is_dir()]
        except FileNotFoundError:
            return []

    def refresh(self) -> None:
        """Forget what is remembered of the content: nothing, a disk is always asked."""

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        return (self.root / path).stat().st_size

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading."""
        return (self.root / path).open("rb")

    def read(self, path: str, start: int, end: int) -> bytes:
        """Read a part of a file."""
        with self.open(path) as stream:
            stream.seek(start)
            return stream.read(end - start)

    def create(self, path: str) -> BinaryIO:
        """Open a new file for writing, with the directories above it."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb")

    def files(self) -> list[str]:
        """List the names of the files at the top; none where there is nothing."""
        try:
            return [each.name for each in self.root.iterdir() if each.is_file()]
        except FileNotFoundError:
            return []

    def replace(self, path: str, content: bytes) -> None:
        """Write a small file, instead of what is there; nobody sees half of it."""
        beside = self._write_beside(path, content)
        beside.replace(self.root / path)

    def create_once(self, path: str, content: bytes) -> None:
        """Write a small file, or raise a FileExistsError: of several writers one succeeds."""
        beside = self._write_beside(path, content)
        try:
            # with its content at once, and on NFS, too
            os.link(beside, self.root / path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with self.create(path) as stream:
                stream.write(content)
        finally:
            beside.unlink(missing_ok=True)

    def take(self, other: LocalStorage, name: str) -> None:
        """Move a directory here from another place of the same kind, as it is."""
        (other.root / name).rename(self.root / name)

    def _write_beside(self, path: str, content: bytes) -> Path:
        beside = (self.root / path).with_name(_beside(_UNFINISHED, PurePath(path).name))
        beside.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        return beside

    def begin(self, name: str) -> str:
        """Make an empty directory where the files that are to stand at `name` are written."""
        incoming = _beside(_INCOMING, name)
        self.make(incoming)
        return incoming

    def finish(self, incoming: str, name: str) -> None:
        """Put what was written to `incoming` in its place, instead of what is there."""
        final, aside = self.root / name, self.root / _beside(_REPLACED, name)
        if os.path.lexists(final):
            final.replace(aside)
        try:
            (self.root / incoming).replace(final)
        except OSError:
            self.recover()
            raise
        with suppress(OSError):  # it is there now, whatever fails from here on
            self.remove(aside.name)

    def remove(self, name: str) -> None:
        """Delete a directory and all that is in it."""
        path = self.root / name
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        if not name.startswith(_INCOMING):
            # a crash in the middle leaves the leftover of a write, not a damaged checkpoint
            path = path.replace(self.root / _beside(_INCOMING, name.lstrip(".")))
        shutil.rmtree(path)

    def remove_file(self, path: str) -> None:
        """Delete a file."""
        (self.root / path).unlink()

    def recover(self) -> None:
        """Put back what a crash in the middle of :meth:`finish` left aside."""
        for name in self.directories():
            final = _replaced_name(name)
            if final and not os.path.lexists(self.root / final):
                with suppress(OSError):
                    (self.root / name).replace(self.root / final)

    def leftovers(self) -> list[str]:
        """List what writes that were interrupted long ago left."""
        found = []
        for name in self.directories():
            final = _replaced_name(name)
            is_needed = final and not os.path.lexists(self.root / final)
            if is_needed or not (final or name.startswith(_INCOMING)):
                continue
            with suppress(FileNotFoundError):
                if time.time() - (self.root / name).stat().st_mtime > _LEFTOVER_SECONDS:
                    found.append(name)
        return found


class RemoteStorage:
    """The same behind a URL. Whatever fsspec's implementations raise becomes an OSError."""

    _creating = threading.Lock()

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, root = open_file_system(url)
        if any(character in root for character in "*?["):
            raise ConfigurationError(
                f"the URL {url} has a character that fsspec takes for a pattern (*, ? or [). "
                "Choose one without."
            )
        self._root = root.rstrip("/")

    def url(self, path: str) -> str:
        separator = "" if self._url.endswith("/") else "/"
        return f"{self._url}{separator}{path}" if path else self._url

    def make(self, path: str) -> None:
        self._call("makedirs", path, exist_ok=True)

    def directories(self) -> list[str]:
        self.refresh()
        try:
            entries = self._call("ls", "", detail=True)
        except FileNotFoundError:
            return []
        directories = [each["name"] for each in entries if each["type"] == "directory"]
        return [each.rstrip("/").rpartition("/")[2] for each in directories]

    def refresh(self) -> None:
        with as_os_error(self._url):
            self._fs.invalidate_cache()

    def size(self, path: str) -> int:
        return int(self._call("info", path)["size"])

    def open(self, path: str) -> BinaryIO:
        stream = self._call("open", path, mode="rb")
        if type(stream).__name__ == "MemoryFile":  # one for all who read it
            return io.BytesIO(stream.getvalue())
        return cast(BinaryIO, stream)

    def read(self, path: str, start: int, end: int) -> bytes:
        """Read a part of a file."""
        return cast(bytes, self._call("cat_file", path, start=start, end=end))

    def create(self, path: str) -> BinaryIO:
        self.make(path.rpartition("/")[0])
        return cast(BinaryIO, self._call("open", path, mode="wb"))

    def files(self) -> list[str]:
        self.refresh()
        try:
            entries = self._call("ls", "", detail=True)
        except FileNotFoundError:
            return []
        return [each["name"].rpartition("/")[2] for each in entries if each["type"] == "file"]

    def replace(self, path: str, content: bytes) -> None:
        self.make(path.rpartition("/")[0])
        self._call("pipe_file", path, content)

    def create_once(self, path: str, content: bytes) -> None:
        self.make(path.rpartition("/")[0])
        self.refresh()
        if self._url.partition(":")[0].lower() in _CREATE_ONCE:
            try:
                with self._creating:  # the one in memory looks, and writes then
                    self._call("pipe_file", path, content, mode="create")
            except OSError as error:
                # each implementation has its own error for it
                if path in self.files():
                    raise FileExistsError(errno.EEXIST, "is there", self.url(path)) from error
                raise
            return
        # Without that, all who want to write say so, and the first by name does.
        claim, mine = f"{path}.claim-", secrets.token_hex(8)
        self.replace(f"{claim}{mine}", content)
        try:
            time.sleep(SETTLE_SECONDS)
            is_first = min(each for each in self.files() if each.startswith(claim)) == claim + mine
            if not is_first or path in self.files():
                raise FileExistsError(errno.EEXIST, "is there", self.url(path))
            self.replace(path, content)
        finally:
            time.sleep(SETTLE_SECONDS)  # until then, others are to see it
            self.remove_file(f"{claim}{mine}")

    def take(self, other: RemoteStorage, name: str) -> None:
        """Copy a checkpoint here, its manifest last."""
        other.refresh()
        with as_os_error(other.url(name)):
            paths = self._fs.find(f"{other._root}/{name}")
        start = len(f"{other._root}/".lstrip("/"))
        for path in sorted(paths, key=lambda each: each.endswith(f"{name}/{MANIFEST_NAME}")):
            target = path.lstrip("/")[start:]
            self.make(target.rpartition("/")[0])
            with as_os_error(self.url(target)):
                self._fs.cp_file(path, f"{self._root}/{target}")

    def begin(self, name: str) -> str:
        self.remove(name)
        self.make(name)
        return name

    def finish(self, incoming: str, name: str) -> None:
        pass  # the manifest, which is there by now, makes it count

    def remove(self, name: str) -> None:
        # the manifest first: a crash in the middle leaves an incomplete one, not a damaged one
        with suppress(FileNotFoundError):
            self.remove_file(f"{name}/{MANIFEST_NAME}")
        with suppress(FileNotFoundError):
            self._call("rm", name, recursive=True)

    def remove_file(self, path: str) -> None:
        self._call("rm", path)

    def recover(self) -> None:
        pass  # nothing is put aside

    def leftovers(self) -> list[str]:
        return []  # what lacks a manifest could be just being written, and ages are not known

    def _call(self, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of fsspec's file system with the full path."""
        with as_os_error(self.url(path)):
            full = f"{self._root}/{path}" if path else self._root or "/"
            return getattr(self._fs, method)(full, *arguments, **options)


Storage: TypeAlias = LocalStorage | RemoteStorage


def open_file_system(url: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system for a URL with one slash or two, and the path in it.

    The error's text has what to install, or to write instead.
    """
    scheme, _, rest = url.partition(":")
    scheme = scheme.lower()
    try:
        import fsspec
    except ImportError as error:
        raise ConfigurationError(
            f"{url} has the scheme {scheme!r}, which needs fsspec: pip install fsspec"
        ) from error
    if (path := path_of_file_url(url)) is not None:
        rest = f"//{path}"
    # fsspec takes "dbfs:/run" for the name of a local file
    full = f"{scheme}:{rest}" if rest.startswith("//") else f"{scheme}://{rest}"
    try:
        fs, root = fsspec.core.url_to_fs(full, **options)
    except Exception as error:  # what connects at once fails in its own ways
        package = _PACKAGES.get(scheme)
        is_missing = isinstance(error, ImportError) or "Protocol not known" in str(error)
        if is_missing and package:
            advice = f"pip install {package}, here and on the executors"
        elif scheme in _INSTEAD:
            advice = _INSTEAD[scheme].format(path=rest.lstrip("/"))
        elif is_missing:
            advice = "install the package that knows it, here and on the executors, or give a path"
        else:
            advice = "check the URL and what its file system needs"
        why = ", for which fsspec needs another package" if isinstance(error, ImportError) else ""
        raise ConfigurationError(
            f"fsspec cannot open {url} (scheme {scheme!r}{why}): {advice} ({in_one_line(error)})"
        ) from error
    return fs, str(root)


@contextmanager
def as_os_error(where: str) -> Iterator[None]:
    """Raise an OSError, which names the path or URL, instead of any other exception."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:
            error.filename = where
        raise
    except Exception as error:  # every fsspec implementation has errors of its own
        raise OSError(f"{where}: {type(error).__name__}: {error}") from error


def _beside(prefix: str, name: str) -> str:
    return f"{prefix}{name}-{secrets.token_hex(4)}"


def _replaced_name(name: str) -> str:
    return name[len(_REPLACED) :].rpartition("-")[0] if name.startswith(_REPLACED) else ""
