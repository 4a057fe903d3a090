"""What a shaped network consists of, and the iproute2 commands that make, change and remove it.

Names: everything of one network begins with `dpNNN-`, where NNN is its slot (0 to 255), and the
slot also gives its two subnets, 10.77.NNN.0/24 (storage) and 10.78.NNN.0/24 (compute).  Linux
allows 15 characters for an interface, so engines are numbered there.

A link is shaped in both directions by a token bucket at either end: the bridge side's egress is
what the engine receives (a storage read), the engine side's egress what it sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Command = list[str]
Kind = Literal["storage", "compute"]

SLOTS = 256
HOST_NUMBER = 254
"""Last byte of the host's address on both networks."""
STORE = "store"
"""Name of the store's namespace, which only has a storage link."""
STORAGE_NIC = "s0"
COMPUTE_NIC = "c0"
MTU_BYTES = 9000
"""Jumbo frames, as storage networks have: headers then take 0.7 % of the rate instead of 4.5 %."""
BURST_S = 0.004
"""A token bucket holds what the rate brings in this time, and at least one offloaded packet."""
LEAST_BURST_BYTES = 128 * 1024
QUEUE_S = 0.1
"""Packets that would wait longer in a shaped link's queue are dropped."""
CONGESTION_CONTROL = "reno"
"""In every Linux kernel, and steady behind a bucket whose queue is longer than the path.  A machine's
default may be BBR, which drains its window every ten seconds to measure the delay."""

_FIRST_BYTES = {"storage": "10.77", "compute": "10.78"}
_NICS: dict[Kind, str] = {"storage": STORAGE_NIC, "compute": COMPUTE_NIC}


@dataclass(frozen=True)
class Rates:
    """Bits per second of a link in each direction; None is unshaped."""

    storage_bits_per_s: int | None
    """Rate of every engine's storage link."""
    compute_bits_per_s: int | None
    """Rate of every engine's compute link."""
    store_bits_per_s: int | None = None
    """Rate of the store node's link."""


@dataclass(frozen=True)
class Link:
    """One veth pair: `nic` at `address` in `namespace`, `host_nic` on `bridge`."""

    member: str
    """Engine, or `store`."""
    kind: Kind
    namespace: str
    nic: str
    host_nic: str
    bridge: str
    address: str
    bits_per_s: int | None


@dataclass(frozen=True)
class Plan:
    """A whole network."""

    slot: int
    links: tuple[Link, ...]

    @property
    def prefix(self) -> str:
        return prefix(self.slot)

    @property
    def namespaces(self) -> list[str]:
        return list(dict.fromkeys(link.namespace for link in self.links))

    def link(self, member: str, kind: Kind) -> Link:
        """Raises KeyError for a link that does not exist."""
        for link in self.links:
            if (link.member, link.kind) == (member, kind):
                return link
        raise KeyError(f"no {kind} link of {member!r}; members are {', '.join(self.members)}")

    @property
    def members(self) -> list[str]:
        return list(dict.fromkeys(link.member for link in self.links))

    def host_address(self, kind: Kind) -> str:
        """The host's address on the network."""
        return _address(kind, self.slot, HOST_NUMBER)


def make_plan(slot: int, engines: list[str], rates: Rates) -> Plan:
    """Raises ValueError when the slot does not exist or a /24 cannot hold the engines."""
    if not 0 <= slot < SLOTS:
        raise ValueError(f"slot is {slot}; it must lie in 0..{SLOTS - 1}")
    if len(engines) > HOST_NUMBER - 2:
        raise ValueError(f"{len(engines)} engines; a network holds at most {HOST_NUMBER - 2}")
    links = [_link(slot, STORE, "storage", 1, rates.store_bits_per_s)]
    for number, engine in enumerate(engines, start=2):
        links.append(_link(slot, engine, "storage", number, rates.storage_bits_per_s))
        links.append(_link(slot, engine, "compute", number, rates.compute_bits_per_s))
    return Plan(slot, tuple(links))


def prefix(slot: int) -> str:
    return f"dp{slot:03d}-"


def bridge(slot: int, kind: Kind) -> str:
    return prefix(slot) + kind


def subnet(address: str) -> str:
    return address.rpartition(".")[0] + ".0/24"


def build_commands(plan: Plan) -> list[Command]:
    """Make the network; shaping is apart (`shape_commands`)."""
    commands = []
    for kind in _NICS:
        name = bridge(plan.slot, kind)
        commands += [
            ["ip", "link", "add", "name", name, "type", "bridge"],
            ["ip", "address", "add", f"{plan.host_address(kind)}/24", "dev", name],
            ["ip", "link", "set", name, "up"],
        ]
    for namespace in plan.namespaces:
        commands += [
            ["ip", "netns", "add", namespace],
            ["ip", "-n", namespace, "link", "set", "lo", "up"],
        ]
    for link in plan.links:
        mtu = ["mtu", str(MTU_BYTES)]
        pair = ["type", "veth", "peer", "name", link.nic, "netns", link.namespace, *mtu]
        commands += [
            ["ip", "link", "add", link.host_nic, *mtu, *pair],
            ["ip", "link", "set", link.host_nic, "master", link.bridge, "up"],
            ["ip", "-n", link.namespace, "address", "add", f"{link.address}/24", "dev", link.nic],
            ["ip", "-n", link.namespace, "link", "set", link.nic, "up"],
            ["ip", "-n", link.namespace, "route", "replace", subnet(link.address), "dev", link.nic,
             "proto", "kernel", "scope", "link", "src", link.address, "congctl", CONGESTION_CONTROL],
        ]  # fmt: skip
    return commands


def shape_commands(link: Link, bits_per_s: int | None) -> list[Command]:
    """Shape both directions of a link, whatever it was before; None takes the shaping away."""
    ends = [["tc", "qdisc"], ["tc", "-n", link.namespace, "qdisc"]]
    nics = [link.host_nic, link.nic]
    if bits_per_s is None:
        # `noqueue` replaces the bucket; a deletion would fail on a link that has none.
        kind = ["noqueue"]
    else:
        burst_bytes = max(LEAST_BURST_BYTES, round(bits_per_s / 8 * BURST_S))
        queue_bytes = burst_bytes + round(bits_per_s / 8 * QUEUE_S)
        kind = ["tbf", "rate", f"{bits_per_s}bit", "burst", str(burst_bytes), "limit", str(queue_bytes)]
    return [[*end, "replace", "dev", nic, "root", *kind] for end, nic in zip(ends, nics, strict=True)]


def remove_commands(namespaces: list[str], interfaces: list[str]) -> list[Command]:
    """Remove what is there; deleting the host's end of a pair deletes the other end too."""
    return [["ip", "link", "delete", name] for name in interfaces] + [
        ["ip", "netns", "delete", name] for name in namespaces
    ]


def enter(namespace: str, argv: Command) -> Command:
    """Run `argv` in a namespace.

    Not `ip netns exec`: that mounts a new /sys, in which SGLang does not find its memory limit.
    """
    return ["nsenter", f"--net=/run/netns/{namespace}", "--", *argv]


def _link(slot: int, member: str, kind: Kind, number: int, bits_per_s: int | None) -> Link:
    return Link(
        member=member,
        kind=kind,
        namespace=prefix(slot) + member,
        nic=_NICS[kind],
        host_nic=f"{prefix(slot)}{kind[0]}{number}",
        bridge=bridge(slot, kind),
        address=_address(kind, slot, number),
        bits_per_s=bits_per_s,
    )


def _address(kind: Kind, slot: int, number: int) -> str:
    return f"{_FIRST_BYTES[kind]}.{slot}.{number}"
