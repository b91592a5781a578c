"""np > 0: real executors."""

from __future__ import annotations

import functools
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from horovodrunner import (
    BarrierStageError,
    ClusterCapacityError,
    ConfigurationError,
    HorovodRunner,
    PayloadError,
    StartTimeoutError,
    WorkerFailedError,
    checkpoint,
)
from horovodrunner.processes.driver import addresses, cluster, slots
from horovodrunner.spark import session
from tests.conftest import marked_processes, workers_left
from tests.process import breaks, mains
from tests.process.travelling import module_by_value
from tests.waiting import wait_until

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]


def run(main: Any, np: int = 2, verbosity: str = "log_callback_only", **kwargs: Any) -> Any:
    return HorovodRunner(np=np, driver_log_verbosity=verbosity).run(main, **kwargs)


def place() -> dict[str, Any]:
    names = ["RANK", "WORLD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"]
    return {name: int(os.environ[name]) for name in names} | {"parent": os.getppid()}


@pytest.mark.parametrize("np", [1, 2])
def test_the_ranks_run_on_executors_and_rank_0s_value_comes_back(np: int) -> None:
    value = run(place, np=np)
    assert (value["RANK"], value["WORLD_SIZE"], value["HOROVOD_LOCAL_SIZE"]) == (0, np, np)
    ancestors = [p.name() for p in psutil.Process(value["parent"]).parents()]
    assert ancestors.count("java") >= 2  # the executor, and the driver's JVM that started it


def test_what_travels_by_value_is_found_by_name_and_by_source() -> None:
    with module_by_value() as module:
        found = (True, 1, 1, "class Net:\n    pass\n")
        assert run(module.round_trip) == found
        assert run(module.in_a_child) == [found]
        assert type(run(module.returns)) is module.Net


def test_np_0_means_all_slots_and_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="np=0"):
        assert run(place, np=0)["WORLD_SIZE"] == 2


def test_more_ranks_than_slots_is_refused_at_once_with_the_numbers() -> None:
    with pytest.raises(
        ClusterCapacityError,
        match=r"np=3 needs 3 .* has 2 \(local-cluster.*"
        r"2 executors with 1 core: 1 slot each; a task takes spark.task.cpus=1\)",
    ):
        run(place, np=3)


@pytest.mark.parametrize("on_rank", [0, 1])
@pytest.mark.parametrize(
    ("how", "summary"),
    [
        ("exception", "ValueError: the learning rate is negative"),
        ("sys.exit", "SystemExit: 3"),
        ("os._exit", "exit code 4"),
        ("SIGKILL", "SIGKILL"),
    ],
)
def test_a_failing_rank_ends_the_run_with_its_own_cause(
    on_rank: int, how: str, summary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerFailedError) as caught:
        run(mains.fail, how=how, on_rank=on_rank)
    assert summary in caught.value.summary
    assert caught.value.rank == on_rank
    assert isinstance(caught.value.__cause__, ValueError) == (how == "exception")
    assert caught.value.__suppress_context__
    assert "org.apache.spark" not in str(caught.value)


