"""Which machine this is and at which address its peers reach it. Runs in: the task."""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

__all__ = [
    "LOOPBACK",
    "HostAddress",
    "find_address",
    "host_id",
    "loopback_address",
    "on_free_port",
]

_Bound = TypeVar("_Bound")

HostAddress = tuple[str, str]
"""An IPv4 address of this machine and the name of the network interface that has it."""

LOOPBACK = "127.0.0.1"


def host_id() -> str:
    """Identify the machine and network namespace this process runs in.

    Two executors on one machine share it; two containers with the same host name do not.

    Returns
    -------
    str
        The host name and a short hash.
    """
    marks = [socket.gethostname()]
    with suppress(OSError):
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        marks.append(str(Path("/proc/self/ns/net").stat().st_ino))
    digest = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:8]
    return f"{marks[0]}-{digest}"


def loopback_address() -> HostAddress:
    """Give the loopback address and its interface, for runs within one machine.

    Returns
    -------
    tuple of str and str
        ``("127.0.0.1", "lo")`` on Linux.
    """
    return LOOPBACK, _interfaces().get(LOOPBACK, "lo")


def find_address(advertised: str, peer: str | None) -> HostAddress:
    """Find the address at which other machines reach this one.

    Parameters
    ----------
    advertised
        The name or address that Spark advertises for this executor; used when one of this
        machine's interfaces has it.
    peer
        Host that is known to be reachable (the driver); else the address that routing would
        use towards it is taken. Nothing is sent.

    Returns
    -------
    tuple of str and str
        An IPv4 address and its interface; the loopback address when there is no other.
    """
    interfaces = _interfaces()
    candidates = [_resolve(advertised), _route_source(peer) if peer else None]
    for candidate in candidates:
        if candidate in interfaces and not ipaddress.ip_address(candidate).is_loopback:
            return candidate, interfaces[candidate]
    for address, interface in interfaces.items():
        if not ipaddress.ip_address(address).is_loopback:
            return address, interface
    return loopback_address()


def _interfaces() -> dict[str, str]:
    """Map this machine's IPv4 addresses to the interfaces that are up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        if name in up
        for entry in entries
        if entry.family == socket.AF_INET
    }


def _resolve(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _route_source(peer: str) -> str | None:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # UDP: looks up the route, sends nothing
        return str(probe.getsockname()[0])
    return None


def on_free_port(ports: tuple[int, int] | None, bind: Callable[[int], _Bound]) -> _Bound:
    """Bind something to a port of the range that the user allows.

    Parameters
    ----------
    ports
        First and last port, or None for any.
    bind
        Binds to the port it is given (0: the system chooses one) or raises OSError.

    Returns
    -------
    object
        What `bind` gave.

    Raises
    ------
    OSError
        If no port of the range is free, or binding fails for another reason.
    """
    if ports is None:
        return bind(0)
    first, last = ports
    count = last - first + 1
    start = random.randrange(count)  # noqa: S311 - spreads runs over the range, hides nothing
    for offset in range(count):
        try:
            return bind(first + (start + offset) % count)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(
        f"no port from {first} to {last} is free on {socket.gethostname()}: widen the range of "
        "spark.horovodrunner.ports; a run takes three on rank 0's machine"
    )
