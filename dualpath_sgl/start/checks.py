"""What stands against DualPath's modes, asked before an engine serves: rules over plain facts.

Pure: nothing of SGLang or torch is imported.  The same rules judge an engine's flags (`dualpath doctor`,
and SGLang's own resolution of them), the storage backend that it builds and the host pool that it
registers; each of these knows some of the facts (facts.py).  A fact that is not known is None,
and no rule says anything about it.  verdict.py says which mode is left.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from urllib.request import proxy_bypass

from scheduler_svc.wire.protocol import Mode

LAYOUT = "page_first_direct"
IO_BACKEND = "direct"
NAMED_BACKEND = "mooncake"
"""Under this name DualPath's plugin registers its backend."""
BACKEND_CLASS = "dualpath_sgl.storage.DualPathStorage"
NO_BACKEND = "none"
TRANSFERS = ("mooncake", "mooncake_tcp", "nixl")
"""Over which decode-side loads were run."""
SMALL_PAGE_TOKENS = 16
"""Below this the cost of a page (a hash, a key in the store, a block of a forward) outweighs its bytes."""
UPSTREAM = "unset DUALPATH_ENABLED to run it without DualPath"
NEITHER = (Mode.DECODE_SIDE, Mode.RELAY)
NOT_DECODE_SIDE = (Mode.DECODE_SIDE,)


@dataclass(frozen=True)
class Problem:
    """What a fact means."""

    setting: str
    """A flag of SGLang's or an environment variable."""
    value: object
    why: str
    remedy: str
    stops: tuple[Mode, ...] = NEITHER
    """The modes that cannot run so; without any it is a warning."""

    def __str__(self) -> str:
        return f"{self.setting} is {self.value}: {self.why}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one engine is asked to be."""

    enabled: bool | None = None
    role: str | None = None
    """`prefill`, `decode` or what else --disaggregation-mode says."""
    patched: bool | None = None
    """Whether SGLang's decode engine has DualPath's patch."""
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
    beside_kv: str | None = None
    """What the model's cache holds beside KV, in words."""
    transfer: str | None = None
    """How SGLang sends KV from prefill to decode engines."""
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


Rule = Callable[[Facts], Problem | None]


@dataclass(frozen=True)
class Obstacle:
    """A rule about decode-side loads: relays help an engine all the same."""

    case: str
    """What the engine has, for people; Markdown."""
    setting: str
    why: str
    remedy: str
    value: Callable[[Facts], object]
    """What stands in the way; false or None: nothing does."""

    def __call__(self, facts: Facts) -> Problem | None:
        value = self.value(facts)
        if not value:
            return None
        return Problem(self.setting, value, self.why, self.remedy, NOT_DECODE_SIDE)


def _when(condition: bool | None, value: object) -> object:
    return value if condition else None


def _is_decode(facts: Facts) -> bool:
    return facts.role == "decode"


def _has_host_pool(facts: Facts) -> bool:
    return facts.hierarchical_cache is not False


def _above_one(field: str) -> Callable[[Facts], object]:
    return lambda facts: _when((getattr(facts, field) or 1) > 1, getattr(facts, field))


