"""Runs on several hosts: who is who, which network they use, and what cannot be reached."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.spark.hosts import Host, Network, Standalone, network, why_no_hosts

pytestmark = pytest.mark.spark

NOTEBOOK, ALPHA, BETA, GAMMA = "10.77.0.1", "10.77.0.2", "10.77.0.3", "10.77.0.4"
NAMES = {"notebook": NOTEBOOK, "alpha": ALPHA, "beta": BETA, "gamma": GAMMA}
INTERFACES = {"alpha": "lan0", "beta": "fabric7"}
ADDRESSES = {"alpha": ALPHA, "beta": BETA}

PROLOGUE = """
import faulthandler, json, os, socket, subprocess, sys, threading
from pathlib import Path

import psutil
from pyspark.sql import SparkSession

from horovodrunner import HorovodRunner, WorkerFailedError

directory = Path(__file__).parent
faulthandler.dump_traceback_later(120, file=(directory / "stacks").open("w"))

class Listening(threading.Thread):
    '''Collects where this process, and the task that started it, listen meanwhile.'''

    def __init__(self):
        super().__init__(daemon=True)
        self.found = set()
        self._ended = threading.Event()

    def look(self):
        for process in (psutil.Process(), psutil.Process().parent()):
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    self.found.add((one.laddr.ip, one.laddr.port))

    def run(self):
        while not self._ended.is_set():
            self.look()

    def __enter__(self):
        self.look()
        self.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        self.join()

def tell(section, **facts):
    '''Leave facts of one rank where the test finds them: the hosts share their files.'''
    facts["host"] = socket.gethostname()
    facts["environment"] = {
        name: value for name, value in os.environ.items()
        if name.startswith(("HOROVOD_", "NCCL_", "MASTER_")) or "RANK" in name or "SIZE" in name
    }
    (directory / f"{section}-{os.environ['RANK']}.json").write_text(json.dumps(facts))

def attempt(section, np, main, /, **keywords):
    '''Run something; leave what it gives, or its error.'''
    try:
        result = {"result": HorovodRunner(np=np).run(main, **keywords)}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    (directory / f"{section}.json").write_text(json.dumps(result))

def session(**settings):
    builder = SparkSession.builder.master(os.environ["MASTER_URL"])
    settings = {
        "spark.ui.enabled": "false",
        "spark.log.level": "ERROR",
        "spark.executor.memory": "512m",
        # An executor asks another one for a broadcast before it asks the driver.
        "spark.shuffle.io.connectionCreationTimeout": "1s",
        "spark.shuffle.io.retryWait": "100ms",
        **{name.replace("_", "."): value for name, value in settings.items()},
    }
    for name, value in settings.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()
"""


@dataclass
class Report:
    """What a driver's script left."""

    directory: Path

    def ended(self, section: str) -> dict[str, Any]:
        """Return the result or the error of one run."""
        return dict(json.loads((self.directory / f"{section}.json").read_text()))

    def ranks(self, section: str) -> list[dict[str, Any]]:
        """Return what the ranks of one run told, in their order."""
        files = self.directory.glob(f"{section}-*.json")
        by_rank = {int(path.stem.rpartition("-")[2]): path for path in files}
        return [json.loads(by_rank[rank].read_text()) for rank in sorted(by_rank)]


@dataclass
class Cluster:
    """A master and the driver on one host, workers on others."""

    network: Network
    spark: Standalone
    directory: Path
    driver_host: Host
    environment: dict[str, str] = field(default_factory=dict)

    def drive(self, name: str, script: str) -> Report:
        """Run a script as the driver, to its end."""
        directory = self.directory / name
        directory.mkdir()
        (directory / "driver.py").write_text(PROLOGUE + textwrap.dedent(script))
        self.driver_host.run(
            sys.executable,
            str(directory / "driver.py"),
            PYSPARK_PYTHON=sys.executable,
            MASTER_URL=self.spark.url,
            **self.environment,
        )
        return Report(directory)


