"""``results="all"`` from executors: over the channel, and where the driver is out of reach."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest

from horovodrunner import HorovodRunner, PayloadError
from horovodrunner.processes.driver import addresses

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]


def value() -> Any:
    rank = int(os.environ["RANK"])
    return [rank, np.full(3_000_000, rank)]


def assert_both_came(runner: HorovodRunner) -> None:
    assert len(runner.results) == 2
    for rank, (number, array) in enumerate(runner.results):
        assert number == rank
        assert (array == rank).all()


def test_every_executors_value_comes(spark: Any) -> None:
    runner = HorovodRunner(np=0, results="all")
    with pytest.warns(DeprecationWarning, match="np=0"):
        assert runner.run(value)[0] == 0
    assert_both_came(runner)
    assert spark.range(3).count() == 3


def test_they_come_as_rows_where_the_driver_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "bind_host", lambda spark: "127.0.0.1")
    monkeypatch.setattr(addresses, "advertised_host", lambda spark: "127.0.0.2")
    runner = HorovodRunner(np=2, results="all")
    runner.run(value)
    assert_both_came(runner)


def test_a_rank_whose_value_does_not_travel_ends_the_run() -> None:
    def main() -> Any:
        if os.environ["RANK"] == "0":
            time.sleep(600)  # is stopped
        return (each for each in "ab")

    runner = HorovodRunner(np=2, results="all")
    with pytest.raises(PayloadError, match="rank 1: the value that main returned"):
        runner.run(main)
