"""What `horovodrun` does, with Horovod's own launcher code. Runs in: the task.

Beside horovodrun_options.py the only file that imports ``horovod.runner``.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import math
import select
import socket
import socketserver
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from horovod.runner.common.util.hosts import HostInfo, SlotInfo, get_host_assignments
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from horovodrunner.placement.topology import Member, Slot, group_by_host, visible_devices

__all__ = ["Rendezvous", "assign_slots"]

PLAN_SECONDS = 60.0
"""How long a worker's request waits for the plan; it is made right after the gather step."""

MAX_CONNECTIONS = 256
"""So many are open at once, each with a thread; for a further one the oldest idle one is closed.

More workers than that may come at the same time: the kernel lets them wait for their turn.
"""

IDLE_SECONDS = 0.1
"""A peer that has sent nothing for so long is idle; workers send their request at once."""

REQUEST_SECONDS = 10.0
"""A peer whose request has not arrived by then is disconnected."""

CLOSE_SECONDS = 1.0
"""How long closing waits for the threads of open connections."""

MAX_HEAD_BYTES = 16 * 1024
MAX_VALUE_BYTES = 1024 * 1024
"""Largest value; Gloo stores one of about 150 bytes a rank."""

MAX_STORED_BYTES = 64 * 1024 * 1024
STORED_BYTES_PER_PAIR = 512
"""Every rank stores an address for each other one, up to twice: large runs may store more."""

_POLL_SECONDS = 0.05
"""How exact deadlines are."""

_ENTRY_BYTES = 256
"""What a stored value takes besides its bytes."""


def assign_slots(members: Sequence[Member]) -> list[Slot]:
    """Assign a slot to every worker, with Horovod's own host assignment.

    Parameters
    ----------
    members
        What the tasks gathered.

    Returns
    -------
    list of Slot
        In rank order; rank 0 belongs to partition 0.
    """
    groups = group_by_host(members)
    indices = {group.host_id: index for index, group in enumerate(groups)}
    hosts = [HostInfo(group.host_id, len(group.members)) for group in groups]
    plan = get_host_assignments(hosts, sum(host.slots for host in hosts))
    slots = []
    for info in plan:
        host_index = indices[info.hostname]
        group = groups[host_index]
        member = group.members[info.local_rank]
        slots.append(
            Slot(
                partition=member.partition,
                rank=info.rank,
                size=info.size,
                local_rank=info.local_rank,
                local_size=info.local_size,
                cross_rank=info.cross_rank,
                cross_size=info.cross_size,
                host_index=host_index,
                host=member.host,
                host_id=member.host_id,
                address=member.address,
                interface=member.interface,
                devices=visible_devices(group, info.local_rank),
            )
        )
    return slots


