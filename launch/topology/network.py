"""Builds a planned network on this machine, reads its counters and removes it again.

Whoever builds one holds a lock file in `LOCKS` for as long as the network may be used.  The
kernel lets go of it when the holder dies, however it dies, so a network whose lock can be taken
belongs to nobody: `clean` removes it, and so does the next `build`.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dualpath_sgl.launch.topology import plan as planning
from dualpath_sgl.launch.topology.plan import Command, Kind, Plan, Rates

LOCKS = Path("/run/dualpath/networks")
NEEDED_PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux"}
COMMAND_TIMEOUT_S = 20.0


class NetworkError(RuntimeError):
    """The network cannot be made here; the message says why and what to do."""


class LinkBytes(NamedTuple):
    """What went over a link since it was made, all headers included."""

    received: int
    sent: int


def obstacles() -> list[str]:
    """Why this process cannot build networks; empty when it can."""
    found = []
    if os.geteuid() != 0:
        found.append(
            "shaped networks need root (network namespaces): run as root, or take `network` out of the "
            "cluster file"
        )
    for program, package in NEEDED_PROGRAMS.items():
        if shutil.which(program) is None:
            found.append(f"program {program} is missing: apt-get install {package}")
    if found:
        return found
    probe = subprocess.run(
        ["unshare", "--net", "true"], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    if probe.returncode != 0:
        found.append(
            f"this machine refuses network namespaces ({probe.stderr.strip()}): give the container "
            "CAP_NET_ADMIN and CAP_SYS_ADMIN"
        )
    return found


class Network:
    """A network that exists.  Use `Network.build`, and `remove` (or a `with` block) at the end."""

    def __init__(self, plan: Plan, lock: int):
        self.plan = plan
        self._lock: int | None = lock

    @classmethod
    def build(cls, engines: list[str], rates: Rates) -> Network:
        """Remove what dead owners left behind, then build in the first free slot.

        Raises NetworkError.
        """
        if problems := obstacles():
            raise NetworkError("\n".join(problems))
        clean()
        taken = _subnets_of_this_machine()
        for slot in range(planning.SLOTS):
            plan = planning.make_plan(slot, engines, rates)
            if any(ipaddress.ip_address(plan.host_address(kind)) in net for net in taken for kind in _KINDS):
                continue
            lock = _try_lock(slot)
            if lock is None:
                continue
            network = cls(plan, lock)
            try:
                for command in planning.build_commands(plan):
                    _run(command)
                for link in plan.links:
                    if link.bits_per_s is not None:
                        network.shape(link.member, link.kind, link.bits_per_s)
            except BaseException:
                network.remove()
                raise
            return network
        raise NetworkError(f"all {planning.SLOTS} slots are in use or their subnets are: see `ip address`")

    def shape(self, member: str, kind: Kind, bits_per_s: int | None) -> None:
        """Give a link another rate while it is in use; None takes the limit away."""
        for command in planning.shape_commands(self.plan.link(member, kind), bits_per_s):
            _run(command)

    def link_bytes(self, member: str, kind: Kind) -> LinkBytes:
        link = self.plan.link(member, kind)
        shown = _run(["ip", "-n", link.namespace, "-j", "-s", "link", "show", link.nic])
        counted = json.loads(shown)[0]["stats64"]
        return LinkBytes(received=counted["rx"]["bytes"], sent=counted["tx"]["bytes"])

    def enter(self, member: str, argv: Command) -> Command:
        """`argv`, to be run in the member's namespace."""
        for link in self.plan.links:
            if link.member == member:
                return planning.enter(link.namespace, argv)
        raise KeyError(f"no member {member!r}; there are {', '.join(self.plan.members)}")

    def remove(self) -> None:
        """Idempotent.  Processes still inside lose their links."""
        if self._lock is None:
            return
        _remove(self.plan.slot)
        _unlock(self.plan.slot, self._lock)
        self._lock = None

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def clean(on_removed: Callable[[str], None] = lambda name: None) -> None:
    """Remove the networks whose owner is dead; `on_removed` gets the name of each.

    Raises NetworkError when something cannot be removed.
    """
    for file in sorted(LOCKS.glob("*.lock")):
        slot = int(file.stem)
        lock = _try_lock(slot)
        if lock is None:
            continue
        try:
            if _remove(slot):
                on_removed(planning.prefix(slot).rstrip("-"))
        finally:
            _unlock(slot, lock)


_KINDS: tuple[Kind, ...] = ("storage", "compute")


def _remove(slot: int) -> bool:
    """Whether there was anything."""
    beginning = planning.prefix(slot)
    links = [link["ifname"] for link in json.loads(_run(["ip", "-j", "link", "show"]) or "[]")]
    namespaces = [entry["name"] for entry in json.loads(_run(["ip", "-j", "netns", "list"]) or "[]")]
    commands = planning.remove_commands(
        [name for name in namespaces if name.startswith(beginning)],
        [name for name in links if name.startswith(beginning)],
    )
    for command in commands:
        _run(command)
    return bool(commands)


def _subnets_of_this_machine() -> list[ipaddress.IPv4Network]:
    addresses = json.loads(_run(["ip", "-j", "-4", "address", "show"]))
    return [
        ipaddress.IPv4Network(f"{entry['local']}/{entry['prefixlen']}", strict=False)
        for interface in addresses
        for entry in interface.get("addr_info", ())
    ]


def _try_lock(slot: int) -> int | None:
    """A descriptor that holds the slot; None while another process holds it."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    path = LOCKS / f"{slot:03d}.lock"
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        # Its last owner may have removed the file between the two calls: then nobody sees this lock.
        try:
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _unlock(slot: int, descriptor: int) -> None:
    (LOCKS / f"{slot:03d}.lock").unlink(missing_ok=True)
    os.close(descriptor)


def _run(command: Command) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if result.returncode != 0:
        raise NetworkError(f"{' '.join(command)}: status {result.returncode}: {result.stderr.strip()}")
    return result.stdout
