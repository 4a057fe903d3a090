"""Over what each kind of bytes travels, and what SGLang and Mooncake are given for it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

RDMA = "rdma"
BACKENDS = {"tcp": "mooncake_tcp", "rdma": "mooncake", "nixl": "nixl", "mori": "mori", "ascend": "ascend"}
"""What SGLang calls each way of sending KV."""
PD_OVER_RDMA = BACKENDS[RDMA]


class Transport(BaseModel):
    """TCP or RDMA. Mooncake takes every RDMA device of a host unless one is named."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    pd: Literal["tcp", "rdma", "nixl", "mori", "ascend"] | None = None
    """How SGLang sends KV from prefill to decode engines; null: RDMA if one of the next two is, else TCP."""
    compute: Literal["tcp", "rdma"] = "tcp"
    """Pages that decode engines and relays pass on."""
    storage: Literal["tcp", "rdma"] = "tcp"
    """Between the store and whoever reads it."""

    @model_validator(mode="after")
    def _nobody_forces_tcp_on_others(self) -> Transport:
        lost = [name for name in ("compute", "storage") if getattr(self, name) == RDMA]
        if self.pd == "tcp" and lost:
            raise ValueError(
                f"pd is tcp and {' and '.join(lost)} rdma: for TCP SGLang sets MC_FORCE_TCP, which holds for "
                "every transfer of an engine's process; give pd: rdma or pd: nixl, or leave pd out"
            )
        return self

    @property
    def backend(self) -> str:
        """SGLang's `--disaggregation-transfer-backend`."""
        fastest = RDMA if RDMA in (self.compute, self.storage) else "tcp"
        return BACKENDS[self.pd or fastest]
