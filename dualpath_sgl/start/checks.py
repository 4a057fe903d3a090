"""What DualPath cannot serve, asked before an engine serves: rules over plain facts.

Pure: nothing of SGLang or torch is imported.  The same rules judge an engine's flags (`dualpath doctor`,
and SGLang's own resolution of them), the storage backend that it builds and the host pool that it
registers; each of these knows some of the facts (facts.py).  A fact that is not known is None,
and no rule says anything about it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from urllib.request import proxy_bypass

LAYOUT = "page_first_direct"
IO_BACKEND = "direct"
BACKEND_CLASS = "dualpath_sgl.storage.DualPathStorage"
NO_BACKEND = "none"
SMALL_PAGE_TOKENS = 16
"""Below this the cost of a page (a hash, a key in the store, a block of a forward) outweighs its bytes."""
UPSTREAM = "unset DUALPATH_ENABLED to run it without DualPath"


class Refused(ValueError):
    """An engine that cannot run under DualPath; one sentence for each reason."""


@dataclass(frozen=True)
class Problem:
    """What will not work, or (`refused` False) works worse than it could."""

    setting: str
    """A flag of SGLang's or an environment variable."""
    value: object
    why: str
    remedy: str
    refused: bool = True

    def __str__(self) -> str:
        return f"{self.setting} is {self.value}: {self.why}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one engine is asked to be."""

    enabled: bool | None = None
    role: str | None = None
    """`prefill`, `decode` or what else --disaggregation-mode says."""
    role_switch: bool | None = None
    hierarchical_cache: bool | None = None
    radix_cache_backend: str | None = None
    """A tree that is not SGLang's own."""
    decode_radix_cache: bool | None = None
    decode_offload: bool | None = None
    backend: str | None = None
    """`module.Class` of a dynamic storage backend, the name of another one, or NO_BACKEND."""
    extra_config_error: str | None = None
    zero_copy: bool | None = None
    """The backend's `interface_v1`."""
    layout: str | None = None
    io_backend: str | None = None
    unified_memory: bool | None = None
    host_memory_mode: str | None = None
    write_policy: str | None = None
    page_size: int | None = None
    """Tokens."""
    tp_size: int | None = None
    pp_size: int | None = None
    attn_cp_size: int | None = None
    dcp_size: int | None = None
    pool_without_bytes: str | None = None
    """Class of a KV host pool that owns no memory."""
    side_pool: str | None = None
    """Name of a host pool beside the one of the KV."""
    protocol: str | None = None
    """Transport of the forwarding engine."""
    devices: tuple[str, ...] = ()
    """RDMA devices asked for, for forwarding."""
    host_devices: frozenset[str] | None = None
    """RDMA devices of this host."""
    force_tcp: bool | None = None
    """MC_FORCE_TCP, which holds for every transfer engine of a process."""
    store_protocol: str | None = None
    """Transport of the store's client, where the environment names one."""
    http_proxy: str | None = None
    no_proxy: str = ""
    own_host: str | None = None
    """Address at which the engine calls itself."""
    traced: bool | None = None
    otlp_endpoint: str | None = None
    otlp_protocol: str | None = None
    otel_sdk_disabled: bool | None = None
    otel_sampler: str | None = None


def problems(facts: Facts) -> list[Problem]:
    """Everything that any rule finds, refusals first."""
    found = [problem for rule in RULES if (problem := rule(facts)) is not None]
    return sorted(found, key=lambda problem: not problem.refused)


def require(facts: Facts) -> list[Problem]:
    """The warnings.  Raises Refused when there is more than warnings."""
    found = problems(facts)
    if reasons := [str(problem) for problem in found if problem.refused]:
        raise Refused("\n".join(reasons))
    return found


# -- what the engine is ------------------------------------------------------------------------------


def _enabled(facts: Facts) -> Problem | None:
    if facts.enabled is False:
        return Problem(
            "DUALPATH_ENABLED",
            "unset",
            "this engine runs as upstream does, and the storage backend of DualPath refuses to start",
            "export DUALPATH_ENABLED=1, DUALPATH_ENGINE_ID and DUALPATH_SCHEDULER",
        )
    return None


def _role(facts: Facts) -> Problem | None:
    if facts.role not in (None, "prefill", "decode"):
        return Problem(
            "--disaggregation-mode",
            repr(facts.role),
            "DualPath joins a prefill and a decode engine",
            f"give 'prefill' or 'decode', or {UPSTREAM}",
        )
    return None


def _role_switch(facts: Facts) -> Problem | None:
    if facts.role_switch:
        return Problem(
            "--enable-pd-role-switch",
            "set",
            "under DualPath an engine keeps the role that it starts with",
            "leave it out",
        )
    return None


# -- its cache -----------------------------------------------------------------------------------------


