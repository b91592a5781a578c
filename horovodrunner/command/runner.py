"""A HorovodRunner whose run belongs to a shell: two streams, and a file per rank.

Runs in: the driver.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentValueError
from horovodrunner.flows.observer import Observer
from horovodrunner.flows.script.driver import prepare_script
from horovodrunner.runner import HorovodRunner
from horovodrunner.wire.events import Lines

__all__ = ["CommandRunner", "RankFiles"]


class CommandRunner(HorovodRunner):
    """Shows what ranks write to standard error there, and keeps all they write in files."""

    def __init__(self, *, output_filename: str | None, verbose: bool, **options: Any) -> None:
        super().__init__(**options)
        self._output = None if output_filename is None else _directory(output_filename)
        self._options = replace(self._options, errors_apart=True, shows_routine=verbose)
        if (output := self._output) is not None:
            size = abs(self._options.np)
            # made with the run: one that was done before keeps its files
            self._options = replace(
                self._options, other_observers=(lambda facts: RankFiles(output, size),)
            )

    def check_script(self, script: str, arguments: Sequence[str], code_dir: str | None) -> None:
        """Refuse what :meth:`run_script` would refuse, without packing anything."""
        prepare_script(script, arguments, code_dir, travels=False, left_out=())

    def _left_out(self) -> list[str]:
        return [*super()._left_out(), *([] if self._output is None else [str(self._output)])]


class RankFiles(Observer):
    """Writes ``rank.N/stdout`` and ``rank.N/stderr``, as horovodrun does; each run begins anew."""

    title = "writing --output-filename"
    wants_output = True

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._width = len(str(max(0, size - 1)))
        self._files: dict[tuple[int, str], IO[bytes]] = {}
        self.handlers = {Lines: self._write}
        try:
            for old in directory.glob("rank.*"):
                if old.name.removeprefix("rank.").isdecimal():
                    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            for rank in range(size):
                for stream in ("stdout", "stderr"):
                    self._file(rank, stream)
        except OSError as error:
            raise ArgumentValueError(
                f"--output-filename {directory}: what ranks print cannot be written there: "
                f"{error}; name another directory"
            ) from error

    def end(self, error: BaseException | None) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _write(self, event: Lines) -> None:
        self._file(event.rank, event.stream).write(event.lines)

    def _file(self, rank: int, stream: str) -> IO[bytes]:
        if (rank, stream) not in self._files:
            directory = self._directory / f"rank.{rank:0{self._width}}"
            directory.mkdir(exist_ok=True)
            self._files[rank, stream] = (directory / stream).open("wb", buffering=0)
        return self._files[rank, stream]


def _directory(name: str) -> Path:
    path = Path(os.path.abspath(checked.path("--output-filename", name)))  # noqa: PTH100
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentValueError(
            f"--output-filename {name}: it cannot be a directory: {error}; name another one"
        ) from error
    return path
