"""What is used of Horovod's own launcher: its rendezvous server and horovodrun's options.

Runs in: the task (the server) and the driver (the options). The only import of ``horovod.runner``.
"""

from __future__ import annotations

import argparse
import contextlib
import http
import socket
import socketserver
import threading
import time
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from horovodrunner.errors import ArgumentValueError
from horovodrunner.placement.topology import Slot

__all__ = ["REFUSED", "Rendezvous", "environment_of"]

PLAN_SECONDS = 60.0
"""How long a worker's request waits for the plan, which is made right after the gather step."""

MAX_CONNECTIONS = 256
"""Each has a thread; for a further one, the oldest whose request has not arrived is closed."""

IDLE_SECONDS = 0.5
"""A connection has this long for its request before it is closed for another one."""

REQUEST_SECONDS = 10.0
"""A connection whose request has not arrived by then is closed in any case."""

CLOSE_SECONDS = 1.0
"""How long closing waits for the threads of open connections."""

MAX_VALUE_BYTES = 1024 * 1024
"""Largest value; Gloo stores one of about 150 bytes per peer for each rank."""

MAX_STORED_BYTES = 64 * 1024 * 1024
STORED_BYTES_PER_PAIR = 512
"""Every rank stores an address for each other one, up to twice: large runs may store more."""

_POLL_SECONDS = 0.05
_ENTRY_BYTES = 256
"""What a stored value takes besides its bytes."""


class _Handler(RendezvousHandler):  # type: ignore[misc]
    """Answers one request of Horovod's, once the plan is there.

    Horovod's server empties its store when it gets the plan, so what an eager worker had stored
    before would be lost and the run would die half a minute later.
    """

    timeout = REQUEST_SECONDS

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if refusal := self._refusal():
            self.send_status_code(refusal)
            return False
        if self.command != "PUT":
            self.server.request_arrived(self.connection)
        return True

    def _refusal(self) -> http.HTTPStatus | None:
        if self.command not in ("GET", "PUT", "DELETE"):
            # HEAD would be answered by http.server, from the files of the working directory.
            return http.HTTPStatus.NOT_IMPLEMENTED
        if self.path.count("/") != 2:  # /scope/key; Horovod would log an error for each
            return http.HTTPStatus.BAD_REQUEST
        if self.command == "PUT":
            size = self.headers.get("Content-Length", "")
            if not (size.isascii() and size.isdigit()):
                return http.HTTPStatus.BAD_REQUEST
            if len(size) > 20 or int(size) > MAX_VALUE_BYTES:
                return http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return None

    def do_PUT(self) -> None:  # noqa: N802 - http.server's name
        """Store a value; other than Horovod's, only a whole one."""
        size = int(self.headers["Content-Length"])
        value = self.rfile.read(size)
        if len(value) < size:
            return
        self.server.request_arrived(self.connection)
        _, scope, key = self.path.split("/")
        stored = self.server.store(scope, key, value)
        self.send_status_code(
            http.HTTPStatus.OK if stored else http.HTTPStatus.INSUFFICIENT_STORAGE
        )


