"""The exchange of one text between all tasks of a run: real sockets, no Spark."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.members import driver as driver_gathering
from horovodrunner.flows.members.task import Gathering
from horovodrunner.processes.driver.channel import DriverChannel
from horovodrunner.wire.connection import connect
from horovodrunner.wire.job import JobSpec

TOKEN = b"t" * 32


@contextmanager
def channel_for(size: int) -> Iterator[tuple[DriverChannel, JobSpec]]:
    console = Console()
    with DriverChannel("run-1", TOKEN, console, console.wake, size=size) as channel:
        port = channel.open("127.0.0.1", 0)
        yield channel, JobSpec("run-1", size, b"", TOKEN, driver_address=("127.0.0.1", port))


def no_spark(text: str) -> list[str]:
    raise AssertionError(f"Spark's way was taken for {text!r}")


def with_spark(text: str) -> list[str]:
    return ["Spark has gathered", text]


async def send_and_leave(job: JobSpec, partition: int) -> None:
    assert job.driver_address is not None
    connection = await connect(*job.driver_address, TOKEN, 5.0)
    connection.send("gather", b"old", run_id="run-1", partition=partition)
    await connection.close()


def test_every_task_gets_all_texts_in_the_order_of_partitions() -> None:
    async def gather() -> list[list[str]]:
        tasks = [Gathering(job, number, no_spark) for number in (2, 0, 1)]
        return await asyncio.gather(*(task.gather(f"text {task._partition}") for task in tasks))

    with channel_for(3) as (channel, job):
        assert asyncio.run(gather()) == [["text 0", "text 1", "text 2"]] * 3
        assert not channel.retried


def test_all_tasks_take_sparks_way_when_one_does_not_reach_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver_gathering, "PATIENCE_SECONDS", 0.2)

    async def gather() -> list[list[str]]:
        early = [Gathering(job, number, with_spark) for number in (0, 1)]
        cut_off = Gathering(job, 2, with_spark)
        cut_off.driver_is_out_of_reach = True
        texts = await asyncio.gather(*(task.gather("early") for task in [*early, cut_off]))
        return [*texts, await Gathering(job, 3, with_spark).gather("late")]

    with channel_for(4) as (_, job):
        expected = [["Spark has gathered", "early"]] * 3 + [["Spark has gathered", "late"]]
        assert asyncio.run(gather()) == expected


def test_nobody_listens_at_the_drivers_address() -> None:
    with channel_for(1) as (_, job):
        pass
    assert asyncio.run(Gathering(job, 0, with_spark).gather("x")) == ["Spark has gathered", "x"]


@pytest.mark.parametrize("first_has_left", [False, True])
def test_a_second_try_of_the_stage_is_refused(first_has_left: bool) -> None:
    async def gather() -> None:
        if first_has_left:
            await send_and_leave(job, 0)
            while not channel._gather_point._seen or channel._gather_point._texts:
                await asyncio.sleep(0.01)
        else:
            await Gathering(job, 0, no_spark).gather("first")
        with pytest.raises(ConnectionError, match="a second time"):
            await Gathering(job, 0, no_spark).gather("second")

    with channel_for(2 if first_has_left else 1) as (channel, job):
        asyncio.run(gather())
        assert channel.retried


def test_a_driver_that_goes_meanwhile_ends_the_wait() -> None:
    async def gather() -> None:
        waiting = asyncio.ensure_future(Gathering(job, 0, no_spark).gather("x"))
        while not channel._gather_point._seen:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(channel.close)
        with pytest.raises(ConnectionError, match="broke while the tasks met"):
            await waiting

    with channel_for(2) as (channel, job):
        asyncio.run(gather())