OBSTACLES: tuple[Obstacle, ...] = (
    Obstacle(
        "sliding windows, states (Mamba, GDN, KDA), an indexer (DSA), compressed KV (DeepSeek-V4), or a draft "
        "model's KV (EAGLE, MTP) beside its KV",
        "the model",
        "decode engines load and forward KV only, and this model's cache holds more",
        "choose relay",
        lambda facts: facts.beside_kv,
    ),
    Obstacle(
        "a KV host pool that owns no memory",
        "the model's KV host pool",
        "it holds no KV itself, so there is nothing to forward",
        "choose relay",
        lambda facts: facts.pool_without_bytes,
    ),
    Obstacle(
        f"another layout than `{LAYOUT}`, such as SGLang's default `page_first`, or unified memory",
        "--hicache-mem-layout",
        f"decode-side loads need {LAYOUT}, in which a page is one contiguous region",
        f"give --hicache-mem-layout {LAYOUT} --hicache-io-backend {IO_BACKEND} without --enable-unified-memory",
        lambda facts: _when(_has_host_pool(facts) and facts.layout not in (None, LAYOUT), facts.layout),
    ),
    Obstacle(
        f"another `--hicache-io-backend` than `{IO_BACKEND}`",
        "--hicache-io-backend",
        f"layout {LAYOUT} is copied by {IO_BACKEND} only",
        f"give --hicache-io-backend {IO_BACKEND}",
        lambda facts: _when(
            facts.layout == LAYOUT and facts.io_backend not in (None, IO_BACKEND), facts.io_backend
        ),
    ),
    Obstacle(
        "`--pp-size` above 1",
        "--pp-size",
        "each rank has other parts of a page, which decode-side loads cannot tell apart",
        "give --pp-size 1",
        _above_one("pp_size"),
    ),
    Obstacle(
        "`--attn-cp-size` above 1",
        "--attn-cp-size",
        "each rank has other parts of a page, which decode-side loads cannot tell apart",
        "give --attn-cp-size 1",
        _above_one("attn_cp_size"),
    ),
    Obstacle(
        "`--dcp-size` above 1",
        "--dcp-size",
        "each rank has other parts of a page, which decode-side loads cannot tell apart",
        "give --dcp-size 1",
        _above_one("dcp_size"),
    ),
    Obstacle(
        "a decode engine without HiCache",
        "--enable-hierarchical-cache",
        "without its host pool a decode engine can load nothing",
        "give it",
        lambda facts: _when(_is_decode(facts) and facts.hierarchical_cache is False, "not given"),
    ),
    Obstacle(
        "a decode engine with another storage backend, or none",
        "--hicache-storage-backend",
        "this decode engine cannot read the store",
        f"give {NAMED_BACKEND}",
        lambda facts: _when(
            _is_decode(facts) and _has_host_pool(facts) and not _is_ours(facts.backend), facts.backend
        ),
    ),
    Obstacle(
        f"another `--disaggregation-transfer-backend` than {', '.join(TRANSFERS)}",
        "--disaggregation-transfer-backend",
        f"decode-side loads were run over {', '.join(TRANSFERS)} only",
        "give one of these",
        lambda facts: _when(facts.transfer not in (None, *TRANSFERS), facts.transfer),
    ),
    Obstacle(
        "no prefill/decode disaggregation",
        "--disaggregation-mode",
        "decode-side loads join a prefill and a decode engine",
        "give 'prefill' or 'decode'",
        lambda facts: _when(facts.role not in (None, "prefill", "decode"), repr(facts.role)),
    ),
    Obstacle(
        "`--enable-pd-role-switch`",
        "--enable-pd-role-switch",
        "with decode-side loads an engine keeps the role that it starts with",
        "leave it out",
        lambda facts: _when(facts.role_switch, "set"),
    ),
    Obstacle(
        "`--radix-cache-backend`",
        "--radix-cache-backend",
        "decode-side loads know SGLang's own tree only",
        "leave it out",
        lambda facts: facts.radix_cache_backend,
    ),
    Obstacle(
        "`--disaggregation-decode-enable-offload-kvcache`",
        "--disaggregation-decode-enable-offload-kvcache",
        "it opens the storage backend a second time, and HiCache writes generated pages through anyway",
        "leave it out",
        lambda facts: _when(facts.decode_offload, "set"),
    ),
    Obstacle(
        "an SGLang without the patches",
        "SGLang's decode engine",
        "it cannot hold a request back for its load",
        "run dualpath patch apply",
        lambda facts: _when(facts.patched is False, "not patched"),
    ),
)


# -- what neither mode can do without ------------------------------------------------------------------


def _is_ours(backend: str | None) -> bool:
    return backend in (None, NAMED_BACKEND, BACKEND_CLASS)