class Rendezvous(RendezvousHTTPServer):  # type: ignore[misc]
    """Horovod's rendezvous server, on `port` or, with 0, on any free one."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, host: str, port: int = 0) -> None:
        super().__init__((host, port), _Handler, verbose=0)
        self.port: int = self.server_address[1]
        self._times_of_requests: tuple[float, float] | None = None
        self._planned = threading.Event()
        self._stored_limit = MAX_STORED_BYTES
        self._changed = threading.Condition()
        self._closing = False
        self._connections: set[socket.socket] = set()
        self._awaited: dict[socket.socket, float] = {}
        """Since when a request has been awaited, oldest first."""
        self._thread = threading.Thread(
            target=self.serve_forever,
            kwargs={"poll_interval": _POLL_SECONDS},
            name="horovodrunner-rendezvous",
            daemon=True,
        )
        self._thread.start()

    def server_bind(self) -> None:
        """Bind without asking DNS for the host's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def set_plan(self, slots: Sequence[Slot]) -> None:
        """Answer the requests that waited for the plan, as all later ones."""
        plan = [
            SlotInfo(
                hostname=slot.host_id,
                rank=slot.rank,
                local_rank=slot.local_rank,
                cross_rank=slot.cross_rank,
                size=slot.size,
                local_size=slot.local_size,
                cross_size=slot.cross_size,
            )
            for slot in slots
        ]
        self._stored_limit = max(MAX_STORED_BYTES, STORED_BYTES_PER_PAIR * len(plan) ** 2)
        self.init(plan)
        self._planned.set()

    def close(self) -> None:
        """End every connection, answered or not, and free the port."""
        self._planned.set()
        with self._changed:
            self._closing = True
            for connection in self._connections:
                _wake(connection)
            self._changed.notify_all()
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, CLOSE_SECONDS)

    def times_of_requests(self) -> tuple[float, float] | None:
        """Return when the first and the last request were answered, in seconds since the epoch."""
        return self._times_of_requests

    def store(self, scope: str, key: str, value: bytes) -> bool:
        """Store a value if there is room for it."""
        with self.cache_lock:
            stored = {(s, k): v for s, values in self.cache.items() for k, v in values.items()}
            stored[scope, key] = value
            size = sum(len(s) + len(k) + len(v) + _ENTRY_BYTES for (s, k), v in stored.items())
            if size > self._stored_limit:
                return False
            self.cache.setdefault(scope, {})[key] = value
            return True

    def request_arrived(self, connection: socket.socket) -> None:
        """Note that it is the peer's turn to wait, and let it wait for the plan."""
        with self._changed:
            self._awaited.pop(connection, None)
        self._planned.wait(PLAN_SECONDS)
        now = time.time()
        first, _ = self._times_of_requests or (now, now)
        self._times_of_requests = (first, now)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, as soon as there is room for it."""
        with self._changed:
            while len(self._connections) >= MAX_CONNECTIONS and not self._closing:
                self._drop_overdue(IDLE_SECONDS, most=1)
                self._changed.wait(_POLL_SECONDS)
            if self._closing:
                self.shutdown_request(request)
                return
            self._connections.add(request)
            self._awaited[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Close what is overdue; socketserver calls this all the time."""
        with self._changed:
            self._drop_overdue(REQUEST_SECONDS)

    def close_request(self, request: Any) -> None:
        """Close a connection and let the next one in."""
        with self._changed:
            super().close_request(request)
            self._connections.discard(request)
            self._awaited.pop(request, None)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: a worker that died in the middle of a request is reported as such."""

    def _drop_overdue(self, seconds: float, most: int = MAX_CONNECTIONS) -> None:
        before = time.monotonic() - seconds
        overdue = [connection for connection, since in self._awaited.items() if since < before]
        for connection in overdue[:most]:
            del self._awaited[connection]
            _wake(connection)


def _wake(connection: socket.socket) -> None:
    """Have the connection's thread, which may wait for bytes, close it."""
    with contextlib.suppress(OSError):  # the peer was faster
        connection.shutdown(socket.SHUT_RDWR)


_MPI = "workers are started by Spark and talk over Gloo, never by MPI"
_PLACED = "Spark places the ranks: np= says how many, the cluster's resources where"
_NO_SSH = "tasks are started by Spark, without ssh"
_FIXED_SIZE = (
    "the number of ranks stays the same while a run lasts; max_restarts= launches it again when "
    "a worker is lost"
)
_INTERFACE = (
    "each host's interface is the one that the others reach; the variable HOROVOD_GLOO_IFACE, set "
    "on the driver, names another one for all"
)

REFUSED = {
    "binding_args": _MPI,
    "check_build": "`python -m horovodrunner doctor` shows what is installed",
    "command": "main is what runs; options and their values are all that may stand here",
    "cooldown_range": _FIXED_SIZE,
    "disable_cache": f"there is nothing to cache: {_NO_SSH}",
    "elastic_timeout": _FIXED_SIZE,
    "help": "`horovodrun --help` prints it",
    "host_discovery_script": _FIXED_SIZE,
    "hostfile": _PLACED,
    "hosts": _PLACED,
    "max_num_proc": _FIXED_SIZE,
    "min_num_proc": _FIXED_SIZE,
    "mpi_args": _MPI,
    "mpi_threads_disable": _MPI,
    "nics": _INTERFACE,
    "num_proc": "np= of HorovodRunner says it",
    "output_filename": "the executors' logs keep every rank's output",
    "prefix_output_with_timestamp": "lines are prefixed with the rank; print the time in main",
    "reset_limit": _FIXED_SIZE,
    "slots": _PLACED,
    "ssh_identity_file": _NO_SSH,
    "ssh_port": _NO_SSH,
    "start_timeout": "start_timeout= of HorovodRunner says it",
    "use_jsrun": _MPI,
    "use_mpi": _MPI,
    "verbose": (
        'driver_log_verbosity="all" shows what the ranks print, --log-level=DEBUG what Horovod does'
    ),
    "version": "horovod.__version__ says it",
}
"""Why an option makes no sense here, by the name under which the parser stores it."""

