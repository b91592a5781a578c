"""Several ranks in each task of a real stage."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from horovodrunner import (
    ClusterCapacityError,
    HorovodRunner,
    WorkerFailedError,
    artifacts,
    checkpoint,
    data,
    log_to_driver,
)
from tests.conftest import workers_left

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]


def place() -> dict[str, Any]:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
    return {name: int(os.environ[name]) for name in names} | {"task": os.getppid()}


def test_np_counts_ranks_and_each_task_runs_several(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> dict[str, Any]:
        log_to_driver(f"rank {os.environ['RANK']} is here")
        artifacts.path("note.txt").write_text(os.environ["RANK"])
        return place()

    runner = HorovodRunner(np=3, ranks_per_task=2, results="all", driver_log_verbosity="all")
    assert runner.run(main)["WORLD_SIZE"] == 3
    seen = list(runner.results)
    assert [each["RANK"] for each in seen] == [0, 1, 2]
    assert [each["LOCAL_RANK"] for each in seen] == [0, 1, 2]
    assert seen[0]["task"] == seen[1]["task"] != seen[2]["task"]
    assert runner.artifacts is not None
    assert {path.read_text() for path in runner.artifacts.rglob("note.txt")} == {"0", "1", "2"}
    shown = capfd.readouterr().out
    assert all(f"rank {rank} is here" in shown for rank in range(3))
    assert "np=3 in 2 tasks: the last one runs 1 of 2" in shown


def test_all_slots_are_all_their_ranks() -> None:
    with pytest.warns(DeprecationWarning, match="np=0"):
        assert HorovodRunner(np=0, ranks_per_task=3).run(place)["WORLD_SIZE"] == 6


def test_too_many_ranks_are_refused_in_tasks() -> None:
    expected = r"np=9 needs 3 task slots of 4 ranks each, and the cluster has 2"
    with pytest.raises(ClusterCapacityError, match=expected):
        HorovodRunner(np=9, ranks_per_task=4).run(place)


@pytest.mark.parametrize("rank", ["1", "3"])
def test_when_one_rank_dies_those_of_all_tasks_end_and_it_is_the_cause(rank: str) -> None:
    def main() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    with pytest.raises(WorkerFailedError, match=f"rank {rank} on .*SIGKILL") as caught:
        HorovodRunner(np=4, ranks_per_task=2).run(main)
    assert caught.value.rank == int(rank)
    assert caught.value.consequences == ()
    assert workers_left() == []


@pytest.mark.heavy
def test_a_lost_task_is_told_with_all_its_ranks_and_restarts_resume(tmp_path: Path) -> None:
    def main() -> str:
        (tmp_path / f"{os.environ['RANK']}-{checkpoint.attempt}").touch()
        while len(list(tmp_path.glob(f"*-{checkpoint.attempt}"))) < 4:
            time.sleep(0.05)
        if checkpoint.attempt == 1 and os.environ["RANK"] == "3":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        return f"attempt {checkpoint.attempt}"

    def once() -> None:
        HorovodRunner(np=4, ranks_per_task=2).run(main)

    expected = "contact with the task of ranks 2 and 3 was lost: Spark lost .*ranks 2 and 3"
    with pytest.raises(WorkerFailedError, match=expected):
        once()
    for path in tmp_path.iterdir():
        path.unlink()
    runner = HorovodRunner(np=4, ranks_per_task=2, results="all", max_restarts=1)
    assert runner.run(main) == "attempt 2"
    assert list(runner.results) == ["attempt 2"] * 4


def test_rows_that_travel_are_dealt_out_to_ranks_not_tasks(spark: Any) -> None:
    def main(train: data.DataSet) -> tuple[int, list[int]]:
        batches = train.numpy(batch_size=1, remainder="uneven")
        return len(train), [int(x) for batch in batches for x in batch["id"]]

    train = data.from_dataframe(spark.range(0, 100, 1, 4), shared=False)
    runner = HorovodRunner(np=5, ranks_per_task=3, results="all")
    runner.run(main, train=train)
    counts = {count for count, _ in runner.results}
    assert counts == {100}
    rows = [rows for _, rows in runner.results]
    assert sorted(row for each in rows for row in each) == list(range(100))
    assert all(18 <= len(each) <= 22 for each in rows)


@pytest.mark.horovod
def test_ranks_of_all_tasks_reduce_with_horovod_and_torch() -> None:
    def main() -> tuple[float, float]:
        import horovod.torch as hvd
        import torch

        hvd.init()
        of_horovod = float(hvd.allreduce(torch.tensor(float(hvd.rank())), op=hvd.Sum))
        torch.distributed.init_process_group("gloo")
        tensor = torch.tensor(float(os.environ["RANK"]))
        torch.distributed.all_reduce(tensor)
        torch.distributed.destroy_process_group()
        return of_horovod, float(tensor)

    runner = HorovodRunner(np=4, ranks_per_task=2, results="all")
    runner.run(main)
    assert list(runner.results) == [(6.0, 6.0)] * 4