def _hierarchical_cache(facts: Facts) -> Problem | None:
    if facts.hierarchical_cache is False:
        return Problem(
            "--enable-hierarchical-cache",
            "not given",
            "the host pool of HiCache is what DualPath loads into, on both sides",
            f"give it, or {UPSTREAM}",
        )
    return None


def _backend(facts: Facts) -> Problem | None:
    if facts.backend in (None, BACKEND_CLASS):
        return None
    return Problem(
        "--hicache-storage-backend",
        facts.backend,
        "this engine would run without DualPath",
        f"give dynamic, and --hicache-storage-backend-extra-config that names {BACKEND_CLASS} (docs/quickstart.md has "
        f"the line), or {UPSTREAM}",
    )


def _extra_config(facts: Facts) -> Problem | None:
    if facts.extra_config_error is not None:
        return Problem(
            "--hicache-storage-backend-extra-config",
            "not usable",
            facts.extra_config_error,
            "give a JSON object (docs/quickstart.md has the line), or @ and a file that holds one",
        )
    return None


def _zero_copy(facts: Facts) -> Problem | None:
    if facts.zero_copy is False and facts.backend in (None, BACKEND_CLASS):
        return Problem(
            "interface_v1 in --hicache-storage-backend-extra-config",
            "not set",
            "SGLang would copy every page through a second buffer, which this backend does not serve",
            'add "interface_v1": 1',
        )
    return None


def _radix_cache_backend(facts: Facts) -> Problem | None:
    if facts.radix_cache_backend is not None:
        return Problem(
            "--radix-cache-backend",
            facts.radix_cache_backend,
            "DualPath knows SGLang's own tree only",
            "leave it out",
        )
    return None


def _decode_radix_cache(facts: Facts) -> Problem | None:
    if facts.role == "decode" and facts.decode_radix_cache is False:
        return Problem(
            "--disaggregation-decode-enable-radix-cache",
            "not given",
            "without it a decode engine keeps no pages to forward, and SGLang refuses HiCache there",
            "give it",
        )
    return None


def _decode_offload(facts: Facts) -> Problem | None:
    if facts.decode_offload:
        return Problem(
            "--disaggregation-decode-enable-offload-kvcache",
            "set",
            "it opens the storage backend a second time, and HiCache writes generated pages through anyway",
            "leave it out",
        )
    return None


def _layout(facts: Facts) -> Problem | None:
    if facts.layout in (None, LAYOUT):
        return None
    remedy = f"give --hicache-mem-layout {LAYOUT} --hicache-io-backend {IO_BACKEND}"
    return Problem(
        "--hicache-mem-layout",
        facts.layout,
        f"DualPath needs {LAYOUT}, in which a page is one contiguous region",
        f"{remedy} without --enable-unified-memory" if facts.unified_memory else remedy,
    )


def _io_backend(facts: Facts) -> Problem | None:
    if facts.layout == LAYOUT and facts.io_backend not in (None, IO_BACKEND):
        return Problem(
            "--hicache-io-backend",
            facts.io_backend,
            f"layout {LAYOUT} is copied by {IO_BACKEND} only",
            f"give --hicache-io-backend {IO_BACKEND}",
        )
    return None


def _buffer_only(facts: Facts) -> Problem | None:
    if facts.role == "decode" and facts.host_memory_mode == "buffer_only":
        return Problem(
            "--hicache-host-memory-mode",
            "buffer_only",
            "a decode engine would never consume the pages that it staged",
            "give cache on decode engines",
        )
    return None


def _write_policy(facts: Facts) -> Problem | None:
    if facts.write_policy in (None, "write_through"):
        return None
    return Problem(
        "--hicache-write-policy",
        facts.write_policy,
        "pages that only device memory holds are not forwarded and not found in the store",
        "give write_through",
        refused=False,
    )


def _page_size(facts: Facts) -> Problem | None:
    tokens = facts.page_size
    if tokens is None or tokens >= SMALL_PAGE_TOKENS:
        return None
    many = "every token is" if tokens == 1 else f"every {tokens} tokens are"
    return Problem(
        "--page-size",
        tokens,
        f"{many} hashed, stored and forwarded apart, which is slow" if tokens > 0 else "a page holds tokens",
        "give --page-size 64, the same on every engine",
        refused=tokens < 1,
    )


def _pool_has_bytes(facts: Facts) -> Problem | None:
    if facts.pool_without_bytes is not None:
        return Problem(
            "the model's KV host pool",
            facts.pool_without_bytes,
            "it holds no KV itself, so there is nothing to forward",
            "unset DUALPATH_ENABLED to run this model without DualPath",
        )
    return None


def _side_pool(facts: Facts) -> Problem | None:
    if facts.side_pool is not None and (facts.tp_size or 1) > 1:
        return Problem(
            "--tp-size",
            facts.tp_size,
            f"the model has a host pool {facts.side_pool} beside its KV, which works on one rank only",
            f"give --tp-size 1, or {UPSTREAM}",
        )
    return None


