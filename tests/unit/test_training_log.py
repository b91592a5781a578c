"""What the lines of LogCallbacks look like, whatever the values are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from horovodrunner.callbacks.torch import LogCallback
from horovodrunner.flows.logs.training_log import TrainingLog, format_logs, format_value


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Tensor:
    """What a framework's tensor looks like from outside."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def numpy(self) -> Any:
        return np.array(self.values)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25121, "0.2512"),
        (0.91, "0.9100"),
        (6e-05, "6e-05"),
        (0.0, "0"),
        (-3.5, "-3.5000"),
        (12345.678, "12345.7"),
        (3.2e9, "3.2e+09"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (7, "7"),
        (True, "True"),
        (None, "None"),
        ("best", "best"),
        ("two\nlines", "two lines"),
        (np.float32(0.5), "0.5000"),
        (np.int64(3), "3"),
        (np.array(0.5), "0.5000"),
        (np.array([0.5, 1.0]), "[0.5000, 1.0000]"),
        (np.zeros(100), "[0, 0, 0, 0, ... (100 values)]"),
        ([], "[]"),
        ([0.5, None, "x"], "[0.5000, None, x]"),
        (Tensor(0.125), "0.1250"),
        (Unprintable(), "(Unprintable)"),
        ([Unprintable()], "(list)"),
        ("x" * 500, "x" * 77 + "..."),
        (float, "<class 'float'>"),
        (np.ndarray, "<class 'numpy.ndarray'>"),
    ],
)
def test_values(value: Any, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize("logs", [None, {}])
def test_no_logs_are_no_text(logs: Any) -> None:
    assert format_logs(logs) == ""


@pytest.mark.parametrize(
    ("environment", "prefix"),
    [
        ({"HOROVOD_SIZE": "4", "HOROVOD_RANK": "2"}, "rank 2: "),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "rank 1: "),
        ({"HOROVOD_SIZE": "1", "HOROVOD_RANK": "0"}, ""),
        ({}, ""),
    ],
)
def test_lines_of_several_ranks_name_the_rank(
    environment: dict[str, str],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HOROVOD_SIZE", "HOROVOD_RANK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    log = TrainingLog()
    log.epoch_begins(2, 10)
    log.batch_ends(0, None, None)
    log.epoch_begins(3)
    assert capsys.readouterr().out.splitlines() == [
        f"{prefix}epoch 3 of 10 begins",
        f"{prefix}epoch 3 of 10, batch 1: done",
        f"{prefix}epoch 4 begins",
    ]


def test_a_loop_may_start_late_log_nothing_and_give_some_values_in_some_batches(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = LogCallback()
    for epoch in log.epochs(3, start=1):
        for batch in range(4):
            if epoch == 1:
                log.batch(loss=float(batch), **({"norm": 7} if batch == 2 else {}))
    lines = [line.rpartition(" (")[0] or line for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "epoch 2 of 3 begins",
        "epoch 2 of 3: loss 1.5000, norm 7.0000",
        "epoch 3 of 3 begins",
        "epoch 3 of 3: done",
    ]
