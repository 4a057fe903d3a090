"""What a rendering for Kubernetes needs to know beside the cluster itself."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]


def _is_network(text: str) -> str:
    try:
        ipaddress.IPv4Network(text)
    except ValueError:
        raise ValueError("is no IPv4 network; give one such as 10.244.0.0/16") from None
    return text


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Rdma(_Section):
    """How pods get RDMA devices. They are never privileged."""

    resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9_.-]+$")] | None = None
    """Of a device plug-in, such as `rdma/hca`; each pod takes one."""
    device_path: Annotated[str, Field(pattern=r"^/dev/[A-Za-z0-9/_.-]+$")] | None = None
    """Of the node, such as `/dev/infiniband`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Rdma:
        if (self.resource is None) == (self.device_path is None):
            raise ValueError(
                "give either resource, such as rdma/hca, or device_path, such as /dev/infiniband"
            )
        return self


class Kubernetes(_Section):
    """Every process is a pod of its own. Its addresses are the cluster's, so there are no `hosts`."""

    image: Annotated[str, Field(min_length=1, max_length=500, pattern=r"^\S+$")]
    """Of every part, such as one of `Dockerfile.cuda`."""
    namespace: Name | None = None
    """Null: the cluster's name."""
    model_claim: Name | None = None
    """PersistentVolumeClaim that is mounted at `model.path`; null: the model is in the image."""
    stores: int = Field(1, ge=1, le=64)
    """Store nodes, each of `store.segment_bytes`."""
    routers: int = Field(2, ge=1, le=64)
    """Pods of the router, which share nothing."""
    gpu_resource: str = "nvidia.com/gpu"
    """What a GPU is called."""
    rdma: Rdma | None = None
    """Devices for `transport` rdma."""
    shm_bytes: int = Field(16 << 30, ge=64 << 20)
    """Of each engine, at `/dev/shm`; counts as its memory."""
    user: int = Field(10001, ge=1, le=2**31 - 1)
    """User and group number of every pod."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes that engines may be on."""
    pod_network: Annotated[str, AfterValidator(_is_network)] | None = None
    """Addresses that pods get; a placing router takes engines there. Must be given with one."""
    client_namespace: Name = "gateway"
    """From where the router may be reached."""
    monitoring_namespace: Name = "monitoring"
    """From where metrics may be read."""
    service_monitor: bool = False
    """Objects for Prometheus' operator."""
