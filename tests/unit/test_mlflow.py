"""What is sent to MLflow, and when, without a server of MLflow's."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import dumps, loads
from pathlib import Path
from typing import Any, ClassVar

import pytest

from horovodrunner import ArgumentTypeError, ConfigurationError, HorovodRunner
from horovodrunner.flows.metrics.records import Point
from horovodrunner.flows.metrics.scalars import Scalar, ScalarStream
from horovodrunner.flows.mlflow import delivery as deliveries
from horovodrunner.flows.mlflow import naming, tracking
from horovodrunner.flows.mlflow.delivery import Delivery
from horovodrunner.flows.mlflow.tracking import Metric, RefusedError, RunInMlflow, UnavailableError
from horovodrunner.wire.events import Usage
from tests.waiting import wait_until


def reported(step: int, rank: int = 0, *, is_kept: bool = True, **values: float) -> list[Point]:
    return [Point(step, values, rank, time=10.0 * step, is_kept=is_kept)]


class TestScalars:
    def test_of_rank_0_all_is_kept(self) -> None:
        stream = ScalarStream(size=1)
        assert list(stream.take(reported(3, loss=0.5, acc=1.0))) == [
            Scalar("loss", 0.5, 3, 30.0),
            Scalar("acc", 1.0, 3, 30.0),
        ]

    def test_ranks_that_differ_have_statistics(self) -> None:
        stream = ScalarStream(size=3)
        for rank, loss in enumerate((1.0, 2.0)):
            found = list(stream.take(reported(0, rank, is_kept=rank == 0, loss=loss)))
            assert [each.name for each in found] == ["loss"] * (rank == 0)
        assert list(stream.take(reported(0, 2, is_kept=False, loss=6.0))) == [
            Scalar("loss.mean", 3.0, 0, 0.0),
            Scalar("loss.min", 1.0, 0, 0.0),
            Scalar("loss.max", 6.0, 0, 0.0),
        ]

    @pytest.mark.parametrize("value", [0.1, math.nan, math.inf])
    def test_what_is_the_same_everywhere_has_none(self, value: float) -> None:
        stream = ScalarStream(size=3)
        found = [each for rank in range(3) for each in stream.take(reported(0, rank, loss=value))]
        assert {each.name for each in found} == {"loss"}

    def test_a_rank_with_nan_differs(self) -> None:
        stream = ScalarStream(size=2)
        list(stream.take(reported(0, 0, loss=1.0)))
        found = {each.name: each.value for each in stream.take(reported(0, 1, loss=math.nan))}
        assert math.isnan(found["loss.mean"])
        assert found["loss.max"] == 1.0

    def test_steps_that_not_all_report_come_at_the_end(self) -> None:
        stream = ScalarStream(size=3)
        list(stream.take(reported(0, 0, loss=1.0)))
        list(stream.take(reported(0, 1, loss=3.0)))
        list(stream.take(reported(1, 0, loss=3.0)))
        assert [(each.name, each.value) for each in stream.rest()] == [
            ("loss.mean", 2.0),
            ("loss.min", 1.0),
            ("loss.max", 3.0),
        ]

    def test_steps_of_another_attempt_are_others(self) -> None:
        stream = ScalarStream(size=2)
        list(stream.take(reported(0, 0, loss=1.0)))
        stream.begin()
        assert len(list(stream.take(reported(0, 1, loss=3.0)))) == 1
        assert list(stream.rest()) == []


NAMES = [
    ("loss", "loss"),
    ("val/loss", "val/loss"),
    ("a b-c.d:e", "a b-c.d:e"),
    ("acc@5 (top)", "acc_5 _top_"),
    ("../../x", "x"),
    ("/x//y/", "x/y"),
    (".", "_"),
    ("", "_"),
    ("größe", "größe"),
    ("x" * 300, "x" * 250),
]


class TestNames:
    @pytest.mark.parametrize(("given", "wanted"), NAMES)
    def test_what_mlflow_does_not_take_is_replaced(self, given: str, wanted: str) -> None:
        assert naming.metric_name(given) == wanted

    @pytest.mark.heavy
    @pytest.mark.parametrize("name", [wanted for _, wanted in NAMES])
    def test_mlflow_takes_what_it_is_replaced_by(self, name: str) -> None:
        from mlflow.utils import validation

        validation._validate_metric_name(name)

    def test_other_ranks_numbers_have_their_rank(self) -> None:
        assert naming.scalar_name(Scalar("loss", 1.0, 0, 0.0, rank=2)) == "rank-2/loss"

    def test_parameters_are_what_is_plain(self) -> None:
        arguments = {
            "lr": 0.1,
            "layers": [64, 32],
            "optimizer": {"name": "adam", "betas": (0.9, 0.99)},
            "data": object(),
            "model": [object()],
            "path": Path("/data"),
            "nothing": None,
            "password": "hunter2",
            "url": "https://me:hunter2@host/x",
            "long": "x" * 1000,
        }
        found = naming.parameters(-2, {"np": -2, "max_restarts": 1}, arguments)
        assert len(found.pop("long")) < 500
        assert found == {
            "lr": "0.1",
            "layers": "[64, 32]",
            "optimizer.name": "adam",
            "optimizer.betas": "(0.9, 0.99)",
            "path": "/data",
            "nothing": "None",
            "password": "(not shown)",
            "url": "(not shown)",
            "horovodrunner.np": "-2",
            "horovodrunner.max_restarts": "1",
        }

    def test_system_metrics_have_the_names_of_mlflows_monitor(self) -> None:
        usage = Usage(0, "node/1", 5.0, 90.0, 10, 50.0, 4 * 10**9, 8 * 10**9, ((0, 75.0, 1, 4),))
        assert dict(naming.system_metrics(usage)) == {
            "system/node_1/cpu_utilization_percentage": 50.0,
            "system/node_1/system_memory_usage_megabytes": 4000.0,
            "system/node_1/system_memory_usage_percentage": 50.0,
            "system/node_1/gpu_0_utilization_percentage": 75.0,
            "system/node_1/gpu_0_memory_usage_megabytes": 1e-6,
            "system/node_1/gpu_0_memory_usage_percentage": 25.0,
        }


class FakeRun(RunInMlflow):
    """Stores what it is given, when it is `up`, but for names that begin with "bad"."""

    def __init__(self) -> None:
        self.up = threading.Event()
        self.up.set()
        self.batches: list[int] = []
        self.metrics: list[Metric] = []
        self.texts: dict[str, str] = {}
        self.status = ""

    def log_metrics(self, metrics: Sequence[Metric]) -> None:
        self._check([each.name for each in metrics])
        self.batches.append(len(metrics))
        self.metrics += metrics

    def log_texts(self, kind: str, texts: Mapping[str, str]) -> None:
        self._check(list(texts))
        self.batches.append(len(texts))
        self.texts |= texts

    def set_status(self, status: str) -> None:
        self._check([])
        self.status = status

    def _check(self, names: list[str]) -> None:
        if not self.up.is_set():
            raise UnavailableError("down")
        if any(name.startswith("bad") for name in names):
            raise RefusedError("a bad name")


def numbers(count: int, name: str = "loss") -> list[Metric]:
    return [Metric(name, float(step), 0, step) for step in range(count)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(deliveries, "SEND_SECONDS", 0.01)


@pytest.mark.usefixtures("quick")
class TestDelivery:
    def finish(self, delivery: Delivery) -> None:
        delivery.finish([lambda run: run.set_status("FINISHED")])
        wait_until(lambda: delivery.join(0.1))

    def test_batches_are_no_larger_than_mlflow_takes(self) -> None:
        run = FakeRun()
        delivery = Delivery(lambda: run, lambda text: None)
        delivery.add(numbers(2500))
        delivery.add_texts("params", {f"p{number}": "x" for number in range(250)})
        delivery.start()
        self.finish(delivery)
        assert run.batches == [100, 100, 50, 1000, 1000, 500]
        assert run.metrics == numbers(2500)
        assert run.status == "FINISHED"
        assert delivery.is_complete
        assert delivery.delivered == 2500

    def test_nothing_is_lost_while_the_server_is_down(self) -> None:
        run = FakeRun()
        run.up.clear()
        delivery = Delivery(lambda: run, lambda text: None)
        delivery.start()
        delivery.add(numbers(10))
        wait_until(lambda: delivery.error)
        delivery.add(numbers(3, "acc"))
        run.up.set()
        self.finish(delivery)
        assert run.metrics == [*numbers(10), *numbers(3, "acc")]
        assert delivery.is_complete

    def test_a_run_that_cannot_be_opened_at_first_is_opened_later(self) -> None:
        run, tries = FakeRun(), iter([False, False, True])

        def opened() -> RunInMlflow:
            if next(tries):
                return run
            raise UnavailableError("down")

        delivery = Delivery(opened, lambda text: None)
        delivery.add(numbers(3))
        delivery.start()
        self.finish(delivery)
        assert run.metrics == numbers(3)

    def test_the_end_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deliveries, "END_SECONDS", 0.2)
        run = FakeRun()
        run.up.clear()
        delivery = Delivery(lambda: run, lambda text: None)
        delivery.add(numbers(10))
        delivery.start()
        self.finish(delivery)
        assert not delivery.is_complete
        assert delivery.left == 10
        assert str(delivery.error) == "down"

    def test_what_stays_so_is_told_at_once_and_not_waited_for(self) -> None:
        def opened() -> RunInMlflow:
            raise UnavailableError("no such user", may_pass=False)

        told: list[str] = []
        delivery = Delivery(opened, told.append)
        delivery.start()
        wait_until(lambda: told)
        self.finish(delivery)
        assert len(told) == 1
        assert "no such user" in told[0]
        assert not delivery.is_complete

    def test_what_is_refused_is_left_out_by_itself(self) -> None:
        run = FakeRun()
        delivery = Delivery(lambda: run, lambda text: None)
        delivery.add([*numbers(100), Metric("bad", 1.0, 0, 0), *numbers(50, "acc")])
        delivery.add_texts("params", {"lr": "0.1", "bad lr": "0.2"})
        delivery.start()
        self.finish(delivery)
        assert run.metrics == [*numbers(100), *numbers(50, "acc")]
        assert run.texts == {"lr": "0.1"}
        assert delivery.refused == {"bad lr": "a bad name", "bad": "a bad name"}

    def test_a_backlog_is_thinned_evenly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deliveries, "MAX_WAITING", 100)
        run = FakeRun()
        delivery = Delivery(lambda: run, lambda text: None)
        for step in range(60):  # two numbers each, of which none may take the other's place
            delivery.add([Metric("loss", 0.0, 0, step), Metric("acc", 0.0, 0, step)])
        delivery.start()
        self.finish(delivery)
        steps = {name: [m.step for m in run.metrics if m.name == name] for name in ("loss", "acc")}
        assert steps["loss"] == steps["acc"]
        assert steps["loss"][:25] == list(range(0, 50, 2))
        assert steps["loss"][-1] == 59
        assert delivery.thinned + len(run.metrics) == 120


class Answers(BaseHTTPRequestHandler):
    """A server that is full, or busy, for some requests, before it takes them."""

    statuses: ClassVar[list[int]] = []
    bodies: ClassVar[list[Any]] = []

    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        body = loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 200:
            self.bodies.append(body)
        code = {400: "INVALID_PARAMETER_VALUE", 403: "PERMISSION_DENIED"}.get(status, "X")
        self._answer(status, {"error_code": code, "message": "no"} if status != 200 else {})

    def _answer(self, status: int, body: Any) -> None:
        content = dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Answers.statuses, Answers.bodies = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as listening:
        serving = threading.Thread(target=listening.serve_forever, args=(0.01,))
        serving.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        serving.join()


@pytest.mark.heavy  # MLflow's import
class TestRequests:
    def test_numbers_are_those_of_protobufs_json(self, server: str) -> None:
        run = RunInMlflow(server, "abc")
        run.log_metrics([Metric("x", value, 7, 3) for value in (0.5, math.nan, -math.inf)])
        assert [each["value"] for each in Answers.bodies[0]["metrics"]] == [0.5, "NaN", "-Infinity"]
        assert Answers.bodies[0]["run_id"] == "abc"

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_full_or_busy_server_is_asked_once(self, server: str, status: int) -> None:
        """MLflow's client would try again for minutes, and hold up the end of the run."""
        Answers.statuses = [status]
        run = RunInMlflow(server, "abc")
        with pytest.raises(UnavailableError) as caught:
            run.log_metrics(numbers(1))
        assert caught.value.may_pass
        run.log_metrics(numbers(1))

    def test_a_server_that_never_answers_is_not_waited_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tracking, "REQUEST_SECONDS", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            run = RunInMlflow(f"http://127.0.0.1:{silent.getsockname()[1]}", "abc")
            with pytest.raises(UnavailableError, match="timed out"):
                run.log_metrics(numbers(1))

    def test_what_is_refused_is_told_from_what_fails(self, server: str) -> None:
        Answers.statuses = [400, 403]
        run = RunInMlflow(server, "abc")
        with pytest.raises(RefusedError):
            run.log_texts("params", {"lr": "1"})
        with pytest.raises(UnavailableError) as caught:
            run.log_texts("params", {"lr": "1"})
        assert not caught.value.may_pass

    @pytest.mark.usefixtures("quick")
    def test_all_arrives_at_a_server_that_was_full(self, server: str) -> None:
        Answers.statuses = [503, 500, 200, 503]
        delivery = Delivery(lambda: RunInMlflow(server, "abc"), lambda text: None)
        delivery.add(numbers(1500))
        delivery.start()
        TestDelivery().finish(delivery)
        assert [len(body.get("metrics", [])) for body in Answers.bodies] == [1000, 500, 0]
        assert Answers.bodies[-1]["status"] == "FINISHED"


class TestOptions:
    @pytest.mark.parametrize("value", ["yes", 1, None])
    def test_other_values_are_refused(self, value: Any) -> None:
        with pytest.raises(ArgumentTypeError, match=r"^mlflow=.*'auto', True or False"):
            HorovodRunner(np=-1, mlflow=value)

    def test_without_mlflow_it_is_refused_before_launch(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigurationError, match=r"mlflow=True needs MLflow.*pip install"):
            HorovodRunner(np=-1, mlflow=True)
        HorovodRunner(np=-1)
