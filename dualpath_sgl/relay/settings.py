"""Settings of a relay, read from `DUALPATH_RELAY_*` environment variables."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from scheduler_svc.wire.addresses import check_endpoint
from scheduler_svc.wire.reach import is_loopback

PREFIX = "DUALPATH_RELAY_"
MIB = 2**20
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", use_attribute_docstrings=True)

    name: Name = Field(default_factory=socket.gethostname)
    """Unique in the cluster, the host's name if none is given; prefill engines know its public key as `NAME.key`."""

    host: str = "127.0.0.1"
    """This host's address on the compute network: prefill engines ask and pull here."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where prefill engines ask; 0 takes a free one."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Mooncake transport to the prefill engines."""
    device: str = ""
    """RDMA device on the compute network."""
    key_file: Path | None = None
    """This relay's CURVE secret key, with the directory of the others' keys."""
    peer_keys: Path | None = None
    """Directory with the public keys of the engines that may ask, `ENGINE_ID.key`."""
    trusted_network: bool = False
    """Whoever reaches the host may have any object read: needs no keys."""

    scheduler: str | None = None
    """ZeroMQ address of the global scheduler, which tells prefill engines of this relay; none: their flags name it."""
    scheduler_key_file: Path | None = None
    """The scheduler's public CURVE key, when it listens with CURVE."""

    master: str = "127.0.0.1:50051"
    """Mooncake master of the store, HOST:PORT."""
    metadata_server: str = "P2PHANDSHAKE"
    """Of the store's transfer engine."""
    tenant_id: str = "default"
    """The store's tenant, as the engines have it."""
    storage_host: str = ""
    """This host's address on the storage network; when empty, that on the compute network."""
    storage_protocol: Literal["tcp", "rdma"] = "tcp"
    """Mooncake transport to the store."""
    storage_device: str = ""
    """RDMA device on the storage network."""

    ring_bytes: Annotated[int, Field(ge=1 * MIB, le=2**40)] = 512 * MIB
    """Memory that objects are read into, registered with both networks."""
    slot_bytes: Annotated[int, Field(ge=64 * 1024, le=2**30)] = 4 * MIB
    """What is read at a time takes whole slots: at least the clients' batch."""
    numa_node: Annotated[int, Field(ge=0)] | None = None
    """Node of the NICs: the ring's memory and the relay's threads stay there."""
    keep_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """An object is given to whoever asks again so long after it was read, if its memory is not needed."""

    readers: Annotated[int, Field(ge=1, le=64)] = 2
    """Reads under way: one is on the link while another one asks the master where its objects are."""
    lease_s: Positive = 5.0
    """A client has so long to pull what is ready."""
    hang_s: Positive = 1.25
    """A read that takes longer beyond its expected time is refused to those who wait for it."""
    patience_s: Positive = 2.0
    """A fetch that has waited so long comes before all others."""
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """After SIGTERM, the longest that clients may still pull what they asked for."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Prometheus scrape port; 0 takes a free one."""
    otlp_endpoint: str | None = None
    """OTLP/gRPC receiver of spans; none: no spans are made."""
    read_rate_bytes_per_s: Positive | None = None
    """Measuring aid: reads take as long as over a storage link of this rate."""

    @property
    def most_bytes(self) -> int:
        """Of one fetch: several must find room at a time."""
        return max(self.slot_bytes, self.ring_bytes // 4 // self.slot_bytes * self.slot_bytes)

    @field_validator("scheduler")
    @classmethod
    def _is_address(cls, scheduler: str | None) -> str | None:
        if scheduler is not None:
            check_endpoint(scheduler)
        return scheduler

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        if self.ring_bytes < 2 * self.slot_bytes:
            raise ValueError(
                f"ring_bytes {self.ring_bytes} holds no two slots of slot_bytes {self.slot_bytes}: one is "
                "read while another one is pulled"
            )
        if (self.key_file is None) != (self.peer_keys is None):
            raise ValueError(
                "give both key_file and peer_keys: one proves who the relay is, the other says who may ask"
            )
        if self.scheduler_key_file is not None and (self.scheduler is None or self.key_file is None):
            raise ValueError(
                "scheduler_key_file is given without scheduler and key_file: give all three, or only scheduler"
            )
        if self.peer_keys is None and not self.trusted_network and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached from other hosts, and nothing says who may ask: give "
                "key_file and peer_keys (see `dualpath keys generate`), or trusted_network=1"
            )
        return self


def load() -> Settings:
    """Raises ValueError naming variable, value and what is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        raise ValueError(
            "; ".join(_in_words(problem) for problem in error.errors(include_url=False))
        ) from None


def _in_words(problem: object) -> str:
    assert isinstance(problem, dict)
    if not problem["loc"]:
        return f"{PREFIX}*: {problem['msg']}"
    return f"{PREFIX}{str(problem['loc'][0]).upper()} is {problem['input']!r}: {problem['msg']}"
