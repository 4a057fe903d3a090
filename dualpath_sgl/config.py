"""Settings of one engine, read from `DUALPATH_*` environment variables."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from scheduler_svc.engine_names import check_server_id
from scheduler_svc.protocol import PLAN_TIMEOUT_S

EVERY_ADDRESS = ("0.0.0.0", "::", "")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="DUALPATH_", extra="ignore")

    enabled: bool = False
    """Off (the default) registers no hook at all: SGLang runs as upstream."""
    engine_id: str = ""
    """Unique in the cluster, e.g. `prefill-0`."""
    scheduler: str = "tcp://127.0.0.1:5557"
    """ZeroMQ address of the global scheduler."""
    key_file: Path | None = None
    """This engine's CURVE secret key (`dualpath keys generate`), with `scheduler_key_file`."""
    scheduler_key_file: Path | None = None
    """The scheduler's public CURVE key; both are needed when it listens with CURVE."""
    host: str = "127.0.0.1"
    """This engine's address on the compute network: page server and forwarding listen here."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Mooncake transport of the forwarding engine (Mooncake itself accepts any word in silence)."""
    device: str = ""
    """RDMA device of the forwarding engine, on the compute network."""
    otlp_endpoint: str | None = None
    plan_timeout_s: Positive = PLAN_TIMEOUT_S
    """Without a plan for this long both engines act as the prefill path."""
    peer_timeout_s: Positive = 3.0
    """A DE that says nothing about a room for this long is given up; its pages are read elsewhere."""
    lease_s: Positive = 30.0
    """A DE keeps pages pinned for a PE this long after it last vouched for them."""
    subscribe_timeout_s: Positive = 10.0
    """A DE waits this long for the planned PE to ask for its pages before it stops holding them."""

    attention_quota_ms: Positive | None = None
    """A PE's step is filled until its predicted attention takes this long (the paper: 300 ms)."""

    def http_url(self, listens_on: str, port: int) -> str:
        """Where routers reach this engine's HTTP server: `host` when that listens on every address."""
        address = self.host if listens_on in EVERY_ADDRESS else listens_on
        return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


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
    if (loaded.key_file is None) != (loaded.scheduler_key_file is None):
        raise ValueError("give both DUALPATH_KEY_FILE and DUALPATH_SCHEDULER_KEY_FILE, or neither")
    return loaded
