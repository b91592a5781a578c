"""Scripts that were written for horovodrun and for torchrun run unchanged."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner
from horovodrunner.command.horovodrun import HOROVODRUN
from tests import processes

pytestmark = pytest.mark.horovod

SCRIPTS = Path(__file__).parents[1] / "scripts"
STYLES = ["horovodrun_style.py", "torchrun_style.py"]


def expected(style: str) -> list[str]:
    return [
        *(f"[{rank}]<stdout>:rank {rank} of 2: 2 epochs, same=True" for rank in (0, 1)),
    ]


@pytest.mark.heavy
@pytest.mark.parametrize("style", STYLES)
def test_the_command_takes_the_place_of_theirs(style: str) -> None:
    """And reads Horovod's options."""
    words = ["-np", "-2", "--cycle-time-ms", "5", "python", str(SCRIPTS / style), "--epochs", "2"]
    command = [sys.executable, "-m", "horovodrunner", "run"]
    done = processes.run([*command, *words], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == expected(style)


@pytest.mark.spark
@pytest.mark.heavy
@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize("style", STYLES)
def test_on_executors(
    style: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "5")
    runner = HorovodRunner(np=2, driver_log_verbosity="all")
    runner.run_script(SCRIPTS / style, "--epochs", 2)
    lines = capfd.readouterr().out.splitlines()
    assert sorted(line for line in lines if "epochs" in line) == expected(style)


def test_the_options_are_those_of_horovods_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    from horovod.runner import launch

    found: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, *_: Any) -> None:
        found.append(self)
        raise LookupError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(LookupError):
        launch.parse_args()
    own = {"-h", "--help", "-np", "--num-proc", "--start-timeout", "--output-filename", "--verbose"}
    theirs = {
        frozenset(action.option_strings): _values_of(action)
        for action in found[0]._actions
        if action.option_strings and own.isdisjoint(action.option_strings)
    }
    assert theirs == {frozenset(option.names): len(option.values) for option in HOROVODRUN}


def _values_of(action: argparse.Action) -> int:
    return 1 if action.nargs is None else int(action.nargs)
