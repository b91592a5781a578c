"""Hosts made of network namespaces, joined by a bridge in one more namespace.

Each host has its own interfaces, addresses, routes, host name and /etc/hosts; files and processes
are this machine's. Nothing outside the namespaces is changed but directories in /etc/netns, and
everything is removed at the end, or by the next test session if this one was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import processes
from tests.waiting import wait_for_line

__all__ = ["Host", "Network", "Standalone", "network", "why_no_hosts"]

PREFIX = "horovodrunner"
SWITCH = "switch"
ETC = Path("/etc/netns")


def ip(*arguments: str) -> str:
    """Run iproute2's command; an error says which one failed and why."""
    done = processes.run(["ip", *arguments], capture_output=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_no_hosts() -> str:
    """Return why this machine does not let us make hosts, or nothing."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` command"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    try:
        with network() as trial:
            trial.add_host("trial", {"lan0": ["10.77.0.1/24"]}, {}).run("true")
    except (OSError, AssertionError) as error:
        return f"the system does not allow to make network namespaces: {error}"
    return ""


@dataclass(eq=False)
class Host:
    """One host: run things there.

    Parameters
    ----------
    name
        Its host name.
    namespace
        Its network namespace.
    interface, port
        Its end of the wire to the other hosts, and the switch's.
    addresses
        Where the others reach it.
    """

    name: str
    namespace: str
    interface: str = ""
    port: str = ""
    addresses: list[str] = field(default_factory=list)
    started: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def link(self) -> str:
        """Hardware address of the interface that is joined to the other hosts."""
        found = json.loads(self.ip("-json", "link", "show", self.interface))
        return str(found[0]["address"])

    def ip(self, *arguments: str) -> str:
        """Look at or change the host's interfaces, addresses and routes."""
        return ip("-n", self.namespace, *arguments)

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs another on the host, as seen from outside."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.namespace, *named, *arguments]

    def run(self, *arguments: str, **environment: str) -> str:
        """Run a command to its end; return its output."""
        done = processes.run(
            self.command(*arguments),
            capture_output=True,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def start(self, *arguments: str, log: Path, environment: Mapping[str, str]) -> None:
        """Start a process that runs until :meth:`stop`."""
        output = self.started.enter_context(log.open("wb"))
        both = {"stdout": output, "stderr": processes.STDOUT}
        command, environment = self.command(*arguments), {**os.environ, **environment}
        self.started.enter_context(processes.started(command, env=environment, **both))

    def stop(self) -> None:
        """End every process on the host."""
        self.started.close()


class Network:
    """Hosts on one wire.

    Parameters
    ----------
    label
        Makes the namespaces' names unique; begins with this process's number.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._switch = self._namespace(SWITCH)
        self.hosts: dict[str, Host] = {}

    def add_host(
        self, name: str, interfaces: Mapping[str, Sequence[str]], names: Mapping[str, str]
    ) -> Host:
        """Make a host.

        Parameters
        ----------
        name
            Its host name.
        interfaces
            Addresses with their prefix length, by interface, which comes up in this order.
            Those whose names begin with ``admin`` are joined to nothing.
        names
            What its /etc/hosts says: address by host name.
        """
        host = Host(name, self._namespace(name))
        etc = ETC / host.namespace
        etc.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {who}" for who, address in names.items())]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        (etc / "resolv.conf").write_text("")  # no name server: nobody waits for one
        ip("netns", "add", host.namespace)
        self.hosts[name] = host
        host.ip("link", "set", "lo", "up")
        for interface, addresses in interfaces.items():
            self._plug_in(host, interface)
            for address in addresses:
                nodad = ["nodad"] if ":" in address else []
                host.ip("addr", "add", address, "dev", interface, *nodad)
                if interface == host.interface:
                    host.addresses.append(address.partition("/")[0])
        return host

    @contextlib.contextmanager
    def cut(self, one: Host, other: Host) -> Iterator[None]:
        """Let no packet pass between two hosts, as a firewall that drops them; all else works."""
        for host, peer in ((one, other), (other, one)):
            for address in peer.addresses:
                # Without this the peer's answer to "who has that address" would be missed soon.
                host.ip("neigh", "replace", address, "lladdr", peer.link, "dev", host.interface)
            self._isolate(host, "on")
        try:
            yield
        finally:
            for host, peer in ((one, other), (other, one)):
                self._isolate(host, "off")
                for address in peer.addresses:
                    host.ip("neigh", "del", address, "dev", host.interface)

    def _isolate(self, host: Host, state: str) -> None:
        slave = ("type", "bridge_slave", "isolated", state)
        ip("-n", self._switch, "link", "set", host.port, *slave)

    def _plug_in(self, host: Host, interface: str) -> None:
        end = f"{interface}-{len(self.hosts)}"
        if interface.startswith("admin"):
            host.ip("link", "add", interface, "type", "veth", "peer", "name", end)
            host.ip("link", "set", end, "up")
        else:
            peer = ("type", "veth", "peer", "name", end, "netns", self._switch)
            host.ip("link", "add", interface, *peer)
            ip("-n", self._switch, "link", "set", end, "master", "bridge", "up")
            host.interface, host.port = interface, end
        host.ip("link", "set", interface, "up")

    def open(self) -> None:
        """Make the bridge that the hosts are joined to."""
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._switch, "link", "set", "bridge", "up")

    def close(self) -> None:
        """End every process on the hosts, and remove them."""
        for host in self.hosts.values():
            host.stop()
        remove_namespaces(f"{PREFIX}-{self._label}-")

    def _namespace(self, name: str) -> str:
        return f"{PREFIX}-{self._label}-{name}"


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Make a network without hosts; remove it and its hosts at the end."""
    remove_what_killed_sessions_left()
    made = Network(f"{os.getpid()}-{time.monotonic_ns() % 1_000_000}")
    try:
        made.open()
        yield made
    finally:
        made.close()


def remove_namespaces(prefix: str) -> None:
    """Remove the namespaces whose names begin so, and their files."""
    for line in ip("netns", "list").splitlines():
        if (name := line.split()[0]).startswith(prefix):
            ip("netns", "del", name)
    for directory in ETC.glob(f"{prefix}*"):
        shutil.rmtree(directory)
    with contextlib.suppress(OSError):  # others have something there, or there is none
        ETC.rmdir()


def remove_what_killed_sessions_left() -> None:
    """Remove the namespaces of test sessions that ended without doing so."""
    for line in ip("netns", "list").splitlines():
        match = re.match(rf"{PREFIX}-(\d+)-", line)
        if match and not psutil.pid_exists(int(match[1])):
            remove_namespaces(match[0])


class Standalone:
    """A Spark standalone cluster on some of the hosts.

    Parameters
    ----------
    directory
        Where logs and the executors' work directories go.
    environment
        Variables for all its processes.
    """

    def __init__(self, directory: Path, **environment: str) -> None:
        import pyspark

        self._spark_class = str(Path(pyspark.__file__).parent / "bin" / "spark-class")
        self._directory = directory
        self._environment = environment
        self.url = ""

    def start_master(self, host: Host, address: str) -> None:
        """Start the master at an address of a host."""
        log = self._start(host, "Master", "--host", address, "--port", "0")
        self.url = wait_for_line(r"spark://\S+:\d+", log)[0]

    def start_workers(self, advertised: Mapping[Host, str], cores: int) -> None:
        """Start a worker on each host, known under a name or address, and wait for all."""
        options = ["--cores", str(cores), "--memory", "2g"]
        logs = [
            self._start(host, "Worker", "--host", name, *options, self.url)
            for host, name in advertised.items()
        ]
        for log in logs:
            wait_for_line("Successfully registered with master", log)

    def executor_logs(self, host: str) -> list[str]:
        """Return what the executors on one host wrote."""
        return [path.read_text() for path in self._directory.glob(f"work-{host}/*/*/stderr")]

    def _start(self, host: Host, what: str, *arguments: str) -> Path:
        log = self._directory / f"{what}-{host.name}.log"
        work = {"SPARK_WORKER_DIR": str(self._directory / f"work-{host.name}")}
        name = f"org.apache.spark.deploy.{what.lower()}.{what}"
        command = [self._spark_class, name, "--webui-port", "0", *arguments]
        host.start(*command, log=log, environment={**self._environment, **work})
        return log
