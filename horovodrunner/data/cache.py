"""The data sets that this driver has stored, and their end. Runs in: the driver."""

from __future__ import annotations

import atexit
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from horovodrunner.data.dataset import DataSet
from horovodrunner.data.origin import Origin
from horovodrunner.data.stored import MANIFEST, Manifest
from horovodrunner.errors import DataError
from horovodrunner.storage import LocalStorage, open_storage

__all__ = ["DataSetCache", "cache"]


@dataclass
class _Entry:
    location: str
    manifest: Manifest
    origin: Origin | None
    """What the rows were computed from, if that can be told."""
    settings: Any
    """What else the stored rows depend on."""
    used_at: float = field(default_factory=time.monotonic)
    handle: Callable[[], DataSet | None] = lambda: None


class DataSetCache:
    """The data sets that were stored and not deleted yet, by their location.

    A data set that nobody holds a handle of is kept for the next ``from_dataframe`` that would
    compute the same rows, until the space is needed.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Leave all data sets to somebody else, as to the parent of a forked process."""
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()

    def find(self, origin: Origin, settings: Any) -> DataSet | None:
        """Return the data set, if it is stored, that rows of this origin would become."""
        with self._lock:
            for entry in list(self._entries.values()):
                if entry.settings != settings or entry.origin is None:
                    continue
                if entry.origin.is_same_as(origin):
                    if _is_there(entry.location):
                        return self._handle(entry)
                    self.delete(entry.location)  # somebody else has emptied the directory
        return None

    def add(
        self,
        location: str,
        manifest: Manifest,
        limit: int | None,
        *,
        origin: Origin | None = None,
        settings: Any = None,
    ) -> DataSet:
        """Take in a data set that is complete.

        `limit` is how many bytes all data sets may have together, by default half of what the disk
        has free. Raises DataError if there is no room even without those that nobody holds.
        """
        with self._lock:
            self._entries[location] = entry = _Entry(location, manifest, origin, settings)
            handle = self._handle(entry)
            self._make_room(entry, limit)
            return handle

    def delete(self, location: str) -> None:
        with self._lock:
            entry = self._entries.pop(location, None)
        if entry is not None:
            remove(location)

    def delete_all(self) -> None:
        """Delete all that this process has stored."""
        for location in list(self._entries):
            with suppress(OSError):
                self.delete(location)

    def _handle(self, entry: _Entry) -> DataSet:
        entry.used_at = time.monotonic()
        handle = entry.handle()
        if handle is None:
            location, manifest = entry.location, entry.manifest
            handle = DataSet(
                location, manifest.rows, manifest.columns, on_delete=lambda: self.delete(location)
            )
            entry.handle = weakref.ref(handle)
        return handle

    def _make_room(self, new: _Entry, limit: int | None) -> None:
        entries = sorted(self._entries.values(), key=lambda each: each.used_at)
        total = sum(each.manifest.size for each in entries)
        if limit is None:
            limit = _limit_of_disk(new.location, total)
        for entry in entries:
            if total > limit and entry is not new and entry.handle() is None:
                self.delete(entry.location)
                total -= entry.manifest.size
        if total > limit:
            self.delete(new.location)
            held = ", ".join(repr(e.handle()) for e in entries if e is not new and e.handle())
            raise DataError(
                f"the data set has {new.manifest.size:,} bytes, and with those that are in use "
                f"({held or 'none'}) that is {total:,}, more than the limit of {limit:,}: delete() "
                "what is not needed any more, set spark.horovodrunner.data.cacheLimit (bytes), or "
                "give a cache_dir with more room"
            )


def _limit_of_disk(location: str, stored_bytes: int) -> int:
    """Allow half of what would be free without any data set."""
    storage = open_storage(location)
    if not isinstance(storage, LocalStorage):
        return 2**63
    return (shutil.disk_usage(storage.root).free + stored_bytes) // 2


def _is_there(location: str) -> bool:
    """Return whether a data set can be reached."""
    storage = open_storage(location)
    storage.refresh()
    try:
        return storage.size(MANIFEST) > 0
    except OSError:
        return False


def remove(location: str) -> None:
    """Delete a data set's directory."""
    above, _, name = location.rstrip("/").rpartition("/")
    storage = open_storage(above or "/")
    with suppress(FileNotFoundError):
        storage.remove(name)


cache = DataSetCache()
atexit.register(cache.delete_all)
os.register_at_fork(after_in_child=cache.forget)
