"""How a worker ends once its outcome is safe: what others rely on is done."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner
from tests import processes


def test_a_worker_ends_as_an_interpreter_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit functions, threads, open files, C's buffers: nothing that was written is lost."""

    def main(directory: str) -> None:
        import atexit
        import ctypes
        import gzip
        import sys
        import threading
        import time

        def say_goodbye() -> None:
            print("an exit function was called")
            sys.stdout.write("an unfinished line")

        def write_late() -> None:
            time.sleep(0.3)
            Path(directory, "thread").write_text("done")

        atexit.register(say_goodbye)
        threading.Thread(target=write_late).start()
        kept: list[Any] = [
            Path(directory, "text").open("w"),  # noqa: SIM115 - that is what it is about
            gzip.open(f"{directory}/text.gz", "wt"),  # noqa: SIM115
            Path(directory, "bytes").open("wb"),  # noqa: SIM115
        ]
        kept[0].write("text")
        kept[1].write("compressed")
        kept[2].write(b"bytes")
        kept.append(kept)  # a cycle, which only the garbage collector frees
        sys.modules["kept_by_the_test"] = kept  # type: ignore[assignment]
        ctypes.CDLL(None).puts(b"printed by C, in its buffer")

    HorovodRunner(np=-1).run(main, directory=str(tmp_path))
    shown = capfd.readouterr().out
    assert "[0]<stdout>:an exit function was called" in shown
    assert "[0]<stdout>:an unfinished lineprinted by C, in its buffer" in shown
    assert tmp_path.joinpath("thread").read_text() == "done"
    assert tmp_path.joinpath("text").read_text() == "text"
    assert tmp_path.joinpath("bytes").read_bytes() == b"bytes"
    gunzip = processes.run(["gzip", "-dc", tmp_path / "text.gz"], stdout=processes.PIPE)
    assert gunzip.stdout == "compressed"


@pytest.mark.parametrize(
    ("loaded", "injected", "expected"),
    [("json", "", ""), ("netCDF4", "", "freed"), ("json", "profiler", "freed")],
)
def test_what_needs_the_ordinary_way_out_gets_it(loaded: str, injected: str, expected: str) -> None:
    script = f"""
        import os, sys, types
        from horovodrunner.processes.worker.leaving import leave

        class Global:
            def __del__(self, write=os.write):
                write(1, b"freed")

        kept = Global()
        sys.modules.setdefault({loaded!r}, types.ModuleType({loaded!r}))
        leave(3)
    """
    done = processes.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        env={**os.environ, "CUDA_INJECTION64_PATH": injected},
    )
    assert (done.returncode, done.stdout) == (3, expected)


def test_hdf5_files_are_complete(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    script = f"""
        import h5py
        from horovodrunner.processes.worker.leaving import leave

        kept = h5py.File({str(tmp_path / "weights.h5")!r}, "w")
        kept["weights"] = [1.0, 2.0]
        leave(0)
    """
    processes.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    with h5py.File(tmp_path / "weights.h5") as file:
        assert file["weights"][:].tolist() == [1.0, 2.0]
