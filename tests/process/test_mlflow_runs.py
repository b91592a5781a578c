"""Runs of real ranks, as MLflow's own server has them in the end; it asks for a password."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from horovodrunner import HorovodRunner, WorkerFailedError, metrics
from horovodrunner.flows.mlflow import delivery
from tests import processes
from tests.waiting import wait_for_line, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

USER, PASSWORD = "admin", "a long password 1"


AUTHENTICATION = """
[mlflow]
default_permission = READ
database_uri = sqlite:///basic_auth.db
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# else each request costs half a second of a processor
auth_cache_ttl_seconds = 600
auth_cache_max_size = 10
"""


class Server:
    """``mlflow server`` on a free port, and on the same one when it is started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = "0"
        self.process: processes.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        log = self.directory / f"server-{self.port}.log"
        store = f"sqlite:///{self.directory / 'mlflow.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
        command += ["--host", "127.0.0.1", "--port", self.port, "--workers", "1"]
        command += ["--backend-store-uri", store, "--artifacts-destination", "artifacts"]
        (self.directory / "auth.ini").write_text(AUTHENTICATION)
        environment = {
            **os.environ,
            "MLFLOW_AUTH_CONFIG_PATH": str(self.directory / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": USER,
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (
            log.open("w") as out,
            processes.started(
                command, env=environment, cwd=self.directory, stdout=out, stderr=processes.STDOUT
            ) as self.process,
        ):
            self.port = wait_for_line(r"running on http://127\.0\.0\.1:(\d+)", log)[1]
            yield

    def stop(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    with server.running():
        yield server


@pytest.fixture
def client(
    server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """MLflow's client, and an experiment of the test's own, which is the one to use."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment(request.node.name))
    yield client
    monkeypatch.undo()


def only_run(client: Any) -> Any:
    (run,) = client.search_runs([os.environ["MLFLOW_EXPERIMENT_ID"]])
    return run


def history(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    found = client.get_metric_history(run.info.run_id, name)
    return sorted((each.step, each.value) for each in found)


def test_a_run_is_started_and_has_all_of_it(
    client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(lr: float, token: str) -> None:
        for step in range(3):
            numbers = {"loss": lr * step + int(os.environ["RANK"]), "acc@1": float("nan")}
            metrics.report(step, **numbers)  # type: ignore[arg-type]

    runner = HorovodRunner(np=-2, mlflow=True, max_restarts=1, run_dir=tmp_path)
    runner.run(main, lr=0.5, token="x")
    run = only_run(client)
    assert run.info.status == "FINISHED"
    assert run.info.run_name.endswith("main")
    assert history(client, run, "loss") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert history(client, run, "loss.mean") == [(0, 0.5), (1, 1.0), (2, 1.5)]
    assert str(run.data.metrics["acc_1"]) == "nan"
    assert run.data.params["lr"] == "0.5"
    assert run.data.params["token"] == "(not shown)"
    assert run.data.params["horovodrunner.np"] == "-2"
    assert run.data.params["horovodrunner.max_restarts"] == "1"
    assert run.data.tags["horovodrunner.status"] == "finished"
    assert run.data.tags["horovodrunner.versions.Python"].startswith("3.")
    assert run.data.tags["horovodrunner.record"] == runner.record
    assert [each.path for each in client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert f"MLflow's run {run.info.run_id} at http://127.0.0.1" in capsys.readouterr().out


def test_what_a_host_uses_has_mlflows_own_names(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("horovodrunner.processes.driver.run.USAGE_SECONDS", 0.05)
    monkeypatch.setattr(delivery, "SEND_SECONDS", 0.1)

    def main() -> None:
        import requests

        url = f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/runs/get"
        query = {"run_id": os.environ["MLFLOW_RUN_ID"]}

        def has_usage() -> bool:
            answer = requests.get(url, query, auth=(USER, PASSWORD), timeout=60)
            return "system_memory_usage_percentage" in answer.text

        wait_until(has_usage)

    HorovodRunner(np=-1, mlflow=True).run(main)
    found = only_run(client).data.metrics
    host = os.uname().nodename
    (percent,) = [value for name, value in found.items() if name.endswith("y_usage_percentage")]
    assert 0 < percent <= 100
    assert f"system/{host}/cpu_utilization_percentage" in found


@pytest.mark.parametrize("how", ["exception", "interrupt", "stop"])
def test_a_run_that_ends_early_has_its_status(client: Any, how: str) -> None:
    def main() -> NoReturn:
        metrics.report(step=1, loss=1.0)
        if how == "exception":
            raise ValueError(f"diverged with {os.environ['MLFLOW_TRACKING_PASSWORD']}")
        if how == "interrupt":
            os.kill(os.getppid(), signal.SIGINT)
        signal.pause()
        raise AssertionError

    def stop(point: object) -> None:
        if how == "stop":
            raise LookupError("hopeless")

    expected, status = {
        "exception": (WorkerFailedError, "FAILED"),
        "interrupt": (KeyboardInterrupt, "KILLED"),
        "stop": (LookupError, "KILLED"),
    }[how]
    with pytest.raises(expected):
        HorovodRunner(np=-1, mlflow=True, on_report=stop, name=f"by {how}").run(main)
    run = only_run(client)
    assert run.info.status == status
    assert run.info.run_name == f"by {how}"
    assert history(client, run, "loss") == [(1, 1.0)]
    if how == "exception":
        assert "ValueError: diverged with (not shown)" in run.data.tags["horovodrunner.error"]


def test_the_drivers_active_run_is_mains_too(client: Any) -> None:
    def main() -> str:
        import mlflow
        import numpy as np
        from sklearn.linear_model import LinearRegression

        mlflow.sklearn.autolog(log_models=False, log_datasets=False)
        if os.environ["RANK"] == "0":
            mlflow.start_run()
            mlflow.log_metric("own", 5.0)
        metrics.report(step=0, loss=0.25)
        LinearRegression().fit(np.eye(4), np.arange(4.0))
        return mlflow.active_run().info.run_id if os.environ["RANK"] == "0" else ""

    import mlflow

    with mlflow.start_run() as active:
        assert HorovodRunner(np=-2).run(main) == active.info.run_id
        run = only_run(client)  # rank 1 has started none
        assert run.info.run_id == active.info.run_id
        assert run.info.status == "RUNNING"
        assert run.data.tags["horovodrunner.status"] == "finished"
        HorovodRunner(np=-1, mlflow=False).run(metrics.report, step=0, other=1.0)
    run = only_run(client)
    assert run.info.status == "FINISHED"
    assert run.data.metrics.keys() >= {"own", "loss"}
    assert len(history(client, run, "training_mean_squared_error")) == 1  # not rank 1's, too
    assert "other" not in run.data.metrics


def test_a_parameter_that_is_another_stays_and_is_named(
    client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(lr: float) -> None:
        metrics.report(step=0, loss=lr)

    import mlflow

    with mlflow.start_run():
        HorovodRunner(np=-1).run(main, lr=0.5)
        HorovodRunner(np=-1).run(main, lr=0.25)
    run = only_run(client)
    assert run.data.params["lr"] == "0.5"
    assert history(client, run, "loss") == [(0, 0.25), (0, 0.5)]
    assert re.search(r"MLflow does not store lr: .*nested=True", capsys.readouterr().out)


def test_a_wrong_password_is_told_and_costs_nothing(
    client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    assert HorovodRunner(np=-1, mlflow=True).run(lambda: 7) == 7
    out = capsys.readouterr().out
    assert "MLflow takes nothing" in out
    assert "has not got the outcome" in out
    assert "wrong" not in out


def test_a_server_that_is_not_there_costs_nothing(
    client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        metrics.report(step=0, loss=1.0)
        return 7

    monkeypatch.setattr(delivery, "END_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    runner = HorovodRunner(np=-1, mlflow=True)
    assert runner.run(main) == 7
    assert runner.history["loss"] == {0: 1.0}
    out = capsys.readouterr().out
    assert re.search(r"http://127\.0\.0\.1:1 has not got (\d+) of \1 numbers: .*refused", out)


def test_an_interrupt_ends_the_wait_and_nothing_else(
    client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(delivery.Delivery, "join", interrupted)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert HorovodRunner(np=-1, mlflow=True).run(lambda: 7) == 7
    assert "has not got" in capsys.readouterr().out


def test_nothing_is_lost_while_the_server_is_stopped_and_started_again(
    server: Server, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of the file: it leaves no server."""
    monkeypatch.setattr(delivery, "SEND_SECONDS", 0.1)

    def main() -> None:
        for step in range(3):
            wait_until((tmp_path / f"step {step}").exists)
            metrics.report(step=step, loss=float(step))
        wait_until((tmp_path / "end").exists)

    runner = HorovodRunner(np=-1, mlflow=True)
    running = threading.Thread(target=runner.run, args=(main,))
    running.start()
    (tmp_path / "step 0").touch()
    wait_until(lambda: len(runner.history) == 1)
    experiment = os.environ["MLFLOW_EXPERIMENT_ID"]
    wait_until(lambda: any(each.data.metrics for each in client.search_runs([experiment])))
    server.stop()
    (tmp_path / "step 1").touch()
    wait_until(lambda: len(runner.history) == 2)
    with server.running():
        (tmp_path / "step 2").touch()
        (tmp_path / "end").touch()
        running.join()
        run = only_run(client)
        assert history(client, run, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
        assert run.info.status == "FINISHED"
        server.stop()
