"""For each host of a cluster what systemd and its firewall need, and what puts it in place.

HOST/dualpath-CLUSTER.target           all of this host's processes
HOST/dualpath-CLUSTER-PROCESS.service  one of them
HOST/env/PROCESS                       its environment
HOST/firewall.nft                      the ports of these processes, and who may reach them
HOST/install.sh                        copies all that and starts the target
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dualpath_sgl.launch.config.cluster import ClusterConfig
from dualpath_sgl.launch.plan.process import Audience, Process
from dualpath_sgl.launch.render.quoting import command_line, environment_line
from scheduler_svc.wire.addresses import is_ipv6

CONFIG_DIRECTORY = Path("/etc/dualpath")
STATE_DIRECTORY = Path("/var/lib/dualpath")
RESTART_S = 2
STOP_S = 60
"""An engine drains first."""
OPEN_FILES = 65536


@dataclass(frozen=True)
class Options:
    python: Path
    """The interpreter of the hosts' environments."""
    user: str
    """Who the processes run as."""


def state_directory(cluster: str) -> Path:
    return STATE_DIRECTORY / cluster


def render_hosts(config: ClusterConfig, plan: Sequence[Process], options: Options) -> dict[str, str]:
    """Text of each file by its path below the output directory.  `config.hosts` is given."""
    files: dict[str, str] = {}
    hosts = config.hosts or {}
    members = [address for host in hosts.values() for address in (host.compute, host.storage_address)]
    for host in hosts:
        own = [process for process in plan if process.place == host]
        if own:
            files |= {f"{host}/{name}": text for name, text in _host(config, own, members, options).items()}
    return files


def at_python(process: Process, python: Path) -> Process:
    """With the programs of another environment than this one."""
    here, program = Path(sys.executable), Path(process.argv[0])
    if program == here:
        program = python
    elif program.parent == here.parent:
        program = python.parent / program.name
    return replace(process, argv=(str(program), *process.argv[1:]))


def _host(
    config: ClusterConfig, own: Sequence[Process], members: Iterable[str], options: Options
) -> dict[str, str]:
    names = {process.name for process in own}
    files = {f"dualpath-{config.name}.target": _target(config, own)}
    for process in own:
        files[f"dualpath-{config.name}-{process.name}.service"] = _unit(
            config, at_python(process, options.python), names, options.user
        )
        files[f"env/{process.name}"] = environment_file(process.env)
    files["firewall.nft"] = _firewall(config.name, own, members)
    files["install.sh"] = _installer(config.name)
    return files


def environment_file(environment: Mapping[str, str]) -> str:
    return "".join(f"{environment_line(name, environment[name])}\n" for name in sorted(environment))


def _target(config: ClusterConfig, own: Iterable[Process]) -> str:
    services = " ".join(_service(config, process.name) for process in own)
    return (
        f"[Unit]\nDescription=DualPath cluster {config.name} on this host\n"
        f"Wants={services}\n\n[Install]\nWantedBy=multi-user.target\n"
    )


def _service(config: ClusterConfig, name: str) -> str:
    return f"dualpath-{config.name}-{name}.service"


def _unit(config: ClusterConfig, process: Process, here: set[str], user: str) -> str:
    before = [_service(config, name) for name in process.after if name in here]
    lines = [
        "[Unit]",
        f"Description=DualPath {process.name} of {config.name}",
        "Wants=network-online.target",
        f"After={' '.join(['network-online.target', *before])}",
        f"PartOf=dualpath-{config.name}.target",
        # What it calls at its start may be on another host and not there yet: it is tried again for ever.
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        f"User={user}",
        f"EnvironmentFile={CONFIG_DIRECTORY / config.name / 'env' / process.name}",
        f"ExecStart={command_line(process.argv)}",
        "Restart=always",
        f"RestartSec={RESTART_S}",
        f"KillSignal={process.stop.name}",
        # Its ranks end with it; what is left is killed.
        "KillMode=mixed",
        f"TimeoutStopSec={STOP_S}",
        f"LimitNOFILE={OPEN_FILES}",
        f"StateDirectory={STATE_DIRECTORY.name}/{config.name}",
        "NoNewPrivileges=yes",
    ]
    if process.resources.rdma:
        lines.append("LimitMEMLOCK=infinity")
    return "\n".join([*lines, ""])


_SOURCES = {Audience.CLIENTS: "ip saddr @clients ", Audience.MONITORING: "ip saddr @monitoring "}
"""Whom the operator names; the cluster's own hosts may reach every port."""


def _firewall(cluster: str, own: Iterable[Process], members: Iterable[str]) -> str:
    """Admits the cluster's hosts to the ports of these processes, and clients and monitoring to theirs."""
    table = f"dualpath_{cluster.replace('-', '_')}"
    accepted: dict[str, None] = {}
    for process in own:
        for port in process.ports:
            if port.audience in _SOURCES:
                source = _SOURCES[port.audience]
                accepted[f"    {source}tcp dport {_interval(port.first, port.last)} accept"] = None
    inside = sorted(set(members))
    sets = []
    for name, kind, elements in (
        ("cluster4", "ipv4_addr", [one for one in inside if not is_ipv6(one)]),
        ("cluster6", "ipv6_addr", [one for one in inside if is_ipv6(one)]),
        ("clients", "ipv4_addr", []),
        ("monitoring", "ipv4_addr", []),
    ):
        shown = f" elements = {{ {', '.join(elements)} }};" if elements else ""
        sets.append(f"  set {name} {{ type {kind}; flags interval;{shown} }}")
    listed = ", ".join(_interval(*bounds) for bounds in _merged(own))
    return "\n".join(
        [
            "# Who may reach this host's part of the cluster.  Name clients and monitoring:",
            f"#   nft add element inet {table} clients '{{ 10.0.1.0/24 }}'",
            f"table inet {table} {{",
            *sets,
            "  chain input {",
            # Other services of the host are left to its own tables.
            "    type filter hook input priority filter; policy accept;",
            "    ct state established,related accept",
            "    iif lo accept",
            f"    ip saddr @cluster4 tcp dport {{ {listed} }} accept",
            f"    ip6 saddr @cluster6 tcp dport {{ {listed} }} accept",
            *accepted,
            f"    tcp dport {{ {listed} }} drop",
            "  }",
            "}",
            "",
        ]
    )


def _merged(own: Iterable[Process]) -> list[tuple[int, int]]:
    """All of their ports as intervals apart from each other: nftables takes no others in one set."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted((port.first, port.last) for process in own for port in process.ports):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _interval(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _installer(cluster: str) -> str:
    return f"""#!/bin/sh
# Run it as root on the host that this directory is named after.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
install -d -m 755 {CONFIG_DIRECTORY / cluster / "env"}
install -m 600 "$here"/env/* {CONFIG_DIRECTORY / cluster / "env"}/
install -m 644 "$here"/dualpath-{cluster}*.service "$here"/dualpath-{cluster}.target /etc/systemd/system/
install -m 644 "$here"/firewall.nft {CONFIG_DIRECTORY / cluster}/
systemctl daemon-reload
systemctl enable --now dualpath-{cluster}.target
"""
