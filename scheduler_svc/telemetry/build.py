"""Which release runs: a metric that is always 1, whose label says it."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from prometheus_client import CollectorRegistry, Gauge


@cache
def version() -> str:
    """Of the installed package; `unknown` for a source tree that nobody installed."""
    try:
        return metadata.version("dualpath-sgl")
    except metadata.PackageNotFoundError:
        return "unknown"


def tell(registry: CollectorRegistry, part: str) -> None:
    """`dualpath_PART_info`."""
    info = Gauge(f"dualpath_{part}_info", "What runs here; always 1.", ["version"], registry=registry)
    info.labels(version()).set(1)
