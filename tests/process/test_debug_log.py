"""The package's own log, which a variable turns on in every process of a run."""

from __future__ import annotations

import logging
import os
import sys

import pytest

from horovodrunner.flows.logs.debug import turn_on_if_wanted
from tests import processes

SCRIPT = """
from horovodrunner import HorovodRunner

def train():
    return "result"

if __name__ == "__main__":
    print(HorovodRunner(np=-2).run(train))
"""


@pytest.mark.parametrize("setting", ["debug", ""])
def test_each_process_tells_its_steps_and_where_its_log_is(setting: str) -> None:
    done = processes.run(
        [sys.executable, "-c", SCRIPT],
        check=True,
        capture_output=True,
        env={**os.environ, "HOROVODRUNNER_LOG": setting},
    )
    out, err = (str(text) for text in (done.stdout, done.stderr))
    assert out.endswith("result\n")
    if not setting:
        assert "the log of" not in out + err
        return
    assert "the log of the driver and its task" in err
    for step in ("worker spawned", "rank 1 is on", "rank 1 has called main", "rank 1 has ended"):
        assert step in err
    for rank in (0, 1):
        assert f"[{rank}]<stderr>:" in out
        assert f"is rank {rank}; main and its arguments have" in out


def test_the_log_is_on_in_the_runs_that_want_it_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def steps_of(setting: str) -> str:
        turn_on_if_wanted("a test", "its standard error", {"HOROVODRUNNER_LOG": setting})
        logging.getLogger("horovodrunner.step").debug("a step")
        return capsys.readouterr().err

    assert steps_of("") == ""
    assert "the log of a test" in steps_of("debug")
    assert steps_of("DEBUG").count("a step") == 1
    assert steps_of("") == ""
    assert logging.getLogger("horovodrunner").level == logging.NOTSET
