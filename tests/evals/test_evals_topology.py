"""Shaped networks: names and commands (pure), and one real network where this machine allows it."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from itertools import chain

import pytest

from dualpath_sgl.launch.topology.network import Network, NetworkError, clean, obstacles
from dualpath_sgl.launch.topology.plan import (
    Rates,
    build_commands,
    enter,
    make_plan,
    prefix,
    remove_commands,
    shape_commands,
)

ENGINES = ["prefill-0", "decode-0", "decode-1"]
LINUX_NAME_BYTES = 15


def plan(slot: int = 7, engines=ENGINES, storage: int | None = 400_000_000):
    return make_plan(slot, engines, Rates(storage_bits_per_s=storage, compute_bits_per_s=3_200_000_000))


def words(commands) -> set[str]:
    return set(chain.from_iterable(commands))


def test_every_engine_has_a_storage_and_a_compute_link_and_the_store_only_a_storage_link():
    kinds = {
        member: [link.kind for link in plan().links if link.member == member] for member in plan().members
    }
    assert kinds == {"store": ["storage"], **{engine: ["storage", "compute"] for engine in ENGINES}}


def test_the_rates_belong_to_the_engines_links_and_the_store_is_unshaped():
    assert plan().link("decode-1", "storage").bits_per_s == 400_000_000
    assert plan().link("decode-1", "compute").bits_per_s == 3_200_000_000
    assert plan().link("store", "storage").bits_per_s is None


def test_addresses_are_unique_and_lie_in_the_networks_of_the_slot():
    addresses = [link.address for link in plan().links]
    addresses += [plan().host_address("storage"), plan().host_address("compute")]
    assert len(set(addresses)) == len(addresses)
    assert {address.rsplit(".", 1)[0] for address in addresses} == {"10.77.7", "10.78.7"}


def test_interface_names_fit_linux_even_in_the_last_slot_with_a_hundred_engines():
    full = make_plan(255, [f"prefill-{number}" for number in range(100)], Rates(1, 1))
    names = [name for link in full.links for name in (link.nic, link.host_nic, link.bridge)]
    assert max(map(len, names)) <= LINUX_NAME_BYTES
    assert len({link.host_nic for link in full.links}) == len(full.links)


def test_no_slots_names_begin_with_another_slots_prefix():
    names = {link.host_nic for link in plan(77).links} | set(plan(77).namespaces)
    assert not any(name.startswith(prefix(7)) for name in names)


def test_a_slot_outside_the_range_and_too_many_engines_are_refused():
    with pytest.raises(ValueError, match="slot is 256"):
        plan(256)
    with pytest.raises(ValueError, match="300 engines"):
        plan(engines=[str(number) for number in range(300)])


def test_every_namespace_gets_its_loopback_and_both_ends_of_every_link_come_up():
    commands = build_commands(plan())
    for namespace in plan().namespaces:
        assert ["ip", "-n", namespace, "link", "set", "lo", "up"] in commands
    for link in plan().links:
        assert ["ip", "link", "set", link.host_nic, "master", link.bridge, "up"] in commands
        assert ["ip", "-n", link.namespace, "link", "set", link.nic, "up"] in commands


def test_a_link_is_shaped_in_both_directions():
    link = plan().link("prefill-0", "storage")
    towards, away = shape_commands(link, 400_000_000)
    assert towards[:2] == ["tc", "qdisc"] and link.host_nic in towards
    assert away[:3] == ["tc", "-n", link.namespace] and link.nic in away
    assert all("400000000bit" in command and "tbf" in command for command in (towards, away))


def test_taking_the_limit_away_leaves_no_token_bucket():
    assert "tbf" not in words(shape_commands(plan().link("prefill-0", "storage"), None))


def test_removing_names_exactly_what_was_found():
    commands = remove_commands(["dp007-store"], ["dp007-storage"])
    assert commands == [["ip", "link", "delete", "dp007-storage"], ["ip", "netns", "delete", "dp007-store"]]


def test_a_namespace_is_entered_without_a_new_sys():
    assert enter("dp007-store", ["a", "b"]) == ["nsenter", "--net=/run/netns/dp007-store", "--", "a", "b"]


def test_without_root_the_refusal_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkError, match="need root"):
        Network.build(ENGINES, Rates(1, 1))


def test_a_missing_program_is_named_with_its_package(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "program tc is missing: apt-get install iproute2" in obstacles()


# -- real ------------------------------------------------------------------------------------------

needs_namespaces = pytest.mark.skipif(bool(obstacles()), reason="; ".join(obstacles()) or "-")
FAST, SLOW = 800_000_000, 80_000_000
TRANSFER_BYTES = 2_000_000
SEND = f"""
    import socket, sys
    with socket.create_server((sys.argv[1], 5001)) as server:
        print("up", flush=True)
        connection, _ = server.accept()
        with connection:
            connection.sendall(bytes({TRANSFER_BYTES}))
