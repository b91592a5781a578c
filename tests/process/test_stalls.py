"""Ranks that make no progress, without Horovod: real processes of this machine."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import pytest

from horovodrunner import HorovodRunner, StallTimeoutError
from horovodrunner.flows.telemetry import task as telemetry
from tests.process import mains


def freeze(on_rank: int, how: str) -> None:
    """Stop answering on one rank: by SIGSTOP, or in native code that keeps the interpreter lock."""
    if mains.rank() != on_rank:
        mains.wait_for_ever()
    if how == "SIGSTOP":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:  # the signal that asks for the stack ends a sleep
        ctypes.PyDLL(None).sleep(600)


@pytest.mark.parametrize(("on_rank", "how"), [(0, "native code"), (1, "SIGSTOP")])
def test_a_rank_that_does_not_answer_ends_the_run_with_every_ranks_stack(
    on_rank: int, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StallTimeoutError) as caught:
        HorovodRunner(np=-2, stall_timeout=4).run(freeze, on_rank=on_rank, how=how)
    error = caught.value
    assert error.rank == on_rank
    assert f"stall_timeout=4 s: missing: rank {on_rank} has not answered for" in error.summary
    assert set(error.stacks) == {0, 1}
    assert "in wait_for_ever" in error.stacks[1 - on_rank]
    if how == "SIGSTOP":
        assert "its state is 'stopped'" in error.stacks[on_rank]
    else:
        assert "in freeze" in error.stacks[on_rank]
    assert "processes/worker/__main__.py" not in str(error)
    assert f"[{1 - on_rank}]<stack>:" in capsys.readouterr().out


def test_without_stall_timeout_there_is_one_warning_that_names_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(telemetry, "STALL_WARNING_SECONDS", 6.0)

    def main(on_rank: int) -> str:
        if mains.rank() == on_rank:
            ctypes.PyDLL(None).sleep(9)
        return "done"

    assert HorovodRunner(np=-2).run(main, on_rank=0) == "done"
    shown = capsys.readouterr().out
    assert shown.count("no progress for") == 1
    assert "rank 0 has not answered" in shown


def test_a_rank_that_is_slow_for_less_than_the_timeout_is_left_alone() -> None:
    def main() -> str:
        time.sleep(1)
        ctypes.PyDLL(None).sleep(1)
        return "done"

    assert HorovodRunner(np=-2, stall_timeout=5).run(main) == "done"


def test_a_stall_is_worth_another_attempt_only_when_asked_for() -> None:
    def main(on_rank: int) -> int:
        from horovodrunner import checkpoint

        if checkpoint.attempt == 1:
            freeze(on_rank, "SIGSTOP")
        return checkpoint.attempt

    runner = HorovodRunner(np=-2, stall_timeout=2, max_restarts=1)
    with pytest.raises(StallTimeoutError):
        runner.run(main, on_rank=1)
    runner = HorovodRunner(np=-2, stall_timeout=2, max_restarts=1, restart_on=(StallTimeoutError,))
    assert runner.run(main, on_rank=1) == 2