@contextmanager
def made_network() -> Iterator[Network]:
    """Make a network, or skip the test that asks for it."""
    if reason := why_no_hosts():
        pytest.skip(f"several hosts cannot be made here: {reason}")
    with network() as joined:
        yield joined


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two hosts with two cores each, known by names, with more addresses than are good for them.

    Their own names give a loopback address, as Debian has it; ``admin0`` and the first address of
    beta's interface are joined to nothing, and both hosts have the same there.
    """
    directory = tmp_path_factory.mktemp("hosts")
    nowhere = "172.31.9.1/30"
    spark = Standalone(directory, PYSPARK_PYTHON=sys.executable)
    with made_network() as joined:
        notebook = joined.add_host("notebook", {"nic0": [f"{NOTEBOOK}/24"]}, NAMES)
        alpha = joined.add_host(
            "alpha",
            {"admin0": [nowhere], "lan0": [f"{ALPHA}/24", "10.77.0.12/24"]},
            {**NAMES, "alpha": "127.0.1.1"},
        )
        beta = joined.add_host(
            "beta",
            {"admin0": [nowhere], "fabric7": ["192.168.250.1/30", f"{BETA}/24"]},
            {**NAMES, "beta": "127.0.1.1"},
        )
        spark.start_master(notebook, "notebook")
        spark.start_workers({alpha: "alpha", beta: "beta"}, cores=2)
        yield Cluster(joined, spark, directory, notebook)


@pytest.fixture(scope="module")
def report(cluster: Cluster) -> Report:
    """What the ranks of four runs saw.

    One with nothing set, one with ports, one with Horovod, one with an interface that is named.
    """
    return cluster.drive(
        "placed",
        """
        spark = session(spark_driver_host="notebook", spark_driver_bindAddress="0.0.0.0")

        def main(section):
            with Listening() as listening:
                pass
            tell(section, listening=sorted(listening.found))

        def reduce():
            import horovod.torch as hvd
            import torch
            import torch.distributed as dist
            with Listening() as listening:
                hvd.init()
                total = hvd.allreduce(torch.tensor(float(2 ** hvd.rank())), op=hvd.Sum).item()
            dist.init_process_group("gloo")
            of_torch = torch.tensor(float(2 ** dist.get_rank()))
            dist.all_reduce(of_torch)
            dist.destroy_process_group()
            tell(
                "horovod",
                ranks=[hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(),
                       hvd.cross_rank(), hvd.cross_size()],
                total=total,
                total_of_torch=of_torch.item(),
                listening=sorted(listening.found),
            )

        attempt("plain", 4, main, section="plain")
        spark.conf.set("spark.horovodrunner.ports", "40000-40099")
        spark.conf.set("spark.horovodrunner.driver.port", "41000")
        with Listening() as listening:
            attempt("ports", 4, main, section="ports")
        (directory / "driver.json").write_text(json.dumps(sorted(listening.found)))
        attempt("horovod", 4, reduce)
        os.environ["HOROVOD_GLOO_IFACE"] = "lan0"
        attempt("named", 4, main, section="named")
        spark.stop()
        """,
    )


@pytest.fixture
def alpha() -> Iterator[Host]:
    """One host with three interfaces; the default route goes through the last one."""
    with made_network() as joined:
        host = joined.add_host(
            "alpha",
            {"admin0": ["172.31.9.1/30"], "lan0": [f"{ALPHA}/24", "fd77::2/64"], "net1": []},
            {"alpha": "127.0.1.1", "beta": BETA, "beta6": "fd77::3", "far": "10.99.0.1"},
        )
        host.ip("addr", "add", "10.78.0.2/24", "dev", "net1", "label", "net1:extra")
        host.ip("route", "add", "default", "via", "10.78.0.1")
        yield host


def test_the_address_is_the_one_from_which_routing_reaches_the_others(alpha: Host) -> None:
    lan, admin, far = [ALPHA, "lan0"], ["172.31.9.1", "admin0"], ["10.78.0.2", "net1:extra"]
    cases: list[tuple[list[Any], list[str]]] = [
        ([ALPHA, None], lan),
        (["172.31.9.1", "beta"], admin),  # Spark's own choice
        (["192.0.2.9", None, ["beta"]], lan),  # behind a NAT
        (["alpha", "far", ["alpha", "no-such-host.invalid", "beta"]], lan),
        (["alpha", "beta"], lan),
        (["alpha", "alpha"], far),  # the driver is here, and its name gives 127.0.1.1
        (["[fd77::2]", "[fd77::3]"], lan),
        (["alpha", None, ["beta6"]], lan),
        (["alpha", None, ["far"]], far),
        (["alpha", "beta", [], "admin0"], admin),  # the user's choice
        (["alpha", "beta", [], "net1"], far),
    ]
    assert found_addresses(alpha, [case for case, _ in cases]) == [address for _, address in cases]


def test_without_any_other_address_it_is_the_loopback_one(alpha: Host) -> None:
    for interface in ("admin0", "net1"):
        alpha.ip("link", "set", interface, "down")
    alpha.ip("-4", "addr", "flush", "dev", "lan0")
    assert found_addresses(alpha, [["fd77::2", "fd77::3"]]) == [["127.0.0.1", "lo"]]


def found_addresses(host: Host, cases: list[list[Any]]) -> list[list[str]]:
    script = """
        import json, sys
        from horovodrunner.processes.task.network import find_address
        print(json.dumps([find_address(*case) for case in json.loads(sys.argv[1])]))
    """
    output = host.run(sys.executable, "-c", textwrap.dedent(script), json.dumps(cases))
    return [list(found) for found in json.loads(output)]


def test_ranks_on_one_host_are_contiguous_and_counted_per_host(report: Report) -> None:
    assert report.ended("plain") == {"result": None}
    ranks = report.ranks("plain")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    assert [tuple(int(rank["environment"][name]) for name in names) for rank in ranks] == [
        (0, 4, 0, 2, 0),
        (1, 4, 1, 2, 0),
        (2, 4, 0, 2, 1),
        (3, 4, 1, 2, 1),
    ]
    first, second = ranks[0]["host"], ranks[2]["host"]
    assert [rank["host"] for rank in ranks] == [first, first, second, second]
    assert {first, second} == {"alpha", "beta"}


def test_every_host_uses_the_interface_and_the_address_that_the_others_reach(
    report: Report,
) -> None:
    ranks = report.ranks("plain")
    first = ADDRESSES[ranks[0]["host"]]
    for rank in ranks:
        environment = rank["environment"]
        assert environment["HOROVOD_GLOO_IFACE"] == INTERFACES[rank["host"]]
        assert environment["NCCL_SOCKET_IFNAME"] == INTERFACES[rank["host"]]
        assert environment["HOROVOD_GLOO_ADDRESS"] == ADDRESSES[rank["host"]]
        assert environment["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == first
        assert environment["MASTER_ADDR"] == first


def test_an_interface_that_one_host_lacks_is_refused_there(report: Report) -> None:
    assert report.ranks("named") == []
    error = report.ended("named")["error"]
    assert "beta has no network interface 'lan0'" in error
    assert "admin0, fabric7 (HOROVOD_GLOO_IFACE names it)" in error


@pytest.mark.horovod
def test_horovod_and_torch_reduce_over_two_hosts(report: Report) -> None:
    assert report.ended("horovod") == {"result": None}
    ranks = report.ranks("horovod")
    # rank, size, local rank, local size, cross rank, cross size
    assert [rank["ranks"] for rank in ranks] == [
        [0, 4, 0, 2, 0, 2],
        [1, 4, 1, 2, 0, 2],
        [2, 4, 0, 2, 1, 2],
        [3, 4, 1, 2, 1, 2],
    ]
    assert [rank["total"] for rank in ranks] == [15.0] * 4
    assert [rank["total_of_torch"] for rank in ranks] == [15.0] * 4
    groups = [(r["environment"]["GROUP_RANK"], r["environment"]["GROUP_WORLD_SIZE"]) for r in ranks]
    assert groups == [("0", "2"), ("0", "2"), ("1", "2"), ("1", "2")]
    assert len({rank["host"] for rank in ranks[:2]}) == len({rank["host"] for rank in ranks[2:]})


def test_everything_listens_inside_the_range(report: Report) -> None:
    assert report.ended("ports") == {"result": None}
    driver = json.loads((report.directory / "driver.json").read_text())
    assert [place for place in driver if place[0] != "127.0.0.1"] == [["0.0.0.0", 41000]]
    ranks = report.ranks("ports")
    listening = {(address, port) for rank in ranks for address, port in rank["listening"]}
    assert len(listening) == 2  # the peer server and the rendezvous, on rank 0's host
    assert {address for address, _ in listening} == {ADDRESSES[ranks[0]["host"]]}
    environment = ranks[3]["environment"]
    told = {int(environment[name]) for name in ("MASTER_PORT", "HOROVOD_GLOO_RENDEZVOUS_PORT")}
    assert all(40000 <= port <= 40099 for port in {*told, *(port for _, port in listening)})
    assert len(told | {port for _, port in listening}) == 3


@pytest.mark.horovod
def test_horovod_listens_inside_the_range(report: Report) -> None:
    ranks = report.ranks("horovod")
    listening = {(address, port) for rank in ranks for address, port in rank["listening"]}
    assert {address for address, _ in listening} == set(ADDRESSES.values())
    assert {port for _, port in listening} <= set(range(40000, 40100))
    assert len(listening) > 2


def test_hosts_that_cannot_reach_each_other_are_named(cluster: Cluster) -> None:
    hosts = cluster.network.hosts
    with cluster.network.cut(hosts["alpha"], hosts["beta"]):
        report = cluster.drive(
            "cut",
            """
            spark = session()
            attempt("cut", 4, print)
            spark.stop()
            """,
        )
    error = report.ended("cut")["error"]
    told = re.search(
        r"(\w+) \(([\d.]+)\) did not reach rank 0's task on (\w+) \(([\d.]+):\d+\) within", error
    )
    assert told, error
    one, its_address, other, other_address = told.groups()
    assert {one: its_address, other: other_address} == ADDRESSES
    assert "spark.horovodrunner.ports" in error
    (log,) = [
        text
        for text in cluster.spark.executor_logs(one)
        if f"{one} ({its_address}) cannot reach rank 0's task on {other} ({other_address}:" in text
    ]
    assert "no answer from" in log


@pytest.mark.slow  # where two cores are busy with other tests, both directions are slow at times
@pytest.mark.horovod
def test_a_preflight_names_the_slow_link_and_refuses_the_run_or_warns(cluster: Cluster) -> None:
    report = cluster.drive(
        "preflight",
        f"""
        spark = session()
        alpha = "{cluster.network.hosts["alpha"].namespace}"
        tc = ["tc", "-n", alpha, "qdisc"]
        limit = ["dev", "lan0", "root", "tbf", "rate", "10mbit", "burst", "64kb", "latency", "1s"]

        def main():
            import horovod.torch as hvd
            import torch
            hvd.init()
            return float(hvd.allreduce(torch.tensor(1.0), op=hvd.Sum))

        def tried(section, preflight, main=main):
            runner = HorovodRunner(np=4, preflight=preflight, run_dir=directory / section)
            try:
                result = {{"result": runner.run(main)}}
            except Exception as error:
                result = {{"error": f"{{type(error).__name__}}: {{error}}"}}
            result["took"] = [p.seconds for p in runner.phases if p.name == "preflight"]
            result["record"] = Path(runner.record, "output/run.log").read_text()
            (directory / f"{{section}}.json").write_text(json.dumps(result))

        for _ in range(3):  # hosts that share two cores with other tests are slow at times
            tried("well", True)
            if "result" in json.loads((directory / "well.json").read_text()):
                break
        subprocess.run([*tc, "add", *limit], check=True)
        tried("slow", True)
        tried("warned", "warn", os.getpid)  # without an allreduce, which would take long
        subprocess.run([*tc, "del", "dev", "lan0", "root"], check=True)
        spark.stop()
        """,
    )
    well, slow, warned = (report.ended(section) for section in ("well", "slow", "warned"))
    assert well.get("result") == 4.0, well
    assert warned["result"]
    assert "preflight: all is well" in well["record"]
    assert "2 links between 2 hosts" in well["record"]
    assert "allreduce of 4 ranks by Horovod" in well["record"]
    told = rf"the link from alpha \({ALPHA}\) to beta \({BETA}\) carries [\d.]+ [KM]iB/s"
    assert re.search(rf"^ConfigurationError: preflight: {told}.*usual in this run", slow["error"])
    assert 'preflight="warn"' in slow["error"].splitlines()[0]
    assert re.search(f"preflight: {told}", warned["record"])


@pytest.mark.slow
@pytest.mark.horovod
def test_ranks_that_reach_rank_0_but_not_each_other_say_so(cluster: Cluster) -> None:
    gamma = cluster.network.add_host("gamma", {"net1": [f"{GAMMA}/24"]}, NAMES)
    cluster.spark.start_workers({gamma: "gamma"}, cores=1)
    report = cluster.drive(
        "triangle",
        f"""
        spark = session(spark_executor_cores="1", spark_cores_max="3")
        workers = {[ALPHA, BETA, GAMMA]}

        def main():
            first, own = (
                os.environ[f"HOROVOD_GLOO_{{what}}"] for what in ("RENDEZVOUS_ADDR", "ADDRESS")
            )
            if os.environ["RANK"] != "0":
                for address in set(workers) - {{first, own}}:
                    subprocess.run(["ip", "route", "add", "unreachable", address], check=True)
            tell("triangle")
            import horovod.torch as hvd
            hvd.init()

        attempt("triangle", 3, main)
        spark.stop()
        """,
    )
    for name in ("alpha", "beta", "gamma"):
        cluster.network.hosts[name].ip("route", "flush", "type", "unreachable")
    gamma.stop()
    ranks = report.ranks("triangle")
    assert len({rank["host"] for rank in ranks}) == 3
    error = report.ended("triangle")["error"]
    told = re.search(r"connect from \[([\d.]+)\]:\d+ to \[([\d.]+)\]:\d+: No route to host", error)
    assert told, error
    assert set(told.groups()) == {rank["environment"]["HOROVOD_GLOO_ADDRESS"] for rank in ranks[1:]}


@pytest.fixture
def version_6(tmp_path: Path) -> Iterator[Cluster]:
    """Three hosts that have IPv6 only."""
    prefer = {
        "SPARK_PREFER_IPV6": "true",
        "JDK_JAVA_OPTIONS": f"{os.environ['JDK_JAVA_OPTIONS']} -Djava.net.preferIPv6Addresses=true",
    }
    spark = Standalone(tmp_path, PYSPARK_PYTHON=sys.executable, **prefer)
    with made_network() as joined:
        notebook, six, seven = (
            joined.add_host(
                name,
                {"lan0": [f"fd77::{number}/64"]},
                {name: f"fd77::{number}", "localhost": "::1"},  # Spark 3.5's barrier looks it up
            )
            for number, name in enumerate(("notebook", "six", "seven"), start=1)
        )
        spark.start_master(notebook, "[fd77::1]")
        spark.start_workers({six: "[fd77::2]", seven: "[fd77::3]"}, cores=1)
        yield Cluster(joined, spark, tmp_path, notebook, prefer)


@pytest.mark.slow
@pytest.mark.horovod
def test_hosts_without_ipv4_are_refused_and_with_it_beside_ipv6_they_run(
    version_6: Cluster,
) -> None:
    hosts = version_6.network.hosts
    report = version_6.drive(
        "six",
        f"""
        spark = session(spark_driver_host="[fd77::1]", spark_driver_bindAddress="fd77::1")

        def main():
            import horovod.torch as hvd
            import torch
            hvd.init()
            total = hvd.allreduce(torch.tensor(float(2 ** hvd.rank())), op=hvd.Sum).item()
            tell("both", total=total)

        attempt("alone", 2, tell, section="alone")
        for number, host in ((2, "{hosts["six"].namespace}"), (3, "{hosts["seven"].namespace}")):
            address = f"10.77.0.{{number}}/24"
            subprocess.run(["ip", "-n", host, "addr", "add", address, "dev", "lan0"], check=True)
        attempt("both", 2, main)
        spark.stop()
        """,
    )
    assert report.ranks("alone") == []
    error = report.ended("alone")["error"]
    assert re.search(r"(six|seven) has no IPv4 address but 127\.0\.0\.1", error), error
    assert report.ended("both") == {"result": None}
    assert [rank["total"] for rank in report.ranks("both")] == [3.0, 3.0]
    assert {rank["host"] for rank in report.ranks("both")} == {"six", "seven"}
