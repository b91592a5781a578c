"""The exchange of one text between all tasks of a run: real sockets, no Spark."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.members import driver as driver_gathering
from horovodrunner.flows.members.task import gather
from horovodrunner.processes.driver.channel import DriverChannel
from horovodrunner.wire.events import Gather
from horovodrunner.wire.stream import connect

TOKEN = b"t" * 32


@contextmanager
def channel_for(size: int) -> Iterator[tuple[DriverChannel, JobSpec]]:
    console = Console()
    with DriverChannel("run-1", TOKEN, console, console.wake, tasks=size) as channel:
        port = channel.open("127.0.0.1", 0)
        yield channel, JobSpec("run-1", size, b"", TOKEN, driver_address=("127.0.0.1", port))


def no_spark(text: str) -> list[str]:
    raise AssertionError(f"Spark's way was taken for {text!r}")


def with_spark(text: str) -> list[str]:
    return ["Spark has gathered", text]


async def send_and_leave(job: JobSpec, partition: int) -> None:
    assert job.driver_address is not None
    connection = await connect(*job.driver_address, TOKEN, 5.0)
    connection.send(Gather("run-1", partition, b"old"))
    await connection.close()


def test_every_task_gets_all_texts_in_the_order_of_partitions() -> None:
    async def meet() -> list[list[str]]:
        return await asyncio.gather(
            *(
                gather(job, number, f"text {number}", no_spark, reaches_driver=True)
                for number in (2, 0, 1)
            )
        )

    with channel_for(3) as (channel, job):
        assert asyncio.run(meet()) == [["text 0", "text 1", "text 2"]] * 3
        assert not channel.retried


def test_all_tasks_take_sparks_way_when_one_does_not_reach_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver_gathering, "PATIENCE_SECONDS", 0.2)

    async def meet() -> list[list[str]]:
        texts = await asyncio.gather(
            *(
                gather(job, number, "early", with_spark, reaches_driver=number != 2)
                for number in range(3)
            )
        )
        return [*texts, await gather(job, 3, "late", with_spark, reaches_driver=True)]

    with channel_for(4) as (_, job):
        expected = [["Spark has gathered", "early"]] * 3 + [["Spark has gathered", "late"]]
        assert asyncio.run(meet()) == expected


def test_nobody_listens_at_the_drivers_address() -> None:
    with channel_for(1) as (_, job):
        pass
    texts = asyncio.run(gather(job, 0, "x", with_spark, reaches_driver=True))
    assert texts == ["Spark has gathered", "x"]


@pytest.mark.parametrize("first_has_left", [False, True])
def test_a_second_try_of_the_stage_is_refused(first_has_left: bool) -> None:
    async def meet() -> None:
        if first_has_left:
            await send_and_leave(job, 0)
            while not channel._gather_point._seen or channel._gather_point._texts:
                await asyncio.sleep(0.01)
        else:
            await gather(job, 0, "first", no_spark, reaches_driver=True)
        with pytest.raises(ConnectionError, match="a second time"):
            await gather(job, 0, "second", no_spark, reaches_driver=True)

    with channel_for(2 if first_has_left else 1) as (channel, job):
        asyncio.run(meet())
        assert channel.retried


def test_a_driver_that_goes_meanwhile_ends_the_wait() -> None:
    async def meet() -> None:
        waiting = asyncio.ensure_future(gather(job, 0, "x", no_spark, reaches_driver=True))
        while not channel._gather_point._seen:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(channel.close)
        with pytest.raises(ConnectionError, match="broke while the tasks met"):
            await waiting

    with channel_for(2) as (channel, job):
        asyncio.run(meet())
