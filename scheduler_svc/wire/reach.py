"""Who can reach an address: this host alone, a private network, or more."""

from __future__ import annotations

import ipaddress

PRIVATE_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "127.0.0.0/8", "::1/128",  # loopback
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",  # RFC 1918
        "fc00::/7",  # RFC 4193
        "169.254.0.0/16", "fe80::/10",  # link-local
    )
)  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether only this host reaches `host`: 127.0.0.0/8, ::1 (in brackets or not) or localhost."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_private(address: str) -> bool:
    """Whether `address` is loopback, link-local, or of a network that the internet does not route.

    An interface's name after `%` is left aside.  Raises ValueError for what is no IP address.
    """
    parsed = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(parsed in network for network in PRIVATE_NETWORKS if network.version == parsed.version)
