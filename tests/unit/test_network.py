"""Addresses and host identity."""

import psutil

from horovodrunner.task.network import find_address, host_id, loopback_address


def test_the_address_belongs_to_the_interface() -> None:
    for advertised in ("localhost", "no-such-host.invalid", "127.0.0.1"):
        address, interface = find_address(advertised, None)
        assert address in [entry.address for entry in psutil.net_if_addrs()[interface]]


def test_an_advertised_address_of_this_machine_is_taken() -> None:
    address, interface = find_address("no-such-host.invalid", None)
    assert find_address(address, "127.0.0.1") == (address, interface)


def test_loopback() -> None:
    address, interface = loopback_address()
    assert address == "127.0.0.1"
    assert interface in psutil.net_if_addrs()


def test_the_host_id_is_stable_and_fit_for_a_url() -> None:
    assert host_id() == host_id()
    assert "/" not in host_id()