@pytest.mark.parametrize("what", ["no streams", "descriptors closed", "JSON"])
def test_whatever_main_breaks_its_value_and_its_exception_arrive(what: str, tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert run(breaks.break_and_end, what=what, directory=directory, how="return") == "value"
    with pytest.raises(WorkerFailedError) as caught:
        run(breaks.break_and_end, what=what, directory=directory, how="raise")
    assert caught.value.summary == "ValueError: told"
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_exception_of_megabytes_arrives_from_every_rank() -> None:
    def main() -> None:
        raise ValueError("\U0001f600" * 350_000)

    with pytest.raises(WorkerFailedError) as caught:
        run(main)
    assert caught.value.summary.endswith("\U0001f600...(truncated: 350,000 characters)")
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_child_of_main_does_not_report_and_output_for_an_ascii_stream_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main() -> str:
        print("\xe9 \u258f")
        if not (pid := os.fork()):  # noqa: TID251 -- in a rank
            return "the child's own value"
        os.waitpid(pid, 0)
        return "value"

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(main, verbosity="all") == "value"
    monkeypatch.undo()
    stream.flush()
    assert b"[1]<stdout>:\\xe9 \\u258f\n" in stream.buffer.getvalue()


def test_what_does_not_unpickle_here_is_tried_again_by_its_name() -> None:
    class TwoArgumentsError(Exception):
        def __init__(self, batch: int, loss: float) -> None:
            super().__init__(batch)

    def main() -> int:
        if checkpoint.attempt == 1 and os.environ["RANK"] == "1":
            raise TwoArgumentsError(3, 0.5)
        return checkpoint.attempt

    runner = HorovodRunner(np=2, max_restarts=1, restart_on=(TwoArgumentsError,))
    assert runner.run(main) == 2


def test_the_phases_of_a_run_come_from_all_three_processes() -> None:
    runner = HorovodRunner(np=2)
    runner.run(lambda: None)
    phases = {phase.name: phase for phase in runner.phases}
    ordered = ["pickle", "stage start", "gather", "rendezvous", "unpickle", "main"]
    ordered.append("outcome back")
    begins = [phases[name].began for name in ordered]
    assert begins == sorted(begins)
    assert {"worker spawn", "imports"} < set(phases)


def test_the_session_is_usable_after_a_failure(spark: Any) -> None:
    with pytest.raises(WorkerFailedError):
        run(mains.fail, how="exception", on_rank=1)
    assert spark.range(10).count() == 10
    assert run(place)["WORLD_SIZE"] == 2


def test_workers_that_ignore_sigterm_and_their_children_are_gone(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailedError, match="failed with children"):
        run(mains.ignore_sigterm_with_children, pid_file=str(tmp_path / "pids"), on_rank=1)
    assert marked_processes() == []


def executor_stderr(logs: Path) -> dict[str, list[str]]:
    return {path.parent.name: path.read_text().splitlines() for path in logs.glob("*/stderr")}


def test_all_output_is_merged_in_rank_0s_executor_log_whole_and_prefixed(
    executor_logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: len(lines) for name, lines in executor_stderr(executor_logs).items()}
    run(mains.print_a_lot, lines=2000, width=100)
    shown = capsys.readouterr().out
    assert "<stdout>" not in shown
    assert 'driver_log_verbosity="all"' in shown
    new = {n: lines[before.get(n, 0) :] for n, lines in executor_stderr(executor_logs).items()}
    merged = [lines for lines in new.values() if f"[0]<stdout>:0:0:{'x' * 100}" in lines]
    assert len(merged) == 1
    for rank in (0, 1):
        expected = [f"[{rank}]<stdout>:{rank}:{i}:" + "x" * 100 for i in range(2000)]
        assert [line for line in merged[0] if line.startswith(f"[{rank}]<stdout>:")] == expected
        assert f"[{rank}]<stderr>:{rank} done" in merged[0]
    others = [lines for lines in new.values() if lines is not merged[0]]
    own = next(lines for lines in others if "[1]<stderr>:1 done" in lines)  # rank 1's executor
    for lines, rank in ((merged[0], 0), (merged[0], 1), (own, 1)):
        bar = mains.shown_of_a_bar(lines, rank)
        assert bar[-1] == "2000/2000"
        assert len(bar) < 200


def test_all_output_streams_to_the_driver_when_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(mains.print_a_lot, verbosity="all", lines=2000, width=100)
    shown = capsys.readouterr().out.splitlines()
    for rank in (0, 1):
        expected = [f"[{rank}]<stdout>:{rank}:{i}:" + "x" * 100 for i in range(2000)]
        assert [line for line in shown if line.startswith(f"[{rank}]<stdout>:")] == expected


def test_log_to_driver_messages_are_shown_in_either_mode(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for verbosity in ("all", "log_callback_only"):
        run(mains.log_things, verbosity=verbosity)
        assert {"from rank 0", "from rank 1"} <= set(capsys.readouterr().out.splitlines())


def test_the_documented_variables_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "set before run, after the session started")
    assert run(lambda: os.environ.get("MLFLOW_RUN_ID")).startswith("set before run")


def test_a_debug_run_and_a_cluster_run_have_the_same_surroundings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    facts = run(mains.surroundings)
    assert facts == run(mains.surroundings, np=-2)
    shown = [line for line in capsys.readouterr().out.splitlines() if "surroundings" in line]
    assert len(shown) == 4
    assert len(set(shown)) == 1


def test_a_module_of_the_users_that_hides_another_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    tmp_path.joinpath("numpy.py").touch()  # is imported early, if it is the installed one
    assert run(mains.own_module, np=1, name="numpy") == str(tmp_path / "numpy.py")


@pytest.mark.parametrize("np", [2, -2])
def test_what_works_on_the_driver_only_is_said_once(
    np: int, spark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    counter = spark.sparkContext.accumulator(0)

    def main(starts_session: bool, counter: Any = counter) -> str:
        counter += 1
        if mains.rank() == 1:
            from pyspark import TaskContext

            counter.add(2)
            return str(TaskContext.get())
        if starts_session:
            from pyspark.sql import SparkSession

            own = SparkSession.builder.config("spark.ui.enabled", "false").getOrCreate()
            master = own.sparkContext.master
            own.stop()
            return str(master)
        return ""

    assert run(main, np=np, starts_session=np > 0) == ("local[*]" if np > 0 else "")
    assert counter.value == 0
    out = capsys.readouterr().out
    here = rf"\({re.escape(__file__)}:\d+\)"
    for text, is_expected in [
        (rf"adds to an accumulator of Spark {here}", True),
        (rf"TaskContext.get\(\) is None in main {here}", True),
        (rf"starts a Spark session of its own on rank 0 {here}", np > 0),
    ]:
        assert len(re.findall(text, out)) == is_expected, text


def used_udf(spark: Any) -> Any:
    """Make a UDF that Spark's JVM knows."""
    from pyspark.sql.functions import udf

    plus_one = udf(lambda x: x + 1, "long")
    spark.range(3).select(plus_one("id"))
    return plus_one


DATA = r"rows = horovodrunner\.data\.from_dataframe"
SPARKS_OWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "session": (lambda spark: spark, f"SparkSession.*Spark is on the driver only.*{DATA}"),
    "context": (lambda spark: spark.sparkContext, f"SparkContext.*Spark is on the driver.*{DATA}"),
    "DataFrame": (lambda spark: spark.range(3), rf"DataFrame.* on the driver only.*{DATA}\(df\)"),
    "RDD": (lambda spark: spark.range(3).rdd, rf"RDD.* on the driver only.*{DATA}\(rdd.toDF"),
    "column": (lambda spark: spark.range(3).id, f"Column.*Spark's objects.*plain values.*{DATA}"),
    "groups": (lambda spark: spark.range(3).groupBy(), "GroupedData.*Spark's objects are on"),
    "UDF": (used_udf, r"a UDF is for .*function = the_udf\.func"),
    "broadcast": (lambda spark: spark.sparkContext.broadcast(3), r"own tasks.*broadcast\.value"),
    "JVM": (lambda spark: spark.sparkContext._jvm, "JVMView.*Spark's objects are on the driver"),
}


class Holder:
    """Holds something in an attribute."""

    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize("kind", SPARKS_OWN)
def test_what_is_sparks_is_refused_with_what_to_use_instead(kind: str, spark: Any) -> None:
    make, text = SPARKS_OWN[kind]
    thing = make(spark)

    def helper() -> Any:
        return thing

    def with_default(x: Any = thing) -> Any:
        return x

    calls: list[tuple[int, Any, dict[str, Any], str]] = [
        (1, lambda: [helper()], {}, "the variable 'thing' in the closure of .*helper"),
        (-1, with_default, {}, "default value 0 of .*with_default"),
        (1, lambda given: given, {"given": [Holder(thing)]}, r"the argument 'given'\[0\]\.held"),
        (-1, functools.partial(print, thing), {}, r"positional argument 0 bound by functools\S+"),
    ]
    for np, main, kwargs, where in calls:
        with pytest.raises(PayloadError, match=rf"^{where} \(.*{text}"):
            run(main, np=np, **kwargs)


def with_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a main with settings, as ``hydra.main`` does."""

    @functools.wraps(function)
    def wrapper(**kwargs: Any) -> Any:
        return function({"lr": 0.1}, **kwargs)

    return wrapper


@pytest.mark.parametrize("np", [1, -1])
def test_what_is_called_decides_on_the_ranks_too(np: int) -> None:
    @with_settings
    def main(settings: dict[str, float], steps: int) -> Any:
        return settings["lr"] * steps

    def makes_steps() -> Any:
        return (step for step in range(3))

    async def train() -> int:
        return 3

    assert run(main, np=np, steps=10) == 1.0
    with pytest.raises(WorkerFailedError, match="missing 1 required positional argument: 'steps'"):
        run(main, np=np)
    with pytest.raises(
        PayloadError, match=r"main returned \(builtins.generator\) .*list\(\.\.\.\)"
    ):
        run(makes_steps, np=np)
    with pytest.raises(PayloadError, match=r"returned\[0\] \(builtins.coroutine\) .*asyncio.run"):
        run(lambda: [train()], np=np)


def test_a_result_larger_than_spark_takes_comes_back_whole(spark: Any) -> None:
    def main() -> Any:
        import numpy as np

        return {"array": np.arange(5_000_000), "bytes": bytes(range(250)) * 40_000}

    assert session.max_result_bytes(spark) is not None  # the session has read its settings now
    conf = spark.sparkContext._jsc.sc().conf()  # each stage reads it
    conf.set("spark.driver.maxResultSize", "1m")
    try:
        value = run(main)
        with pytest.raises(Exception, match="maxResultSize"):
            spark.range(0, 1_000_000, 1, 1).toPandas()
    finally:
        conf.remove("spark.driver.maxResultSize")
    assert value["bytes"] == bytes(range(250)) * 40_000
    value["array"][0] = 7
    assert value["array"].sum() == 7 + 5_000_000 * 4_999_999 // 2


def test_without_the_driver_a_result_comes_in_rows_as_large_as_spark_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "bind_host", lambda spark: "127.0.0.1")
    monkeypatch.setattr(addresses, "advertised_host", lambda spark: "127.0.0.2")

    def main(size: int) -> Any:
        import numpy as np

        if mains.rank() != 0 and size > 30_000_000:
            mains.wait_for_ever()  # nobody waits for the others when it cannot come
        return np.ones(size, np.uint8), "and text"

    monkeypatch.setattr(session, "max_result_bytes", lambda spark: 30_000_000)
    array, text = run(main, size=20_000_000)
    array[0] = 2
    assert (array.sum(), text) == (20_000_001, "and text")
    with pytest.raises(
        PayloadError, match=r"38\.1 MiB .* 28\.6 MiB .* 127\.0\.0\.2:.*spark\.driver\.maxResultSize"
    ):
        run(main, size=40_000_000)


def test_an_interrupt_while_the_result_is_sent_ends_the_run(
    spark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from horovodrunner.flows.results.driver import ResultStore
    from horovodrunner.wire.upload import TransferHandler

    def slowly(request: Any, pieces: Any) -> None:
        piece = next(pieces)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in piece.chunks:  # until the connection is closed
            time.sleep(0.1)

    handler = TransferHandler("the result's transfer", slowly)
    monkeypatch.setattr(ResultStore, "handler", handler)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        run(lambda: bytes(100_000_000))
    assert marked_processes() == []
    assert spark.range(10).count() == 10


def test_sparks_own_limit_is_read(spark: Any) -> None:
    limit = session.max_result_bytes(spark)
    assert limit is not None
    assert 0.9 * 2**30 < limit < 2**30


def run_for_ever(directory: str) -> None:
    mains.count_run(directory)
    mains.wait_for_ever()


def when_all_ranks_run(directory: Path, act: Callable[[], None]) -> threading.Thread:
    """Act from another thread as soon as main runs on both ranks."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + 60
        while len(list(directory.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def kill_agent_of(worker_pid: int) -> None:
    """Kill the PySpark worker process that the rank's worker belongs to, or the whole executor."""
    os.kill(psutil.Process(worker_pid).ppid(), signal.SIGKILL)


def kill_executor_of(worker_pid: int) -> None:
    executor = next(p for p in psutil.Process(worker_pid).parents() if p.name() == "java")
    executor.kill()


@pytest.mark.parametrize(("on_rank", "kill"), [(1, kill_agent_of), (0, kill_executor_of)])
def test_main_runs_once_when_spark_tries_the_stage_again(
    tmp_path: Path, on_rank: int, kill: Any, spark: Any
) -> None:
    def kill_one() -> None:
        [path] = tmp_path.glob(f"rank{on_rank}-*")
        kill(int(path.name.split("-")[1]))

    killer = when_all_ranks_run(tmp_path, kill_one)
    with pytest.raises((BarrierStageError, WorkerFailedError)) as caught:
        run(run_for_ever, directory=str(tmp_path))
    killer.join()
    assert "lost" in str(caught.value)
    assert workers_left() == []
    assert len(list(tmp_path.iterdir())) == 2
    wait_until(lambda: (slots.total_slots(spark) or 0) >= 2)  # Spark replaces the executor
    assert run(place)["WORLD_SIZE"] == 2
    assert len(list(tmp_path.iterdir())) == 2


def hold_a_slot(spark: Any, directory: Path) -> threading.Thread:
    """Keep one of the two slots busy with a job of somebody else's, until ``enough`` is there."""
    marker, enough = str(directory / "holding"), str(directory / "enough")

    def hold(rows: Any) -> Any:
        Path(marker).touch()
        while not Path(enough).exists():
            time.sleep(0.02)
        return rows

    thread = threading.Thread(
        target=lambda: spark.sparkContext.parallelize([1], 1).mapPartitions(hold).collect()
    )
    thread.start()
    deadline = time.monotonic() + 30
    while not Path(marker).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return thread


def test_a_run_waits_until_its_slots_are_free_and_says_who_holds_them(
    spark: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "FIRST_LOOK_SECONDS", 1.0)
    holder = hold_a_slot(spark, tmp_path)
    releasing = threading.Timer(2.5, (tmp_path / "enough").touch)
    releasing.start()
    assert run(place)["WORLD_SIZE"] == 2
    assert (tmp_path / "enough").exists()
    releasing.join()
    holder.join()
    shown = capsys.readouterr().out
    assert re.search(r"waiting for 2 slots, 1 free, 1 held by job \d+\n", shown)


def test_slots_that_stay_taken_are_a_start_timeout(spark: Any, tmp_path: Path) -> None:
    holder = hold_a_slot(spark, tmp_path)
    with pytest.raises(
        StartTimeoutError,
        match=r"2 tasks did not all start within 2 s \(1 free, 1 held by job \d+\)",
    ):
        HorovodRunner(np=2, start_timeout=2).run(mains.count_run, directory=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["holding"]
    (tmp_path / "enough").touch()
    holder.join()
    assert run(place)["WORLD_SIZE"] == 2


def test_two_runs_at_once_do_not_disturb_each_other() -> None:
    results: dict[str, Any] = {}

    def one(name: str) -> None:
        results[name] = run(lambda name: (name, os.environ["RANK"]), np=1, name=name)

    threads = [threading.Thread(target=one, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"a": ("a", "0"), "b": ("b", "0")}


def test_an_interrupt_ends_the_workers_and_keeps_the_session(spark: Any, tmp_path: Path) -> None:
    interrupter = when_all_ranks_run(tmp_path, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(run_for_ever, directory=str(tmp_path))
    interrupter.join()
    assert marked_processes() == []
    assert spark.range(10).count() == 10


def test_a_cancelled_job_group_ends_the_run_and_says_so(spark: Any, tmp_path: Path) -> None:
    group = "a cell of the user's"
    spark.sparkContext.setJobGroup(group, "the user's own description")
    canceller = when_all_ranks_run(tmp_path, lambda: spark.sparkContext.cancelJobGroup(group))
    try:
        with pytest.raises(
            BarrierStageError, match=r"job was cancelled: Job \d+ cancelled part of"
        ):
            run(run_for_ever, directory=str(tmp_path))
        assert marked_processes() == []
    finally:
        canceller.join()
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)


def test_the_users_own_job_properties_are_left_alone(spark: Any) -> None:
    context = spark.sparkContext
    context.setJobGroup("mine", "my description")
    try:
        run(place, np=1)
        assert context.getLocalProperty("spark.jobGroup.id") == "mine"
        assert context.getLocalProperty("spark.job.description") == "my description"
        assert len(context.getJobTags()) == 0
    finally:
        context.setLocalProperty("spark.jobGroup.id", None)


def test_a_port_that_is_taken_is_refused_with_the_conf_to_change(spark: Any) -> None:
    import socket

    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        spark.conf.set("spark.horovodrunner.driver.port", str(port))
        try:
            with pytest.raises(
                ConfigurationError, match=rf"{port}.*spark\.horovodrunner\.driver\.port"
            ):
                run(place)
        finally:
            spark.conf.unset("spark.horovodrunner.driver.port")


@pytest.mark.parametrize("port", ["http", "-1", "65536"])
def test_a_port_that_is_none_is_refused(spark: Any, port: str) -> None:
    spark.conf.set("spark.horovodrunner.driver.port", port)
    try:
        with pytest.raises(ConfigurationError, match=f"driver.port='{port}'"):
            run(place)
    finally:
        spark.conf.unset("spark.horovodrunner.driver.port")


@pytest.mark.parametrize("ports", ["http", "40000", "4000-3000", "40000-70000", "0-10"])
def test_a_range_of_ports_that_is_none_is_refused(spark: Any, ports: str) -> None:
    spark.conf.set("spark.horovodrunner.ports", ports)
    try:
        with pytest.raises(ConfigurationError, match=f"spark.horovodrunner.ports='{ports}'"):
            run(place)
    finally:
        spark.conf.unset("spark.horovodrunner.ports")


def test_executors_that_do_not_register_in_time_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slots, "NOTE_SECONDS", 0.3)
    monkeypatch.setattr(slots, "total_slots", lambda spark, request: 1)
    with pytest.raises(StartTimeoutError, match=r"2 are to come .*after 1 s there are 1"):
        HorovodRunner(np=2, start_timeout=1).run(place)
    assert "waiting for 2 slots, 1 have registered so far" in capsys.readouterr().out


def test_executors_that_nobody_announced_are_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "QUIET_SECONDS", 0.3)
    monkeypatch.setattr(slots, "total_slots", lambda spark, request: 1)
    monkeypatch.setattr(slots, "_expected_slots", lambda spark, request: None)
    with pytest.raises(ClusterCapacityError, match=r"np=2 needs 2 .* has 1"):
        run(place)


@pytest.mark.parametrize(
    ("conf", "value"),
    [("spark.network.crypto.enabled", "true"), ("spark.io.encryption.enabled", "true")],
)
def test_a_cluster_that_asks_for_encryption_is_refused_unless_allowed(
    conf: str, value: str, monkeypatch: pytest.MonkeyPatch, spark: Any
) -> None:
    asked = {conf: value}
    get = type(spark.conf).get
    monkeypatch.setattr(
        type(spark.conf),
        "get",
        lambda self, name, *default: asked.get(name) or get(self, name, *default),
    )
    with pytest.raises(ConfigurationError, match=rf"{conf}=true.*spark.horovodrunner.allow"):
        run(place)
    asked["spark.horovodrunner.allowUnencrypted"] = "true"
    assert run(place, np=1)["WORLD_SIZE"] == 1


def test_a_run_that_cannot_reach_the_driver_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executor_logs: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOROVOD_TIMELINE", str(tmp_path / "t.json"))
    monkeypatch.setattr(addresses, "bind_host", lambda spark: "127.0.0.1")
    monkeypatch.setattr(addresses, "advertised_host", lambda spark: "127.0.0.2")
    monkeypatch.setattr(cluster, "SILENT_SECONDS", 2.0)

    def main() -> str:
        mains.log_things()
        time.sleep(10)
        return "done"

    runner = HorovodRunner(np=2, driver_log_verbosity="all", start_timeout=6)
    assert runner.run(main) == "done"
    shown = capsys.readouterr().out
    assert shown.count("cannot reach this process at 127.0.0.2") == 1  # not certain yet
    assert "could not reach this process at 127.0.0.2: what the ranks printed" in shown
    assert f"nothing came of HOROVOD_TIMELINE={tmp_path}/t.json" in shown
    logged = "\n".join(line for lines in executor_stderr(executor_logs).values() for line in lines)
    assert "cannot be reached from here" in logged
    assert "[1]<log_to_driver>:from rank 1" in logged


def test_no_secret_is_on_a_command_line() -> None:
    def main() -> list[str]:
        # With attributes named, process_iter gives None for what has just become a zombie.
        return [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]

    # A warm parent of another test has a digest in its address.
    words = [each for each in run(main) if "horovodrunner" in each and "--keep-warm" not in each]
    assert words
    assert not any(re.search(r"token|[0-9a-f]{32}", line) for line in words)
