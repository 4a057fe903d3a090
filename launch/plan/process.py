"""One process of a cluster, as data: who starts it needs nothing else."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from scheduler_svc.wire.addresses import authority


class Part(StrEnum):
    MASTER = "master"
    STORE = "store"
    COLLECTOR = "collector"
    SCHEDULER = "scheduler"
    RELAY = "relay"
    PREFILL = "prefill"
    DECODE = "decode"
    ROUTER = "router"


@dataclass(frozen=True)
class Listens:
    """Ready once a TCP connection is taken."""

    host: str
    port: int


@dataclass(frozen=True)
class Answers:
    """Ready once a GET is answered with success."""

    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        return f"http://{authority(self.host, self.port)}{self.path}"


@dataclass(frozen=True)
class Says:
    """Ready once its log has this."""

    text: str


class Audience(StrEnum):
    """Who may connect to a port."""

    CLUSTER = "cluster"
    CLIENTS = "clients"
    MONITORING = "monitoring"


@dataclass(frozen=True)
class Port:
    """A TCP port that it listens on, or a range that Mooncake and SGLang draw from."""

    name: str
    """At most 15 characters, as Kubernetes wants it."""
    first: int
    last: int
    audience: Audience = Audience.CLUSTER


@dataclass(frozen=True)
class Resources:
    gpus: int = 0
    memory_bytes: int | None = None
    """What it takes for pages; None where SGLang decides."""
    rdma: bool = False


@dataclass(frozen=True)
class Process:
    name: str
    """Unique in the cluster, such as `prefill-0`."""
    part: Part
    place: str
    """Host, or whose links it uses."""
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """All of it."""
    secrets: tuple[str, ...]
    """Key files that it reads, within the directory of keys; `peers` is everybody's public ones."""
    ports: tuple[Port, ...]
    ready: Listens | Answers | Says
    after: tuple[str, ...]
    """Those that are ready before it starts."""
    resources: Resources = Resources()
    stop: signal.Signals = signal.SIGTERM
