"""What the tests' own processes leave: nothing, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.processes import PIPE, STDOUT, Process, TimeoutExpired, run, started

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:
    child = [sys.executable, __file__, *sys.argv[2:]]
    subprocess.Popen(child, start_new_session=True, stdin=subprocess.DEVNULL, stdout=sys.stdout)
print("ready", os.getpid(), flush=True)
if sys.argv[1:2] != ["leave"]:
    time.sleep(600)
"""
"""Starts one more of itself for each argument, in sessions of their own; "leave" ends at once."""


@pytest.fixture
def stubborn(tmp_path: Path) -> list[str]:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    return [sys.executable, str(script)]


def pids(stream: object, count: int) -> list[int]:
    """Read who is ready."""
    assert hasattr(stream, "readline")
    return [int(stream.readline().split()[1]) for _ in range(count)]


def is_running(pid: int) -> bool:
    return bool(processes.command_of(pid))  # none of a zombie


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_all_descendants_end_with_the_block(
    stubborn: list[str], error: type[BaseException] | None
) -> None:
    found: list[int] = []
    try:
        with started([*stubborn, "child", "grandchild"], stdout=PIPE) as process:
            found = pids(process.stdout, 3)
            assert all(is_running(pid) for pid in found)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error is not None
    assert not any(is_running(pid) for pid in found)
    assert process.returncode == -signal.SIGKILL


def test_a_descendant_that_dropped_the_mark_ends_with_the_group() -> None:
    without = "import os, sys; os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {})"
    sleep = "import os, time; print('ready', os.getpid(), flush=True); time.sleep(600)"
    with started([sys.executable, "-c", without, "-c", sleep], stdout=PIPE) as process:
        [found] = pids(process.stdout, 1)
    assert not is_running(found)


def test_a_command_that_takes_too_long_ends_with_all_its_descendants(
    stubborn: list[str], tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w+") as out:
        with pytest.raises(TimeoutExpired):
            run([*stubborn, "child"], stdout=out, timeout=2)
        out.seek(0)
        found = [int(line.split()[1]) for line in out]
    assert not any(is_running(pid) for pid in found)


def test_who_ends_and_leaves_somebody_fails_the_test(
    stubborn: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LEAVING_SECONDS", 0.1)
    with (tmp_path / "out").open("w+") as out:
        with pytest.raises(AssertionError, match=r"left behind: .*stubborn\.py"):
            run([*stubborn, "leave"], stdout=out)
        out.seek(0)
        found = [int(line.split()[1]) for line in out]
    assert not any(is_running(pid) for pid in found)


TESTS = """
    import os, pathlib, signal, subprocess, sys, time
    import pytest
    from tests import processes

    processes.LEAVING_SECONDS = 0.1

    def start():
        stubborn = [sys.executable, "stubborn.py", "child"]
        with open(f"out{os.getpid()}", "w") as out:
            subprocess.Popen(stubborn, stdout=out, start_new_session=True)
        while pathlib.Path(out.name).read_text().count("\\n") < 2:
            time.sleep(0.01)

    def test_fails():
        start()
        assert False

    def test_leaks():
        start()

    def test_is_alone():
        [out] = pathlib.Path().glob("out*")
        pids = [line.split()[1] for line in out.read_text().splitlines()]
        assert not any(processes.command_of(int(pid)) for pid in pids)

    def test_waits():
        start()
        open("both run", "w").close()
        time.sleep(600)

    def test_crashes():
        start()
        os.kill(os.getpid(), signal.SIGKILL)

    @pytest.mark.timeout(5, method="thread")
    def test_hangs():
        start()
        time.sleep(600)
"""


@contextlib.contextmanager
def session_of_tests(folder: Path, *options: str) -> Iterator[Process]:
    """Start a session of those tests, which has what all tests have from conftest.py."""
    (folder / "test_it.py").write_text(textwrap.dedent(TESTS))
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path[1:]])}
    with started(
        [*command, "--rootdir=.", *options, "test_it.py"],
        cwd=folder,
        env=environment,
        stdout=PIPE,
        stderr=STDOUT,
    ) as session:
        yield session


def test_what_a_test_leaves_fails_it_and_is_ended(stubborn: list[str]) -> None:
    with session_of_tests(Path(stubborn[1]).parent, "-k", "leaks or alone") as session:
        output, _ = session.communicate()
    assert "2 passed, " in output, output
    assert "1 error" in output
    assert "left behind: " in output


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        ("fails", 0),
        pytest.param("fails", 2, marks=pytest.mark.slow),
        pytest.param("waits for Ctrl-C", 0, marks=pytest.mark.slow),
        ("waits for Ctrl-C", 2),
        pytest.param("waits for SIGKILL", 0, marks=pytest.mark.slow),
        ("waits for SIGKILL", 2),
        ("crashes", 2),
        ("hangs", 2),
    ],
)
def test_a_session_leaves_nothing(stubborn: list[str], how: str, workers: int) -> None:
    folder = Path(stubborn[1]).parent
    (folder / "test_it.py").write_text(textwrap.dedent(TESTS))
    os.mkfifo(folder / "both run")
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir=.", "-x"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        f"-n{workers}",
        "-k",
        how.partition(" ")[0],
    ]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path[1:]])}
    with started(
        [*command, "test_it.py"], cwd=folder, env=environment, stdout=PIPE, stderr=STDOUT
    ) as session:
        if how.startswith("waits"):
            with (folder / "both run").open():
                pass
            if "Ctrl-C" in how:
                os.killpg(session.pid, signal.SIGINT)  # as a terminal does
            else:
                session.kill()
        output, _ = session.communicate()
    # Somebody who was still there after the session, and not ended by it, would have failed here.
    [out] = folder.glob("out*")
    found = [int(line.split()[1]) for line in out.read_text().splitlines()]
    assert len(found) == 2, output
    assert session.returncode != 0, output
    assert not any(is_running(pid) for pid in found)
