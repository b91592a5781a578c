"""Variables of real ranks: which win, which go, and that nobody else sees a secret."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import ArgumentValueError, HorovodRunner, WorkerFailedError

SECRET = "q7-marker-of-a-secret"


def seen(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def test_what_the_user_sets_wins_from_the_start_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main() -> Any:
        variables = seen("WANDB_MODE", "HF_HUB_OFFLINE", "GONE", "OMP_NUM_THREADS")
        return variables, sys.flags.optimize, sys.flags.hash_randomization

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("GONE", "still here")
    given: dict[str, str | None] = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    given |= {"GONE": None, "OMP_NUM_THREADS": "3", "PYTHONOPTIMIZE": "2"}
    runner = HorovodRunner(np=-1, environment=given)
    given["WANDB_MODE"] = "changed afterwards"
    variables, optimize, randomized = runner.run(main)
    assert variables == {
        "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "GONE": None, "OMP_NUM_THREADS": "3"
    }  # fmt: skip
    assert optimize == 2
    assert randomized == 0  # the ranks' seed is one number


def test_a_random_hash_seed_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    def main(directory: Path) -> None:
        path = directory / os.environ["RANK"]
        path.write_text(f"{os.environ['PYTHONHASHSEED']} {hash('a text')}")

    HorovodRunner(np=-2, environment={"PYTHONHASHSEED": "random"}).run(main, directory=tmp_path)
    one, other = (path.read_text() for path in tmp_path.iterdir())
    assert one == other
    assert one.split()[0].isdigit()


def test_it_holds_after_a_restart_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(directory: Path) -> Any:
        if not (directory / "begun").exists():
            (directory / "begun").touch()
            os.kill(os.getpid(), 9)
        return seen("A", "MY_TOKEN")

    monkeypatch.setenv("MY_TOKEN", "t")
    runner = HorovodRunner(np=-1, environment={"A": "1"}, forward=["MY_TOKEN"], max_restarts=1)
    assert runner.run(main, directory=tmp_path) == {"A": "1", "MY_TOKEN": "t"}


@pytest.mark.heavy
def test_a_warm_worker_has_the_environment_of_its_own_run() -> None:
    pytest.importorskip("torch")

    def main() -> Any:
        import torch

        return os.environ.get("A"), torch.get_num_threads()

    def run(**environment: str) -> Any:
        return HorovodRunner(np=-1, keep_warm=True, environment=environment).run(main)

    assert run(A="1", OMP_NUM_THREADS="1") == ("1", 1)
    assert run(A="2", OMP_NUM_THREADS="2") == ("2", 2)
    assert run(OMP_NUM_THREADS="1") == (None, 1)


def test_horovodrun_args_that_say_something_else_are_refused() -> None:
    pytest.importorskip("horovod")
    variables: dict[str, str | None] = {"HOROVOD_CYCLE_TIME": "7"}
    options = ["--cycle-time-ms", "2"]
    with pytest.raises(ArgumentValueError, match="both set HOROVOD_CYCLE_TIME"):
        HorovodRunner(np=-1, horovodrun_args=options, environment=variables)


def files_with(secret: str, *places: Path) -> list[Path]:
    every = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert every
    return [path for path in every if secret.encode() in path.read_bytes()]


def test_the_runner_shows_no_secret_of_its_options() -> None:
    options = {"WANDB_API_KEY": SECRET, "WANDB_MODE": "offline", "GIT": "ghp_" + "a1" * 20}
    runner = HorovodRunner(np=-1, environment=options)
    for text in (repr(runner), runner._repr_html_()):
        assert "offline" in text
        assert SECRET not in text
        assert "a1a1" not in text


def test_no_record_and_no_command_line_has_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def main(directory: Path) -> str:
        value = os.environ["HARMLESS_NAME"]
        commands = [
            (process / "cmdline").read_bytes()
            for process in Path("/proc").iterdir()
            if process.name.isdigit() and (process / "cmdline").exists()
        ]
        (directory / "commands").write_bytes(b"\n".join(commands))
        assert os.environ["WANDB_API_KEY"] == f"{value}-2"
        for line in (value, *os.environ["SEVERAL_LINES"].splitlines()):
            print("main shows", line)
        raise ValueError(f"main tells {value}")

    monkeypatch.setenv("HARMLESS_NAME", SECRET)
    monkeypatch.setenv("SEVERAL_LINES", f"-----BEGIN\n{SECRET[::-1]}\n")
    monkeypatch.setenv("HOROVODRUNNER_LOG", "debug")
    runner = HorovodRunner(
        np=-1,
        run_dir=tmp_path / "runs",
        environment={"WANDB_API_KEY": f"{SECRET}-2"},
        forward=["HARMLESS_*", "SEVERAL_*"],
        progress=False,
    )
    with pytest.raises(WorkerFailedError):
        runner.run(main, directory=tmp_path)
    assert files_with("(not shown)", tmp_path / "runs")
    assert files_with(SECRET, tmp_path) == []
    assert files_with(SECRET[::-1], tmp_path) == []
    out, err = capfd.readouterr()
    shown = [line for line in (out + err).splitlines() if SECRET in line]
    assert "rank 0: its process ended" in err  # the log is there
    # what main itself shows is the user's own
    assert all("main shows" in line or "main tells" in line for line in shown), shown
