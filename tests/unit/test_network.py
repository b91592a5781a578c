"""Addresses and host identity."""

import contextlib
import socket

import psutil
import pytest

from horovodrunner.processes.task.network import (
    find_address,
    host_id,
    loopback_address,
    on_free_port,
)


def test_the_address_belongs_to_the_interface() -> None:
    for advertised in ("localhost", "no-such-host.invalid", "127.0.0.1"):
        address, interface = find_address(advertised, None)
        assert address in [entry.address for entry in psutil.net_if_addrs()[interface]]


def test_an_advertised_address_of_this_machine_is_taken() -> None:
    address, interface = find_address("no-such-host.invalid", None)
    assert find_address(address, "127.0.0.1") == (address, interface)


def test_an_interface_that_the_user_names_must_be_here() -> None:
    address, interface = find_address("no-such-host.invalid", None)
    assert find_address("127.0.0.1", None, interface=interface)[1] == interface
    loopback = loopback_address()
    assert find_address(address, None, interface=loopback[1]) == loopback
    with pytest.raises(ValueError, match=rf"no network interface 'ib7' .* do: .*{interface}"):
        find_address(address, None, interface="ib7")


def test_loopback() -> None:
    address, interface = loopback_address()
    assert address == "127.0.0.1"
    assert interface in psutil.net_if_addrs()


def test_the_host_id_is_stable_and_fit_for_a_url() -> None:
    assert host_id() == host_id()
    assert "/" not in host_id()


def test_a_port_of_the_range_is_taken_and_a_full_range_is_told() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        first = probe.getsockname()[1]
    ports = (first, first + 1)
    with contextlib.ExitStack() as taken:
        numbers = set()
        for _ in range(2):
            server = on_free_port(ports, lambda port: socket.create_server(("127.0.0.1", port)))
            taken.enter_context(server)
            numbers.add(server.getsockname()[1])
        assert numbers == set(ports)
        with pytest.raises(OSError, match=rf"no port from {first} to {first + 1} is free"):
            on_free_port(ports, lambda port: socket.create_server(("127.0.0.1", port)))


def test_without_a_range_the_system_chooses() -> None:
    assert on_free_port(None, lambda port: port) == 0