# -- how it is spread ------------------------------------------------------------------------------------


def _spread(flag: str, what: str, field: str) -> Callable[[Facts], Problem | None]:
    def rule(facts: Facts) -> Problem | None:
        size = getattr(facts, field)
        if size is None or size <= 1:
            return None
        return Problem(
            flag,
            size,
            f"{what} gives each rank other parts of a page, which DualPath cannot tell apart",
            f"give {flag} 1 (tensor parallelism and data-parallel attention work), or {UPSTREAM}",
        )

    return rule


# -- how it is reached -----------------------------------------------------------------------------------


def _rdma_device(facts: Facts) -> Problem | None:
    if facts.protocol != "rdma" or facts.host_devices is None:
        return None
    there = f"this host has {', '.join(sorted(facts.host_devices)) or 'none'}"
    missing = [device for device in facts.devices if device not in facts.host_devices]
    if missing:
        return Problem(
            "DUALPATH_DEVICE", ",".join(missing), f"no such RDMA device, {there}", "name one that is there"
        )
    if not facts.host_devices:
        return Problem(
            "DUALPATH_PROTOCOL", "rdma", f"no RDMA device is known, {there}", "give tcp, or load the driver"
        )
    return None


def _device_is_used(facts: Facts) -> Problem | None:
    if facts.protocol == "tcp" and facts.devices:
        return Problem(
            "DUALPATH_DEVICE",
            ",".join(facts.devices),
            "DUALPATH_PROTOCOL is tcp, which uses no RDMA device",
            "export DUALPATH_PROTOCOL=rdma, or leave the device out",
            refused=False,
        )
    return None


def _forced_tcp(facts: Facts) -> Problem | None:
    asked = {"DUALPATH_PROTOCOL": facts.protocol, "MOONCAKE_PROTOCOL": facts.store_protocol}
    for setting, protocol in asked.items():
        if facts.force_tcp and protocol == "rdma":
            return Problem(
                setting,
                "rdma",
                "MC_FORCE_TCP (which --disaggregation-transfer-backend mooncake_tcp sets) makes it TCP",
                "give --disaggregation-transfer-backend mooncake and unset MC_FORCE_TCP, or say tcp here",
            )
    return None


def _proxy(facts: Facts) -> Problem | None:
    if not facts.http_proxy or facts.own_host is None or _bypasses(facts.own_host, facts.no_proxy):
        return None
    return Problem(
        "http_proxy",
        facts.http_proxy,
        f"SGLang's calls to {facts.own_host} would go through it, and the engine would never be ready",
        f"export no_proxy=127.0.0.1,localhost,{facts.own_host} with the other hosts of the cluster",
    )


def _bypasses(host: str, no_proxy: str) -> bool:
    entries = [entry.strip() for entry in no_proxy.split(",") if entry.strip()]
    try:
        address = ipaddress.ip_address(host)
        networks = [ipaddress.ip_network(entry, strict=False) for entry in entries if "/" in entry]
    except ValueError:
        networks = []
    if networks and any(address in network for network in networks):
        return True
    return bool(proxy_bypass(host, {"no": no_proxy}))


def _otlp_protocol(facts: Facts) -> Problem | None:
    protocol, endpoint = facts.otlp_protocol, facts.otlp_endpoint or ""
    if not facts.traced or protocol in (None, "", "grpc"):
        return None
    known = protocol == "http/protobuf"
    if known and endpoint.startswith(("http://", "https://")):
        return None
    return Problem(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        protocol,
        f"SGLang's exporter cannot reach {endpoint!r} so, and its spans are lost"
        if known
        else "SGLang's exporter does not know it and ends the engine",
        "unset it, or give grpc",
        refused=not known,
    )


def _otel_silent(facts: Facts) -> Problem | None:
    if facts.traced and facts.otel_sdk_disabled:
        return Problem("OTEL_SDK_DISABLED", "true", "no span is recorded", "unset it", refused=False)
    if facts.traced and facts.otel_sampler == "always_off":
        return Problem("OTEL_TRACES_SAMPLER", "always_off", "no span is recorded", "unset it", refused=False)
    return None


RULES: tuple[Callable[[Facts], Problem | None], ...] = (
    _enabled,
    _role,
    _role_switch,
    _hierarchical_cache,
    _backend,
    _extra_config,
    _zero_copy,
    _radix_cache_backend,
    _decode_radix_cache,
    _decode_offload,
    _layout,
    _io_backend,
    _buffer_only,
    _pool_has_bytes,
    _side_pool,
    _spread("--pp-size", "pipeline parallelism", "pp_size"),
    _spread("--attn-cp-size", "attention context parallelism", "attn_cp_size"),
    _spread("--dcp-size", "decode context parallelism", "dcp_size"),
    _rdma_device,
    _forced_tcp,
    _proxy,
    _otlp_protocol,
    _write_policy,
    _page_size,
    _device_is_used,
    _otel_silent,
)