def _enabled(facts: Facts) -> Problem | None:
    if facts.enabled is False:
        return Problem(
            "DUALPATH_ENABLED",
            "unset",
            "this engine runs as upstream does",
            "export DUALPATH_ENABLED=1, DUALPATH_ENGINE_ID and DUALPATH_SCHEDULER",
        )
    return None


def _hierarchical_cache(facts: Facts) -> Problem | None:
    if facts.hierarchical_cache is False and facts.role != "decode":
        return Problem(
            "--enable-hierarchical-cache",
            "not given",
            "the host pool of HiCache is what this engine loads into",
            f"give it, or {UPSTREAM}",
        )
    return None


def _backend(facts: Facts) -> Problem | None:
    if _is_ours(facts.backend) or facts.role == "decode":
        return None
    return Problem(
        "--hicache-storage-backend",
        facts.backend,
        "this engine would run without DualPath",
        f"give {NAMED_BACKEND}, or {UPSTREAM}",
    )


def _decode_radix_cache(facts: Facts) -> Problem | None:
    if _is_decode(facts) and facts.hierarchical_cache and facts.decode_radix_cache is False:
        return Problem(
            "--disaggregation-decode-enable-radix-cache",
            "not given",
            "SGLang refuses HiCache on a decode engine without it",
            "give it, or leave --enable-hierarchical-cache out: then relays serve this engine's requests",
        )
    return None


def _buffer_only(facts: Facts) -> Problem | None:
    if _is_decode(facts) and facts.host_memory_mode == "buffer_only":
        return Problem(
            "--hicache-host-memory-mode",
            "buffer_only",
            "a decode engine would never consume the pages that it staged, and SGLang refuses it",
            "give cache on decode engines, or leave --enable-hierarchical-cache out there",
        )
    return None


def _extra_config(facts: Facts) -> Problem | None:
    if facts.extra_config_error is not None:
        return Problem(
            "--hicache-storage-backend-extra-config",
            "not usable",
            facts.extra_config_error,
            f"give a JSON object, or @ and a file that holds one; backend {NAMED_BACKEND} needs none",
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


def _page_size(facts: Facts) -> Problem | None:
    tokens = facts.page_size
    if tokens is None or tokens >= SMALL_PAGE_TOKENS:
        return None
    many = "every token is" if tokens == 1 else f"every {tokens} tokens are"
    return Problem(
        "--page-size",
        tokens,
        f"{many} hashed, stored and moved apart, which is slow" if tokens > 0 else "a page holds tokens",
        "give --page-size 64, the same on every engine",
        stops=NEITHER if tokens < 1 else (),
    )


def _write_policy(facts: Facts) -> Problem | None:
    if facts.write_policy in (None, "write_through"):
        return None
    return Problem(
        "--hicache-write-policy",
        facts.write_policy,
        "pages that only device memory holds are not forwarded and not found in the store",
        "give write_through",
        stops=(),
    )


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
            stops=(),
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
        stops=() if known else NEITHER,
    )


def _otel_silent(facts: Facts) -> Problem | None:
    if facts.traced and facts.otel_sdk_disabled:
        return Problem("OTEL_SDK_DISABLED", "true", "no span is recorded", "unset it", stops=())
    if facts.traced and facts.otel_sampler == "always_off":
        return Problem("OTEL_TRACES_SAMPLER", "always_off", "no span is recorded", "unset it", stops=())
    return None


REFUSALS: tuple[Rule, ...] = (
    _enabled,
    _hierarchical_cache,
    _backend,
    _decode_radix_cache,
    _buffer_only,
    _extra_config,
    _zero_copy,
    _rdma_device,
    _forced_tcp,
    _proxy,
    _otlp_protocol,
    _page_size,
    _write_policy,
    _device_is_used,
    _otel_silent,
)
"""Of both modes, and warnings."""

RULES: tuple[Rule, ...] = (*REFUSALS, *OBSTACLES)


def problems(facts: Facts) -> list[Problem]:
    """Everything that any rule finds."""
    return [problem for rule in RULES if (problem := rule(facts)) is not None]
