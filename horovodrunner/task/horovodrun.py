"""What `horovodrun` does, with Horovod's own launcher code. Runs in: the task.

The only file that imports ``horovod.runner``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from horovod.runner.common.util.hosts import HostInfo, SlotInfo, get_host_assignments
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from horovodrunner.core.topology import Member, Slot, group_by_host, visible_devices

__all__ = ["Rendezvous", "assign_slots"]

PLAN_SECONDS = 60.0
"""How long a worker's request waits for the plan; it is made right after the gather step."""


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
    hosts = [HostInfo(group.host_id, len(group.members)) for group in groups]
    plan = get_host_assignments(hosts, sum(host.slots for host in hosts))
    slots = []
    for info in plan:
        host_index = next(i for i, group in enumerate(groups) if group.host_id == info.hostname)
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
                devices=visible_devices(group),
            )
        )
    return slots


class _PatientHandler(RendezvousHandler):  # type: ignore[misc]
    """Lets requests wait for the plan.

    Horovod's server empties its store when it gets the plan, so what an eager worker had put
    there before would be lost and the job would die half a minute later.
    """

    def parse_request(self) -> bool:
        self.server.planned.wait(PLAN_SECONDS)
        return bool(super().parse_request())


class _Server(RendezvousHTTPServer):  # type: ignore[misc]
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _PatientHandler, verbose=0)
        self.planned = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: a worker that died in the middle of a request is reported as such."""


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
            kwargs={"poll_interval": 0.05},
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
        self._server.init(plan)
        self._server.planned.set()

    def close(self) -> None:
        """Stop to serve and free the port."""
        self._server.planned.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
