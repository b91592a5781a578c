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

from horovodrunner.core.places import LocalPlace, open_place
from horovodrunner.data.dataset import DataSet
from horovodrunner.data.stored import Manifest
from horovodrunner.errors import DataError

__all__ = ["DataSetCache", "cache"]


@dataclass
class _Entry:
    identity: str
    location: str
    manifest: Manifest
    is_of: Callable[[Any, Any], bool]
    """Whether a DataFrame, stored with certain settings, is this data set."""
    owner: int = field(default_factory=os.getpid)
    used_at: float = field(default_factory=time.monotonic)
    handle: Callable[[], DataSet | None] = lambda: None


class DataSetCache:
    """What was stored and not deleted yet.

    A data set that nobody holds a handle of is kept for the next ``from_dataframe`` of the same
    plan, until the space is needed.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()

    def find(self, df: Any, settings: Any) -> DataSet | None:
        """Look for the data set of a DataFrame.

        Parameters
        ----------
        df
            The DataFrame.
        settings
            What else the stored rows depend on.

        Returns
        -------
        DataSet or None
            Its handle, if it was stored.
        """
        with self._lock:
            for entry in list(self._entries.values()):
                if entry.owner == os.getpid() and entry.is_of(df, settings):
                    return self._handle(entry)
        return None

    def add(
        self,
        identity: str,
        location: str,
        manifest: Manifest,
        is_of: Callable[[Any, Any], bool],
        limit: int | None,
    ) -> DataSet:
        """Take in a data set that is complete.

        Parameters
        ----------
        identity
            Names it among all there are.
        location
            Its directory or URL.
        manifest
            What it consists of.
        is_of
            Whether a DataFrame, stored with certain settings, is this data set.
        limit
            Bytes that all data sets may have together; None: half of what the disk has free.

        Returns
        -------
        DataSet
            Its handle.

        Raises
        ------
        DataError
            If there is no room for it even without those that nobody holds.
        """
        with self._lock:
            self._entries[identity] = entry = _Entry(identity, location, manifest, is_of)
            handle = self._handle(entry)
            self._make_room(entry, limit)
            return handle

    def delete(self, identity: str) -> None:
        """Delete a data set.

        Parameters
        ----------
        identity
            Which one; unknown ones are gone already.
        """
        with self._lock:
            entry = self._entries.pop(identity, None)
        if entry is not None and entry.owner == os.getpid():
            remove(entry.location)

    def delete_all(self) -> None:
        """Delete all that this process has stored."""
        for identity in list(self._entries):
            with suppress(OSError):
                self.delete(identity)

    def _handle(self, entry: _Entry) -> DataSet:
        entry.used_at = time.monotonic()
        handle = entry.handle()
        if handle is None:
            handle = DataSet(
                entry.identity,
                entry.location,
                entry.manifest.rows,
                entry.manifest.columns,
                on_delete=lambda: self.delete(entry.identity),
            )
            entry.handle = weakref.ref(handle)
        return handle

    def _make_room(self, new: _Entry, limit: int | None) -> None:
        entries = [each for each in self._entries.values() if each.owner == os.getpid()]
        total = sum(each.manifest.size for each in entries)
        if limit is None:
            limit = _limit_of_disk(new.location, total)
        for entry in sorted(entries, key=lambda each: each.used_at):
            if total > limit and entry is not new and entry.handle() is None:
                self.delete(entry.identity)
                total -= entry.manifest.size
        if total > limit:
            self.delete(new.identity)
            held = ", ".join(repr(e.handle()) for e in entries if e is not new and e.handle())
            raise DataError(
                f"the data set has {new.manifest.size:,} bytes, and with those that are in use "
                f"({held or 'none'}) that is {total:,}, more than the limit of {limit:,}: delete() "
                "what is not needed any more, set spark.horovodrunner.data.cacheLimit (bytes), or "
                "give a cache_dir with more room"
            )


def _limit_of_disk(location: str, stored_bytes: int) -> int:
    """Allow half of what would be free without any data set."""
    place = open_place(location)
    if not isinstance(place, LocalPlace):
        return 2**63
    return (shutil.disk_usage(place.root).free + stored_bytes) // 2


def remove(location: str) -> None:
    """Delete a data set's directory.

    Parameters
    ----------
    location
        The directory or URL, which has nothing else in it.
    """
    above, _, name = location.rstrip("/").rpartition("/")
    place = open_place(above or "/")
    with suppress(FileNotFoundError):
        place.remove(name)


cache = DataSetCache()
atexit.register(cache.delete_all)
