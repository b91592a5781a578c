"""How the command line of ``run`` is read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from horovodrunner.command.horovodrun import HOROVODRUN
from horovodrunner.command.line import CommandLine, UsageError, help_text, parse
from horovodrunner.command.run import exit_code_of
from horovodrunner.errors import (
    BarrierStageError,
    ClusterCapacityError,
    HorovodRunnerError,
    RunSupersededError,
    StallTimeoutError,
    StartTimeoutError,
    WorkerFailedError,
)
from tests import processes


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("#!/usr/bin/env python3\n")
    (tmp_path / "x.sh").write_text("#!/bin/sh\n")
    (tmp_path / "tool").write_text("#!/usr/bin/perl\n")
    monkeypatch.chdir(tmp_path)


def parsed(words: str) -> CommandLine:
    line = parse(words.split())
    assert line is not None
    return line


@pytest.mark.parametrize(
    "words",
    [
        "-np 4 -- train.py --epochs 3 -- -np 2",
        "-np 4 train.py --epochs 3 -- -np 2",
        "-np 4 python train.py --epochs 3 -- -np 2",
        "-np 4 python3 -u train.py --epochs 3 -- -np 2",
        "--num-proc=4 -- python3.11 train.py --epochs 3 -- -np 2",
        f"-np 4 -- {sys.executable} train.py --epochs 3 -- -np 2",
    ],
)
def test_the_command_begins_where_the_options_end(words: str) -> None:
    line = parsed(words)
    assert (line.np, line.script) == (4, "train.py")
    assert line.arguments == ["--epochs", "3", "--", "-np", "2"]


def test_options_go_where_they_belong() -> None:
    line = parsed(
        "-np -2 --start-timeout 9.5 --output-filename out --cycle-time-ms 2 --autotune --verbose "
        "--fusion-threshold-mb=32 --max-restarts 1 --checkpoint-dir c --run-dir r --code-dir d "
        "--keep-checkpoints 2 --keep-best val:loss:min:3 --keep-every 10 "
        "--no-resume --stall-timeout 60 --tensorboard-dir t --env A=b=c "
        "--forward AWS_* --forward X --ranks-per-task 2 --preflight python -m pkg.a -x"
    )
    assert (line.np, line.script, line.arguments) == (-2, "-m", ["pkg.a", "-x"])
    assert (line.output_filename, line.code_dir, line.verbose) == ("out", "d", True)
    assert line.options == {
        "start_timeout": 9.5,
        "stall_timeout": 60.0,
        "checkpoint_dir": "c",
        "keep_checkpoints": 2,
        "keep_best": ("val:loss", "min", 3),
        "keep_every": 10,
        "resume": False,
        "max_restarts": 1,
        "run_dir": "r",
        "tensorboard_dir": "t",
        "environment": {"A": "b=c"},
        "forward": ["AWS_*", "X"],
        "ranks_per_task": 2,
        "preflight": True,
        "horovodrun_args": [
            *("--cycle-time-ms", "2", "--autotune", "--fusion-threshold-mb", "32"),
        ],
    }


def test_settings_of_spark() -> None:
    line = parsed("-np 2 --master local[2] --conf a.b=c=d --conf e= -- train.py")
    assert (line.master, line.conf) == ("local[2]", {"a.b": "c=d", "e": ""})
    assert parsed("-np 2 train.py").master is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "-np lacks"),
        ("train.py", "-np lacks"),
        ("-np 2", "the script lacks"),
        ("-np 2 --", "the script lacks"),
        ("-np 2 python", "the script lacks"),
        ("-np 2 -- -m", "-m lacks the module"),
        ("-np two train.py", "invalid int value: 'two'"),
        ("-np", "expected one argument"),
        ("-np 2 --keep-best val_loss train.py", "--keep-best val_loss: give a metric"),
        ("-np 2 --keep-best loss:low train.py", "--keep-best loss:low: give a metric"),
        ("-np 2 --max-restart 1 train.py", "unrecognized arguments: --max-restart"),
        ("-np 2 --conf spark.x train.py", "--conf spark.x: give a name and its value"),
        ("-np -2 --env =x train.py", "--env =x: give a name and its value"),
        ("-np -2 --master local[2] train.py", "--master makes no sense with -np -2"),
        ("-np -2 --conf a=b train.py", "--conf makes no sense with -np -2"),
        ("-np 2 bash x.sh", "there is no file 'bash' here"),
        ("-np 2 torchrun train.py", "give the script itself"),
        ("-np 2 x.sh", "x.sh is no Python script"),
        ("-np 2 ./tool", "./tool is no Python script"),
        ("-np 2 python -O train.py", "PYTHONOPTIMIZE"),
        ("-np 2 python -c pass", "python -c"),
    ],
)
def test_what_is_wrong_is_named(words: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words.split())
    assert told in str(caught.value)


def test_the_help_names_every_option_that_has_a_meaning() -> None:
    assert parse(["-h"]) is parse(["-np", "2", "--help"]) is None
    shown = help_text()
    for option in HOROVODRUN:
        left = " ".join([", ".join(option.names), *option.values])
        assert (re.search(rf"^  {left}\s", shown, re.MULTILINE) is not None) == bool(option.help)
    assert max(map(len, shown.splitlines())) <= 100


def test_the_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from horovodrunner.__main__ import main; main(['run', '--help']);"
        "print(sorted({'torch', 'numpy', 'pyspark', 'horovod', 'asyncio', 'cloudpickle'}"
        " & set(sys.modules)))"
    )
    done = processes.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--output-filename DIR" in done.stdout


def failed(**facts: Any) -> WorkerFailedError:
    return WorkerFailedError("it failed", rank=1, **facts)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (failed(exit_code=3), 3),
        (failed(exit_code=5, worker_was_lost=True), 5),
        (failed(signal="SIGKILL", worker_was_lost=True), 137),
        (failed(signal="signal 40", worker_was_lost=True), 168),
        (failed(worker_was_lost=True), 75),
        (failed(), 1),
        (StallTimeoutError("ranks waited", rank=1), 1),
        (StartTimeoutError("no slots"), 75),
        (RunSupersededError("another driver has taken over"), 75),
        (BarrierStageError("lost", executor_was_lost=True), 75),
        (BarrierStageError("cancelled", was_cancelled=True), 1),
        (ClusterCapacityError("too few"), 1),
    ],
)
def test_exit_codes(error: HorovodRunnerError, code: int) -> None:
    assert exit_code_of(error) == code
