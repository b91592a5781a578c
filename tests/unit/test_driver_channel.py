"""The driver's end of the channel, spoken to by real clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from horovodrunner import ConfigurationError
from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.logs.driver import Console
from horovodrunner.flows.outcome.outcome import Failure, Outcome
from horovodrunner.processes.driver.channel import RETRY_REFUSED, DriverChannel
from horovodrunner.processes.task.driver_link import (
    DriverLink,
    StartRefusedError,
    register_with_driver,
)
from horovodrunner.wire.events import (
    CheckpointStored,
    Failed,
    Handlers,
    Lines,
    Message,
    Note,
    RankStates,
    SaveWanted,
    Stop,
)

TOKEN = b"t" * 32


@pytest.fixture
def console() -> Console:
    return Console()


@pytest.fixture
def channel(console: Console) -> Iterator[DriverChannel]:
    with DriverChannel("run-1", TOKEN, console, on_event=console.wake) as channel:
        yield channel


def job(port: int, token: bytes = TOKEN, run_id: str = "run-1", stream: bool = True) -> JobSpec:
    return JobSpec(run_id, 2, b"", token, driver_address=("127.0.0.1", port), stream_output=stream)


async def register(spec: JobSpec, log: list[bytes] | None = None) -> DriverLink:
    return await register_with_driver(
        spec, handlers={}, log=(log if log is not None else []).append
    )


def test_what_the_run_tells_is_shown(
    channel: DriverChannel, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    port = channel.open("127.0.0.1", 0)

    async def talk() -> None:
        driver = await register(job(port))
        assert driver.is_reached
        driver.emit(Note("placed"))
        driver.emit(Lines(0, "stdout", b"x\n"))
        driver.emit(Message(1, "hello"))
        driver.emit(Failed(Outcome(failure=Failure(1, "h", "boom")).to_bytes()))
        await driver.close()

    asyncio.run(talk())
    channel.wait_for_leaving(5)
    console.show(0)
    assert capsys.readouterr().out == "HorovodRunner: placed\n[0]<stdout>:x\nhello\n"
    assert channel.registered
    assert channel.failure is not None
    assert channel.failure.failure == Failure(1, "h", "boom")


def test_a_connection_that_breaks_is_told_with_what_may_not_arrive(
    console: Console, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    with DriverChannel("run-1", TOKEN, console, console.wake, store) as channel:
        port = channel.open("127.0.0.1", 0)

        async def talk() -> None:
            driver = await register(job(port))
            DriverChannel.cut_all()
            await driver.close()

        asyncio.run(talk())
        channel.wait_for_leaving(5)
    console.show(0)
    told = "its output stays in the executor's log, and checkpoints may not arrive here"
    assert told in capsys.readouterr().out


def test_without_streaming_only_messages_travel(
    channel: DriverChannel, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    port = channel.open("127.0.0.1", 0)

    async def talk() -> None:
        driver = await register(job(port, stream=False))
        assert driver.is_reached
        driver.emit(Lines(0, "stdout", b"x\n"))
        driver.emit(Message(0, "hello"))
        await driver.close()

    asyncio.run(talk())
    channel.wait_for_leaving(5)
    console.show(0)
    assert capsys.readouterr().out == "hello\n"


def test_what_only_observers_want_may_be_told_to_a_run_without_any(
    channel: DriverChannel, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    port = channel.open("127.0.0.1", 0)

    async def talk() -> None:
        driver = await register(job(port))
        driver.emit(RankStates(("training",)))
        driver.emit(CheckpointStored(3))
        driver.emit(Message(0, "hello"))
        await driver.close()

    asyncio.run(talk())
    channel.wait_for_leaving(5)
    console.show(0)
    assert capsys.readouterr().out == "hello\n"


def test_a_second_registration_of_the_run_is_refused(channel: DriverChannel) -> None:
    """That is what a barrier stage that Spark tries again looks like from here."""
    port = channel.open("127.0.0.1", 0)

    async def talk() -> None:
        first = await register(job(port))
        await first.close()
        with pytest.raises(StartRefusedError, match=RETRY_REFUSED):
            await register(job(port))

    asyncio.run(talk())
    assert channel.retried


def test_a_task_with_another_token_does_not_get_in(channel: DriverChannel) -> None:
    port = channel.open("127.0.0.1", 0)
    assert not asyncio.run(register(job(port, token=b"wrong" * 8))).is_reached
    assert not channel.registered


def test_a_task_of_another_run_does_not_get_in(channel: DriverChannel) -> None:
    port = channel.open("127.0.0.1", 0)
    with pytest.raises(StartRefusedError, match="the driver closed the channel"):
        asyncio.run(register(job(port, run_id="run-2")))
    assert not channel.registered


def test_a_driver_out_of_reach_is_said_in_the_log_and_the_run_goes_on() -> None:
    log: list[bytes] = []
    with socket.socket() as keeper:
        keeper.bind(("127.0.0.1", 0))  # bound, not listening
        driver = asyncio.run(register(job(keeper.getsockname()[1]), log))
    assert not driver.is_reached
    assert b"cannot be reached from here" in log[0]
    driver.emit(Message(1, "kept"))
    driver.emit(Lines(1, "stdout", b"in the log already\n"))
    driver.emit(Note("weights\udcff cannot be stored"))  # a file's name need not be UTF-8
    assert log[1:] == [
        b"[1]<log_to_driver>:kept\n",
        b"HorovodRunner: weights\\udcff cannot be stored\n",
    ]


def test_the_driver_can_end_the_run(channel: DriverChannel) -> None:
    port = channel.open("127.0.0.1", 0)

    async def talk() -> None:
        stopped = asyncio.Event()
        handlers: Handlers = {Stop: lambda _: stopped.set()}
        driver = await register_with_driver(job(port), handlers, lambda lines: None)
        channel.stop_run()
        await asyncio.wait_for(stopped.wait(), 5)
        await driver.close()

    asyncio.run(talk())


def test_a_checkpoint_is_wanted_also_before_partition_0_is_there(channel: DriverChannel) -> None:
    port = channel.open("127.0.0.1", 0)
    channel.want_save(SaveWanted("early"))

    async def talk() -> None:
        wanted: asyncio.Queue[SaveWanted] = asyncio.Queue()
        handlers: Handlers = {SaveWanted: wanted.put_nowait}
        driver = await register_with_driver(job(port), handlers, lambda lines: None)
        assert await wanted.get() == SaveWanted("early")
        channel.want_save(SaveWanted("later", urgent=True))
        assert await wanted.get() == SaveWanted("later", urgent=True)
        await driver.close()

    asyncio.run(talk())
    channel.want_save(SaveWanted("too late"))


def test_a_port_that_is_taken_is_refused_with_the_conf_to_change(channel: DriverChannel) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigurationError, match=r"spark\.horovodrunner\.driver\.port"),
    ):
        channel.open("127.0.0.1", taken.getsockname()[1])