class _Head:
    """The beginning of what a peer sends, as a file that ends with an error when it is too long."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = MAX_HEAD_BYTES
        self.read = file.read
        self.close = file.close

    def readline(self, size: int) -> bytes:
        line = self._file.readline(min(size, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("head")
        return line


class _PatientHandler(RendezvousHandler):  # type: ignore[misc]
    """Answers one request of Horovod's; strangers cannot use up memory or threads.

    It lets requests wait for the plan. Horovod's server empties its store when it gets the plan,
    so what an eager worker had put there before would be lost and the job would die half a minute
    later.
    """

    timeout = REQUEST_SECONDS
    rfile: Any

    def setup(self) -> None:
        super().setup()
        self.rfile = _Head(self.rfile)

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        self.server.expect_nothing(self.connection)
        if refusal := self._refusal():
            self.send_status_code(refusal)
            return False
        self.server.planned.wait(PLAN_SECONDS)
        self.server.note_request()
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
        self.server.expect_more(self.connection)
        value = self.rfile.read(size)
        self.server.expect_nothing(self.connection)
        if len(value) < size:
            return
        if not self.server.has_room_for(size + len(self.path) + _ENTRY_BYTES):
            self.send_status_code(http.HTTPStatus.INSUFFICIENT_STORAGE)
            return
        _, scope, key = self.path.split("/")
        self._put_value(scope, key, value)
        self.send_status_code(http.HTTPStatus.OK)


@dataclass
class _Peer:
    """What a connection waits for: since when for its request, or, with None, for our answer."""

    waiting_since: float | None
    dropped: bool = False


class _Server(RendezvousHTTPServer):  # type: ignore[misc]
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _PatientHandler, verbose=0)
        self.planned = threading.Event()
        self.stored_limit = MAX_STORED_BYTES
        self._stored_at_most = 0
        self._peers: dict[socket.socket, _Peer] = {}
        self._changed = threading.Condition()
        self._closing = False
        self.times_of_requests = (math.inf, -math.inf)

    def note_request(self) -> None:
        """Note the time of a request that is about to be answered."""
        now = time.time()
        self.times_of_requests = (min(self.times_of_requests[0], now), now)

    def server_bind(self) -> None:
        """Bind without asking DNS for the host's name, which nobody wants to know."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def has_room_for(self, size: int) -> bool:
        """Say whether so many bytes may be stored, and take the room if so."""
        with self.cache_lock:
            if self._stored_at_most + size > self.stored_limit:
                # What was overwritten or deleted since is still in that number.
                self._stored_at_most = sum(
                    len(value) + len(scope) + len(key) + _ENTRY_BYTES
                    for scope, values in self.cache.items()
                    for key, value in values.items()
                )
            if self._stored_at_most + size > self.stored_limit:
                return False
            self._stored_at_most += size
            return True

    def expect_more(self, connection: socket.socket) -> None:
        """Give the peer a new time to send what belongs to its request."""
        self._wait_since(connection, time.monotonic())

    def expect_nothing(self, connection: socket.socket) -> None:
        """Note that it is the peer's turn to wait: it is not dropped for others."""
        self._wait_since(connection, None)

    def _wait_since(self, connection: socket.socket, since: float | None) -> None:
        with self._changed:
            peer = self._peers[connection]
            if peer.dropped:  # but its bytes could still be read
                raise ConnectionAbortedError("the peer was too late")
            peer.waiting_since = since

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a new connection in a thread of its own, as soon as there is room for it."""
        with self._changed:
            while len(self._peers) >= MAX_CONNECTIONS and not self._closing:
                if not any(peer.dropped for peer in self._peers.values()):
                    self._drop_oldest()
                self._changed.wait(_POLL_SECONDS)
            if self._closing:
                self.shutdown_request(request)
                return
            self._peers[request] = _Peer(time.monotonic())
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Look after the connections, between two of them or after a while without any."""
        with self._changed:
            self._drop_late()

    def close_request(self, request: Any) -> None:
        """Close a connection and let the next one in."""
        with self._changed:  # so that no other one gets its number while it is being dropped
            super().close_request(request)
            self._peers.pop(request, None)
            self._changed.notify_all()

    def close_connections(self) -> None:
        """End every connection, answered or not, and take no more."""
        with self._changed:
            self._closing = True
            for connection, peer in self._peers.items():
                self._drop(connection, peer)
            self._changed.notify_all()

    def wait_for_connections(self, timeout: float) -> None:
        """Wait for `timeout` seconds at most until the connections' threads have closed them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._peers, timeout)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: a worker that died in the middle of a request is reported as such."""

    def _drop_oldest(self) -> None:
        for connection, peer in self._late(IDLE_SECONDS):
            poll = select.poll()
            poll.register(connection, select.POLLIN)
            if not poll.poll(0):  # otherwise it is our thread that has not read yet
                self._drop(connection, peer)
                return

    def _drop_late(self) -> None:
        for connection, peer in self._late(REQUEST_SECONDS):
            self._drop(connection, peer)

    def _late(self, seconds: float) -> list[tuple[socket.socket, _Peer]]:
        before = time.monotonic() - seconds
        return [
            (connection, peer)
            for connection, peer in self._peers.items()
            if peer.waiting_since is not None and peer.waiting_since < before
        ]

    def _drop(self, connection: socket.socket, peer: _Peer) -> None:
        """Wake the connection's thread, which closes it."""
        if not peer.dropped:
            peer.dropped = True
            with contextlib.suppress(OSError):  # the peer was faster
                connection.shutdown(socket.SHUT_RDWR)


class Rendezvous:
    """Horovod's rendezvous server, on a port chosen by the system.

    Parameters
    ----------
    host
        Address to bind.
    port
        Port to bind, 0 for any free one.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        self._server = _Server((host, port))
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": _POLL_SECONDS},
            name="horovodrunner-rendezvous",
            daemon=True,
        )
        self._thread.start()

    def set_plan(self, slots: Sequence[Slot]) -> None:
        """Tell the server who takes part, and answer the requests that waited for it.

        Parameters
        ----------
        slots
            All slots of the run.
        """
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
        self._server.stored_limit = max(MAX_STORED_BYTES, STORED_BYTES_PER_PAIR * len(plan) ** 2)
        self._server.init(plan)
        self._server.planned.set()

    def times_of_requests(self) -> tuple[float, float] | None:
        """Say when Horovod's workers met here.

        Returns
        -------
        tuple of float, or None
            Of the first and of the last request answered, in seconds since the epoch; None
            without any.
        """
        times = self._server.times_of_requests
        return times if times[0] <= times[1] else None

    def close(self) -> None:
        """Stop to serve and free the port."""
        self._server.planned.set()
        self._server.close_connections()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server.wait_for_connections(CLOSE_SECONDS)
