"""Uploads a run's directory while it grows. Runs in: the driver."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.rundir import layout
from horovodrunner.storage import as_os_error, open_storage

__all__ = ["RecordUpload"]

PAUSE_SECONDS = 30.0
"""How often what has changed is uploaded."""

SMALL_BYTES = 8 * 1024 * 1024
"""A larger file is uploaded again when it has grown by half, and at last: as a whole, each time."""

END_SECONDS = 300.0
"""How long the run's end waits for the last files."""

_COPIED_BYTES = 1024 * 1024


class RecordUpload:
    """Copies a local directory to a URL, in a thread of its own."""

    def __init__(self, url: str, name: str) -> None:
        self._storage = open_storage(url)
        self._name = name
        self.location = self._storage.url(name)
        try:
            self._storage.make(name)
        except OSError as error:
            raise ConfigurationError(
                f"run_dir={url!r}: the record of the run cannot be written there: {error}. Check "
                "the URL and its credentials"
            ) from error
        self._directory = Path()
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._ending = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="horovodrunner-upload", daemon=True)

    def begin(self, directory: Path) -> None:
        """Begin to upload what is in a directory."""
        self._directory = directory
        self._thread.start()

    def end(self) -> None:
        """Upload the rest, and wait for it, for a bounded time; OSError if it is not there."""
        self._ending.set()
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self._error = TimeoutError(f"the upload takes more than {END_SECONDS:g} s")
        if self._error is not None:
            raise OSError(f"{self._error}; all of it is in {self._directory} on the driver")

    def _run(self) -> None:
        while not self._ending.wait(PAUSE_SECONDS):
            self._upload_changed(is_last=False)
        self._upload_changed(is_last=True)

    def _upload_changed(self, *, is_last: bool) -> None:
        """Upload what has changed; what fails now may succeed the next time."""
        self._error = None
        for path in sorted(self._directory.rglob("*")):
            try:
                if path.is_file() and not layout.is_unfinished(path):
                    self._upload(path, is_last=is_last)
            except OSError as error:
                self._error = error

    def _upload(self, path: Path, *, is_last: bool) -> None:
        status = path.stat()
        now = (status.st_size, status.st_mtime_ns)
        size, _ = before = self._uploaded.get(path, (0, 0))
        is_due = is_last or status.st_size <= SMALL_BYTES or status.st_size >= 1.5 * size
        if now == before or not is_due:
            return
        name = path.relative_to(self._directory).as_posix()
        with (
            as_os_error(f"{self.location}/{name}"),
            path.open("rb") as source,
            self._storage.create(f"{self._name}/{name}") as target,
        ):
            shutil.copyfileobj(source, target, _COPIED_BYTES)
        self._uploaded[path] = now