"""
RECEIVE = """
    import socket, sys
    with socket.create_connection((sys.argv[1], 5001)) as connection:
        total = 0
        while data := connection.recv(1 << 16):
            total += len(data)
    print(total)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *arguments]


def transfer(network: Network) -> int:
    """Bytes that decode-0 got from prefill-0 over the compute network."""
    address = network.plan.link("prefill-0", "compute").address
    with subprocess.Popen(
        network.enter("prefill-0", python(SEND, address)), stdout=subprocess.PIPE, text=True
    ) as sender:
        assert sender.stdout.readline() == "up\n"
        command = network.enter("decode-0", python(RECEIVE, address))
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def leftovers(plan) -> list[str]:
    names = subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=True).stdout
    spaces = subprocess.run(["ip", "-j", "netns"], capture_output=True, text=True, check=True).stdout
    found = [link["ifname"] for link in json.loads(names)]
    found += [space["name"] for space in json.loads(spaces or "[]")]
    return [name for name in found if name.startswith(plan.prefix)]


@needs_namespaces
def test_a_shaped_link_carries_and_counts_bytes_and_holds_the_rate_of_its_bucket():
    with Network.build(["prefill-0", "decode-0"], Rates(FAST, SLOW)) as network:
        before = network.link_bytes("decode-0", "compute")
        assert transfer(network) == TRANSFER_BYTES
        received = network.link_bytes("decode-0", "compute").received - before.received
        assert TRANSFER_BYTES <= received < 1.1 * TRANSFER_BYTES
        assert network.link_bytes("decode-0", "storage").received < TRANSFER_BYTES / 10
        shown = subprocess.run(
            ["tc", "-j", "qdisc", "show", "dev", network.plan.link("decode-0", "compute").host_nic],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        bucket = json.loads(shown)[0]
        assert (bucket["kind"], bucket["options"]["rate"]) == ("tbf", SLOW // 8)
        network.shape("decode-0", "compute", None)
        assert transfer(network) == TRANSFER_BYTES
    assert leftovers(network.plan) == []


@needs_namespaces
def test_the_host_reaches_every_member_over_the_storage_network_and_stops_doing_so_after_removal():
    network = Network.build(["prefill-0", "decode-0"], Rates(None, None))
    try:
        address = network.plan.link("store", "storage").address
        with subprocess.Popen(
            network.enter("store", python(SEND, address)), stdout=subprocess.PIPE, text=True
        ) as sender:
            assert sender.stdout.readline() == "up\n"
            with socket.create_connection((address, 5001), timeout=10) as connection:
                assert connection.recv(1)
    finally:
        network.remove()
        network.remove()
    assert leftovers(network.plan) == []


@needs_namespaces
def test_what_a_killed_owner_left_is_removed_and_a_living_owners_network_stays():
    code = """
        import sys, time
        from dualpath_sgl.launch.topology.network import Network
        from dualpath_sgl.launch.topology.plan import Rates
        network = Network.build(["prefill-0", "decode-0"], Rates(None, None))
        print(network.plan.slot, flush=True)
        time.sleep(600)
    """
    with (
        Network.build(["prefill-0", "decode-0"], Rates(None, None)) as living,
        subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True) as owner,
    ):
        dead = make_plan(int(owner.stdout.readline()), ENGINES, Rates(None, None))
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert leftovers(dead)
        removed: list[str] = []
        clean(removed.append)
        assert dead.prefix.rstrip("-") in removed
        assert leftovers(dead) == []
        assert leftovers(living.plan)