_AUTOTUNING = (
    "autotune_log_file",
    "autotune_warmup_samples",
    "autotune_steps_per_sample",
    "autotune_bayes_opt_max_samples",
    "autotune_gaussian_process_noise",
)
_NEEDED = {"timeline_mark_cycles": "timeline_filename", **dict.fromkeys(_AUTOTUNING, "autotune")}
"""Options that Horovod ignores without another one."""


def environment_of(options: Sequence[str]) -> dict[str, str]:
    """Return the variables that ``horovodrun`` would set for these options.

    >>> environment_of(["--fusion-threshold-mb", "32", "--cycle-time-ms", "2"])
    {'HOROVOD_FUSION_THRESHOLD': '33554432', 'HOROVOD_CYCLE_TIME': '2.0'}
    """
    from horovod.runner import launch
    from horovod.runner.common.util import config_parser

    try:
        parser, given = _parse(options)
    except ArgumentValueError:
        raise
    except ValueError as error:
        raise _wrong(str(error)) from error
    except (OSError, TypeError, AttributeError, launch.yaml.YAMLError) as error:
        raise _wrong(
            f"the file that --config-file names cannot be used: {type(error).__name__}: {error}"
        ) from error
    _refuse(parser, given)  # a config file says things, too
    for name, other in _NEEDED.items():
        if getattr(given, name) and not getattr(given, other) and not given.config_file:
            raise _wrong(
                f"Horovod ignores {_as_option(name)} without {_as_option(other)}: give both, or "
                "set the HOROVOD_... variables on the driver instead"
            )
    environment: dict[str, str] = {}
    config_parser.set_env_from_args(environment, given)
    if given.autotune is False:  # horovodrun sets nothing then, and a variable would win
        environment[config_parser.HOROVOD_AUTOTUNE] = "0"
    return environment


class _Parser(argparse.ArgumentParser):
    """Raises an ArgumentValueError where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        raise _wrong(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        reasons = "; ".join(REFUSED[name] for name in ("help", "version"))
        raise _wrong(f"--help and --version run nothing: {reasons}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print nothing: what is wrong is raised."""


def _parse(options: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Call Horovod's function, which builds the parser and parses ``sys.argv`` in one go.

    A copy of it that finds another `argparse` leaves this process as it is, for other threads, too.
    """
    from horovod.runner import launch

    built: list[argparse.ArgumentParser] = []

    class Parser(_Parser):
        def parse_args(self, *_: Any) -> Any:  # type: ignore[override]
            for action in self._actions:
                action.required = False  # -np is
            built.append(self)
            given = super().parse_args(options)
            _refuse(self, given)  # before Horovod does what it asks for, such as --check-build
            return given

    argparse_for_it = types.SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser})
    names = {**vars(launch), "argparse": argparse_for_it}
    given: argparse.Namespace = types.FunctionType(launch.parse_args.__code__, names)()
    return built[0], given


def _refuse(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    for name, reason in REFUSED.items():
        value = getattr(given, name, None)
        if value not in (None, [], parser.get_default(name)):
            option = " ".join(value) if name == "command" else _as_option(name, parser)
            raise _wrong(f"{option!r} makes no sense with HorovodRunner: {reason}")


def _as_option(name: str, parser: argparse.ArgumentParser | None = None) -> str:
    for action in parser._actions if parser is not None else ():
        if action.dest == name:
            return "/".join(action.option_strings)
    return "--" + name.replace("_", "-")


def _wrong(message: str) -> ArgumentValueError:
    return ArgumentValueError(f"horovodrun_args: {message}")
