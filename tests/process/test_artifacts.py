"""Files that ranks leave, on the driver, however the ranks end."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import pytest

from horovodrunner import ArgumentValueError, HorovodRunner, WorkerFailedError, artifacts
from horovodrunner.flows.artifacts import places, store
from horovodrunner.flows.artifacts.store import ArtifactStore
from horovodrunner.flows.artifacts.task import files_to_bring
from horovodrunner.wire.upload import Piece


def tree(directory: Path | None) -> dict[str, str]:
    assert directory is not None
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file()
    }


def leave(text: str) -> None:
    artifacts.path("notes.txt").write_text(text + os.environ["RANK"])
    artifacts.path("samples/7.txt").write_text("seven")
    (artifacts.path() / "link").symlink_to("notes.txt")
    (artifacts.path() / "nowhere").symlink_to("not there")
    os.mkfifo(artifacts.path("pipe"))


def test_every_ranks_files_come() -> None:
    runner = HorovodRunner(np=-2)
    assert not runner.artifacts
    runner.run(leave, text="of ")
    assert tree(runner.artifacts) == {
        **{f"rank-{rank}/notes.txt": f"of {rank}" for rank in (0, 1)},
        **{f"rank-{rank}/link": f"of {rank}" for rank in (0, 1)},
        **{f"rank-{rank}/samples/7.txt": "seven" for rank in (0, 1)},
    }
    directory = str(runner.artifacts)
    runner.run(lambda: None)
    assert not runner.artifacts
    assert not Path(directory).exists()


@pytest.mark.parametrize("how", ["exception", "kill"])
def test_they_come_from_ranks_that_failed(how: str) -> None:
    def main() -> None:
        artifacts.path("before.txt").write_text(how)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("diverged")

    runner = HorovodRunner(np=-1)
    with pytest.raises(WorkerFailedError):
        runner.run(main)
    assert tree(runner.artifacts) == {"rank-0/before.txt": how}


def test_those_of_an_earlier_attempt_are_kept(tmp_path: Path) -> None:
    def main() -> None:
        is_first = not (tmp_path / "was here").exists()
        (tmp_path / "was here").touch()
        artifacts.path("x").write_text("first" if is_first else "second")
        if is_first:
            os.kill(os.getpid(), signal.SIGKILL)

    runner = HorovodRunner(np=-1, max_restarts=1)
    runner.run(main)
    assert tree(runner.artifacts) == {"rank-0/x": "second", "attempt-1/rank-0/x": "first"}


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\0b"])
def test_a_path_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ArgumentValueError, match="relative to the rank's own directory"):
        artifacts.path(name)


def test_what_is_too_much_of_a_rank_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("horovodrunner.flows.artifacts.task.MAX_RANK_BYTES", 100)
    for name, size in {"rank-0/a": 60, "rank-0/b": 50, "rank-0/c": 40, "rank-1/d": 90}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
    files, left_out = files_to_bring(tmp_path)
    assert sorted(files) == ["rank-0/b", "rank-0/c", "rank-1/d"]
    assert "rank-0/a (60 bytes)" in left_out
    assert left_out.startswith("artifacts are left out, because 100 bytes of each rank")


def piece(name: str, size: int = 3) -> Piece:
    return Piece(name, size, [b"x" * size])


@pytest.mark.parametrize("name", ["x", "rank-0/../../x", "rank-x/y", "/rank-0/x", "rank-0/"])
def test_the_driver_takes_files_of_ranks_only(name: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)):
        ArtifactStore(tmp_path / "artifacts")._put(piece(name))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_too_much_of_a_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_RUN_BYTES", 5)
    kept = ArtifactStore(tmp_path)
    kept._put(piece("rank-0/a"))
    with pytest.raises(OSError, match=r"rank-0/b has 3 bytes.*more than 5 bytes"):
        kept._put(piece("rank-0/b"))
    assert tree(kept.directory) == {"rank-0/a": "xxx"}
    assert places.MAX_RUN_BYTES > places.MAX_RANK_BYTES


def test_one_file_that_cannot_be_taken_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_RUN_BYTES", 10)
    kept = ArtifactStore(tmp_path)
    pieces = [piece("rank-0/a"), piece("rank-0/b", 9), piece("rank-0/c\\d"), piece("rank-1/e")]
    with pytest.raises(OSError, match=r"^rank-0/b has 9 bytes.*1 more like it.*others are kept"):
        kept._put_all(pieces)
    assert tree(kept.directory) == {"rank-0/a": "xxx", "rank-1/e": "xxx"}
    with pytest.raises(OSError, match=r"^rank-0/gone: No such file.*others are kept"):
        kept.take({"rank-0/gone": tmp_path / "gone", "rank-0/f": tmp_path / "rank-0/a"})
    assert "rank-0/f" in tree(kept.directory)


def test_odd_names_and_processes_that_main_forks() -> None:
    names = ["ä\n☃", "l" * 255, os.fsdecode(b"\xff")]

    def main() -> None:
        for name in names:
            artifacts.path(Path(name)).write_text("x")
        os.chdir("/")
        child = os.fork()  # noqa: TID251 - a rank's
        if child == 0:
            artifacts.path("of a child").write_text("x")
            os._exit(0)
        os.waitpid(child, 0)

    runner = HorovodRunner(np=-1)
    runner.run(main)
    assert sorted(tree(runner.artifacts)) == sorted(f"rank-0/{it}" for it in [*names, "of a child"])


def test_a_copy_of_a_runner_leaves_its_files_alone() -> None:
    runner = HorovodRunner(np=-2)
    runner.run(leave, text="of ")
    twin = copy.deepcopy(runner)
    twin._last.artifacts.discard()
    del twin
    assert "rank-0/notes.txt" in tree(runner.artifacts)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank-0").mkdir()
    for name in ("secret", "x"):
        (tmp_path / "rank-0" / name).touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "secret")  # root reads all
    files, left_out = files_to_bring(tmp_path)
    assert [*files] == ["rank-0/x"]
    assert left_out == "artifacts are left out, because they cannot be read: rank-0/secret"


def test_a_profile_is_an_artifact() -> None:
    def main() -> None:
        import torch

        with artifacts.torch_profiler(wait=0, warmup=1, active=2) as profiler:
            for _ in range(4):
                torch.ones(2).sum()
                profiler.step()

    runner = HorovodRunner(np=-1)
    runner.run(main)
    ((name, text),) = tree(runner.artifacts).items()
    assert name == "rank-0/trace-3.json"
    assert "traceEvents" in text
