"""Which machine this is and at which address its peers reach it. Runs in: the task."""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

__all__ = [
    "LOOPBACK",
    "REACH_EACH_OTHER",
    "HostAddress",
    "find_address",
    "host_id",
    "loopback_address",
    "on_free_port",
    "without_brackets",
]

_Bound = TypeVar("_Bound")

HostAddress = tuple[str, str]
"""An IPv4 address of this machine and the name of the network interface that has it."""

LOOPBACK = "127.0.0.1"

REACH_EACH_OTHER = (
    "executors must reach each other's ports: look for firewalls between the hosts "
    "(spark.horovodrunner.ports limits the ports to a range) and for a wrong interface "
    "(HOROVOD_GLOO_IFACE names the right one)"
)
"""What to do about an address that cannot be reached."""

PEERS_ASKED = 3
"""So many of the other executors' names are looked up; a name server may be slow to say no."""

_ANYWHERE = "198.51.100.1"
"""An address of documentation's own (RFC 5737): the way there is the default route."""


def host_id() -> str:
    """Identify the machine and network namespace this process runs in.

    Two executors on one machine share it; two containers with the same host name do not.
    """
    marks = [socket.gethostname()]
    with suppress(OSError):
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        marks.append(str(Path("/proc/self/ns/net").stat().st_ino))
    digest = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:8]
    return f"{marks[0]}-{digest}"


def loopback_address() -> HostAddress:
    """Return the loopback address and its interface, for runs within one machine."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == LOOPBACK for entry in entries):
            return LOOPBACK, name
    return LOOPBACK, "lo"


def find_address(
    advertised: str,
    driver: str | None,
    peers: Sequence[str] = (),
    interface: str | None = None,
) -> HostAddress:
    """Find the address at which other machines reach this one.

    Horovod speaks IPv4 only. Where Spark speaks IPv6, the IPv4 address beside it is taken.
    """
    usable = _usable_addresses(interface)
    for candidate in _candidates(advertised, driver, peers):
        if candidate in usable:
            return usable[candidate]
    if interface and not usable:
        names = sorted({name for _, name in _usable_addresses().values()}) or ["none"]
        raise ValueError(
            f"{socket.gethostname()} has no network interface {interface!r} that is up and has an "
            f"IPv4 address; those that do: {', '.join(names)}"
        )
    return next(iter(usable.values()), loopback_address())


def _candidates(advertised: str, driver: str | None, peers: Sequence[str]) -> Iterator[str]:
    """Yield what may be the address, IPv4 or IPv6, most telling first."""
    own = without_brackets(advertised)
    if _is_address(own):
        yield own
    others = [name for name in dict.fromkeys(map(without_brackets, peers)) if name not in ("", own)]
    for peer in others[:PEERS_ASKED]:
        yield from _route_sources(peer)
    if driver:
        yield from _route_sources(without_brackets(driver))
    yield from _resolve(own)
    yield from _route_sources(_ANYWHERE)


def _usable_addresses(interface: str | None = None) -> dict[str, HostAddress]:
    """Map the addresses of the interfaces that are up to the IPv4 address to use for each."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    usable: dict[str, HostAddress] = {}
    for name, entries in psutil.net_if_addrs().items():
        device = name.partition(":")[0]  # "eth0:1" is another label of eth0
        if device not in up or interface not in (None, name, device):
            continue
        of_version_4 = [
            entry.address
            for entry in entries
            if entry.family == socket.AF_INET
            and (interface or not ipaddress.ip_address(entry.address).is_loopback)
        ]
        usable.update((address, (address, name)) for address in of_version_4)
        if of_version_4:
            beside = (of_version_4[0], name)
            usable.update(
                (entry.address.partition("%")[0], beside)
                for entry in entries
                if entry.family == socket.AF_INET6
            )
    return usable


def without_brackets(host: str) -> str:
    """Take off the brackets that Spark puts around IPv6 addresses."""
    return host.removeprefix("[").removesuffix("]")


def _is_address(text: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(text))
    return False


def _resolve(name: str) -> list[str]:
    with suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(name or None, 9, type=socket.SOCK_DGRAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))
    return []


def _route_sources(host: str) -> Iterator[str]:
    """Yield the addresses from which this machine would send to another one."""
    for address in _resolve(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # UDP: looks up the route, sends nothing
            yield str(probe.getsockname()[0])


def on_free_port(ports: tuple[int, int] | None, bind: Callable[[int], _Bound]) -> _Bound:
    """Bind something to a port of the range that the user allows."""
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
        "spark.horovodrunner.ports; a run takes three on rank 0's machine, and with "
        "tf_config=True one more for each rank, with preflight one for each task and two there"
    )
