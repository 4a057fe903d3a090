"""Settings of one engine, read from `DUALPATH_*` environment variables."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from scheduler_svc.wire.addresses import authority
from scheduler_svc.wire.engine_names import check_server_id
from scheduler_svc.wire.protocol import PLAN_TIMEOUT_S, Mode
from scheduler_svc.wire.reach import is_loopback

EVERY_ADDRESS = ("0.0.0.0", "::", "")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="DUALPATH_", extra="ignore", use_attribute_docstrings=True)

    enabled: bool = False
    """Off (the default) registers nothing at all: SGLang runs as upstream."""
    mode: Literal["auto", "relay", "decode-side"] = "auto"
    """How loads use more than one storage link; `auto` chooses by model, flags and transport, and says why."""
    engine_id: str = ""
    """Unique in the cluster, e.g. `prefill-0`."""
    scheduler: str = "tcp://127.0.0.1:5557"
    """ZeroMQ address of the global scheduler."""
    key_file: Path | None = None
    """This engine's CURVE secret key (`dualpath keys generate`), with the scheduler's public one."""
    scheduler_key_file: Path | None = None
    """The scheduler's public CURVE key; both are needed when it listens with CURVE."""
    peer_keys: Path | None = None
    """Directory with the public key of every engine and relay, `NAME.key`: they then speak CURVE to each
    other, too.  A key added or removed counts within seconds."""
    trusted_network: bool = False
    """Whoever reaches this engine's host may see, divert and end its loads: needs no peer keys."""
    host: str = "127.0.0.1"
    """This engine's address on the compute network: page server and forwarding listen here."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Mooncake transport of the forwarding engine (Mooncake itself accepts any word in silence)."""
    device: str = ""
    """RDMA device of the forwarding engine, on the compute network."""
    page_port: int = Field(0, ge=0, le=65535)
    """Of a decode engine's rank 0: where prefill engines ask for pages; the next ranks' are the next ports; 0 takes
    free ones."""
    otlp_endpoint: str | None = None
    """OTLP/gRPC receiver of this engine's spans; none: no spans are made."""
    plan_timeout_s: Positive = PLAN_TIMEOUT_S
    """Without a plan for this long both engines act as the prefill path."""
    peer_timeout_s: Positive = 3.0
    """A DE that says nothing about a room for this long is given up; its pages are read elsewhere."""
    lease_s: Positive = 30.0
    """A DE keeps pages pinned for a PE this long after it last vouched for them."""
    subscribe_timeout_s: Positive = 10.0
    """A DE waits this long for the planned PE to ask for its pages before it stops holding them."""

    attention_quota_ms: Positive | None = None
    """Experimental, its gain is not measured: a PE's step is filled until its predicted attention takes this
    long (the paper: 300 ms)."""

    @property
    def asked_mode(self) -> Mode | None:
        """None: the engine chooses."""
        return None if self.mode == "auto" else Mode(self.mode)

    def http_url(self, listens_on: str, port: int) -> str:
        """Where routers reach this engine's HTTP server: `host` when that listens on every address."""
        address = self.host if listens_on in EVERY_ADDRESS else listens_on
        return f"http://{authority(address, port)}"


@cache
def settings() -> Settings:
    """The process's settings.  Raises ValueError naming variable, value and what is wrong."""
    try:
        loaded = Settings()
    except ValidationError as error:
        raise ValueError(
            "; ".join(
                f"DUALPATH_{str(problem['loc'][0]).upper()} is {problem['input']!r}: {problem['msg']}"
                for problem in error.errors(include_url=False)
            )
        ) from None
    if loaded.enabled and not loaded.engine_id:
        raise ValueError("DUALPATH_ENGINE_ID is empty: give this engine a name unique in the cluster")
    check_server_id(loaded.engine_id)
    _check_keys(loaded)
    return loaded


def _check_keys(loaded: Settings) -> None:
    """Raises ValueError for half a set of keys, and for none where strangers may come."""
    if (loaded.key_file is None) != (loaded.scheduler_key_file is None):
        raise ValueError("give both DUALPATH_KEY_FILE and DUALPATH_SCHEDULER_KEY_FILE, or neither")
    if loaded.peer_keys is not None and loaded.key_file is None:
        raise ValueError(
            f"DUALPATH_PEER_KEYS is {str(loaded.peer_keys)!r} without DUALPATH_KEY_FILE and "
            "DUALPATH_SCHEDULER_KEY_FILE: give all three, or none"
        )
    if loaded.peer_keys is not None and loaded.peer_keys.is_file():
        raise ValueError(
            f"DUALPATH_PEER_KEYS is {str(loaded.peer_keys)!r}, a file: name the directory that holds the "
            "engines' .key files"
        )
    open_to_others = not is_loopback(loaded.host) and loaded.peer_keys is None
    if loaded.enabled and open_to_others and not loaded.trusted_network:
        raise ValueError(
            f"DUALPATH_HOST is {loaded.host!r}, which other hosts can reach, and nothing says who may: give "
            "DUALPATH_PEER_KEYS, DUALPATH_KEY_FILE and DUALPATH_SCHEDULER_KEY_FILE (see `dualpath keys "
            "generate`), or DUALPATH_TRUSTED_NETWORK=1 if everybody on that network is trusted"
        )
