"""What a cluster's processes find in their environment: what this process has, but for what would
reach into the cluster from outside of its description.

A cluster file says what runs.  Settings of SGLang, Mooncake, DualPath and OpenTelemetry that happen to
be exported in a shell (for another server, by another tool) are left out, and told; a group's `env` is
their place.  Proxies stay, since an engine may load something from elsewhere, but not for the cluster's
own addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

from scheduler_svc.wire.addresses import is_ipv6

FOREIGN_PREFIXES = ("DUALPATH_", "MOONCAKE_", "MC_", "SGLANG_", "SGL_", "OTEL_")
KEPT = {"OTEL_RESOURCE_ATTRIBUTES"}
"""Labels: they change no span's way."""
SHARED_BY_ACCIDENT = {"PROMETHEUS_MULTIPROC_DIR", "WEB_CONCURRENCY"}
"""Engines would count into one directory; uvicorn would start more workers than an engine has."""
NO_PROXY_VARIABLES = ("no_proxy", "NO_PROXY")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def foreign(base: Mapping[str, str]) -> list[str]:
    """Names in `base` that a cluster's processes do not get."""
    return sorted(
        name
        for name in base
        if name in SHARED_BY_ACCIDENT or (name.startswith(FOREIGN_PREFIXES) and name not in KEPT)
    )


def inherited(base: Mapping[str, str], own_addresses: Iterable[str]) -> dict[str, str]:
    """`base` without what is foreign; whoever honours a proxy reaches `own_addresses` without it."""
    environment = {name: value for name, value in base.items() if name not in set(foreign(base))}
    exempt = ",".join(_exempt(base, own_addresses))
    environment |= dict.fromkeys(NO_PROXY_VARIABLES, exempt)
    if "no_grpc_proxy" in base:  # gRPC then looks at nothing else.
        environment["no_grpc_proxy"] = f"{base['no_grpc_proxy']},{exempt}"
    return environment


def forget_foreign_tracing(environment: MutableMapping[str, str]) -> None:
    """In a process that itself exports spans to the cluster's collector."""
    for name in foreign(environment):
        if name.startswith("OTEL_"):
            del environment[name]


def _exempt(base: Mapping[str, str], own_addresses: Iterable[str]) -> list[str]:
    named = [host.strip() for variable in NO_PROXY_VARIABLES for host in base.get(variable, "").split(",")]
    for address in (*LOOPBACK, *own_addresses):
        named += [address, f"[{address}]"] if is_ipv6(address) else [address]
    return [host for host in dict.fromkeys(named) if host]
