"""A run in MLflow's tracking server, or in what else a tracking URI names. Runs in: the driver.

Each call tries once. MLflow's own client tries again for minutes, in the calling thread, and only
variables of the whole process would change that: so what can be sent without it is sent by its
function for one HTTP request, and before anything else the server is asked whether it answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from horovodrunner.formatting import in_one_line

__all__ = [
    "MAX_METRICS",
    "MAX_TEXTS",
    "Metric",
    "RefusedError",
    "RunInMlflow",
    "UnavailableError",
    "is_local",
]

MAX_METRICS = 1000
MAX_TEXTS = 100
"""Metrics, and parameters or tags, in one request: more are refused by MLflow's servers."""

REQUEST_SECONDS = 20.0
PROBE_SECONDS = 5.0

_LOCAL_SCHEMES = frozenset({"", "file", "sqlite"})
_STAYS_SO = frozenset(
    {
        "CUSTOMER_UNAUTHORIZED",
        "ENDPOINT_NOT_FOUND",
        "INVALID_STATE",
        "PERMISSION_DENIED",
        "RESOURCE_DOES_NOT_EXIST",
        "UNAUTHENTICATED",
    }
)
"""MLflow's errors that another try seldom changes."""


class Metric(NamedTuple):
    """A number as MLflow keeps it; `time` is in milliseconds since the epoch."""

    name: str
    value: float
    time: int
    step: int


class UnavailableError(Exception):
    """It did not work now; `may_pass` says whether it is likely to work a little later."""

    def __init__(self, text: str, *, may_pass: bool = True) -> None:
        super().__init__(text)
        self.may_pass = may_pass


class RefusedError(Exception):
    """What was sent will never be stored."""


class RunInMlflow:
    """The run with this id; without one, what :meth:`start` starts.

    A thread of its own makes and uses it: MLflow notes for each thread which run is active.
    """

    def __init__(self, uri: str, run_id: str = "") -> None:
        from mlflow import MlflowClient

        self.run_id = run_id
        self._client: Any = MlflowClient(tracking_uri=uri)
        store = getattr(getattr(self._client, "_tracking_client", None), "store", None)
        self._credentials: Any = getattr(store, "get_host_creds", None)
        """Returns what HTTP requests need; None where the store is none of a server's."""

    def start(self, name: str) -> str:
        """Start a run as ``mlflow.start_run()`` does, and return its experiment's id."""
        import mlflow

        info = self._call(mlflow.start_run, run_name=name, log_system_metrics=False).info
        self.run_id = info.run_id
        return str(info.experiment_id)

    def log_metrics(self, metrics: Sequence[Metric]) -> None:
        """Store numbers; a server that has some of them already keeps those once."""
        if self._credentials is None:
            from mlflow.entities import Metric as Entity

            entities = [Entity(*each) for each in metrics]
            self._call(self._client.log_batch, self.run_id, metrics=entities)
            return
        rows = [
            {"key": name, "value": _in_json(value), "timestamp": time, "step": step}
            for name, value, time, step in metrics
        ]
        self._post("log-batch", metrics=rows)

    def log_texts(self, kind: str, texts: Mapping[str, str]) -> None:
        """Store ``"params"``, which can be set once, or ``"tags"``."""
        if self._credentials is None:
            from mlflow.entities import Param, RunTag

            make = Param if kind == "params" else RunTag
            entities = [make(name, text) for name, text in texts.items()]
            self._call(self._client.log_batch, self.run_id, **{kind: entities})
            return
        rows = [{"key": name, "value": text} for name, text in texts.items()]
        self._post("log-batch", **{kind: rows})

    def log_file(self, path: str, directory: str) -> None:
        """Store a file as an artifact in a directory, "" for none."""
        self._call(self._client.log_artifact, self.run_id, path, directory or None)

    def set_status(self, status: str) -> None:
        """Set ``"RUNNING"``, ``"FINISHED"``, ``"FAILED"`` or ``"KILLED"``."""
        has_ended = status != "RUNNING"
        if self._credentials is None:
            set_it = self._client.set_terminated if has_ended else self._client.update_run
            self._call(set_it, self.run_id, status)
            return
        end = {"end_time": int(time.time() * 1000)} if has_ended else {}
        self._post("update", status=status, **end)

    def _post(self, verb: str, **body: Any) -> None:
        path = f"/api/2.0/mlflow/runs/{verb}"

        def post() -> None:
            from mlflow.utils.rest_utils import verify_rest_response

            body["run_id"] = self.run_id
            verify_rest_response(self._request("POST", path, REQUEST_SECONDS, json=body), path)

        _translated(post)

    def _call(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call what tries again by itself, if the server answers at all."""
        if self._credentials is not None:
            _translated(self._probe)
        return _translated(act, *args, **kwargs)

    def _probe(self) -> None:
        response = self._request("GET", "/health", PROBE_SECONDS)
        if response.status_code >= 500:
            raise UnavailableError(f"HTTP status {response.status_code}: {response.text:.200}")

    def _request(self, method: str, path: str, timeout: float, **options: Any) -> Any:
        from mlflow.utils.rest_utils import http_request

        return http_request(
            self._credentials(),
            path,
            method,
            max_retries=0,
            raise_on_status=False,
            timeout=timeout,
            **options,
        )


def is_local(uri: str) -> bool:
    """Return whether a tracking URI names something on this machine's disk."""
    return urlsplit(uri).scheme in _LOCAL_SCHEMES


def _translated(act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return act(*args, **kwargs)
    except UnavailableError:
        raise
    except Exception as error:
        code = str(getattr(error, "error_code", ""))
        text = in_one_line(_innermost(error))
        if code == "INVALID_PARAMETER_VALUE":
            raise RefusedError(text) from error
        raise UnavailableError(text, may_pass=code not in _STAYS_SO) from error


def _innermost(error: BaseException) -> BaseException:
    """Return what a connection met, without the layers that each say that they failed."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _in_json(value: float) -> float | str:
    """Return a number as protobuf writes it in JSON."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
