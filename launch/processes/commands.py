"""Command lines and environments of a cluster's processes, from its description and ports.

Pure: nothing is started or read here.  SGLang's flags are those of 0.5.23.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualpath_sgl.launch.config import security
from dualpath_sgl.launch.config.addresses import Addresses, EngineAddresses
from dualpath_sgl.launch.config.cluster import ClusterConfig, Group, Mode, RouterKind, bits_per_s
from dualpath_sgl.launch.config.otlp import HEADERS_VARIABLE
from dualpath_sgl.launch.config.transport import PD_OVER_RDMA
from dualpath_sgl.launch.processes.environment import inherited
from dualpath_sgl.limits.read_limit import READ_RATE_KEY
from dualpath_sgl.relay.client.options import OPTIONS_KEY
from scheduler_svc.wire.addresses import authority, in_url, is_ipv6
from scheduler_svc.wire.protocol import Role

OFFLINE_ENV = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CPU_ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # An engine that breaks ends at once instead of waiting a minute for a GPU's core dump.
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
}
MOONCAKE_ENV = {
    "MOONCAKE_TE_META_DATA_SERVER": "P2PHANDSHAKE",
    # Engines own no segment: the store node does, so a dead engine loses no page.
    "MOONCAKE_GLOBAL_SEGMENT_SIZE": "0",
    "MC_LOG_LEVEL": "ERROR",
    # A peer that hangs is given up after 10 s instead of 30 s; busy CPUs stall a transfer for seconds.
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "10",
}
# The router keeps idle connections to the engines open.  A server that closes them first (SGLang
# does after 5 s) may close one just as the router sends on it: the request is lost on one engine,
# and its other half waits for it on the other one for ever.
HTTP_ENV = {"SGLANG_TIMEOUT_KEEP_ALIVE": "3600"}
# A decode engine forgets where a prefill engine's ranks listen when two heartbeats in a row fail.
# SGLang sends one in 5 s; a prefill engine restarted in less than two of them stays unnoticed, and
# requests wait 300 s for its old ports.  2 s is SGLang's minimum, and no engine restarts in 4 s.
PD_ENV = {"SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2"}
# Level 3, SGLang's default, adds a span for each token.
TRACE_LEVEL_ENV = {"SGLANG_TRACE_LEVEL": "2"}
BOOTSTRAP_TIMEOUT = "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT"
CPU_FLAGS = (
    "--device=cpu",
    "--attention-backend=torch_native",
    "--dtype=float32",
    # The overlap schedule creates CUDA events.
    "--disable-overlap-schedule",
    # Idle schedulers would spin and share two cores with the busy ones.
    "--sleep-on-idle",
)
CPU_BOUNCE_BYTES = 64 << 20
CUDA_FLAGS = ("--device=cuda", "--dtype=bfloat16")
SCHEDULED = (Mode.DECODE_SIDE, Mode.RELAY)
"""Modes with a scheduler."""
DECODE_CACHES = (Mode.DECODE_SIDE, Mode.BOTH)
"""Modes in which decode engines have HiCache, too."""
LIMITED_BACKEND: dict[str, str | int] = {
    "backend_name": "mooncake_limited",
    "module_path": "dualpath_sgl.limits.limited_store",
    "class_name": "LimitedStore",
    "interface_v1": 1,
}


@dataclass(frozen=True)
class Ports:
    """Ports that the whole cluster shares."""

    master: int
    master_metrics: int
    scheduler: int
    scheduler_metrics: int
    collector: int
    router: int
    router_metrics: int


@dataclass(frozen=True)
class EngineSpec:
    """One SGLang server."""

    name: str
    role: Role
    group: Group
    port: int
    bootstrap_port: int | None
    """Only a PE has one."""
    first_gpu: int
    page_port: int = 0
    """Of a decode engine's rank 0, the next ranks' follow; 0: free ones."""
    meeting_port: int | None = None
    """Where its ranks meet (torch.distributed); None: SGLang draws one."""

    def url(self, addresses: Addresses) -> str:
        return f"http://{authority(addresses.engine(self.name).url_host, self.port)}"


def engine_specs(config: ClusterConfig, take_port) -> list[EngineSpec]:
    """PEs, then DEs; on CUDA each takes the next `tp_size` GPUs.  `take_port()` gives a free port."""
    specs: list[EngineSpec] = []
    first_gpu = 0
    for role, group in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode)):
        for index in range(group.count):
            bootstrap_port = take_port() if role is Role.PREFILL else None
            specs.append(EngineSpec(f"{role}-{index}", role, group, take_port(), bootstrap_port, first_gpu))
            first_gpu += group.tp_size
    return specs


def master_command(addresses: Addresses, ports: Ports) -> list[str]:
    program = str(Path(sys.executable).parent / "mooncake_master")
    return [
        program,
        f"--rpc_address={addresses.listens('master')}",
        f"--rpc_port={ports.master}",
        f"--metrics_host={addresses.listens('master')}",
        f"--metrics_port={ports.master_metrics}",
    ]


def store_command(
    config: ClusterConfig, addresses: Addresses, ports: Ports, name: str = "store"
) -> list[str]:
    device = addresses.storage_devices.get(name)
    return _python(
        "dualpath_sgl.launch.processes.store_node",
        f"--master={master(addresses, ports)}",
        f"--segment-bytes={config.store.segment_bytes}",
        f"--host={addresses.listens(name)}",
        f"--protocol={config.transport.storage}",
        *([f"--device={device}"] if device else []),
    )


def collector_command(
    config: ClusterConfig, addresses: Addresses, ports: Ports, spans_path: Path
) -> list[str]:
    forward = config.tracing.otlp_endpoint
    return _python(
        "dualpath_sgl.launch.processes.collector",
        f"--host={addresses.listens('collector')}",
        f"--port={ports.collector}",
        f"--out={spans_path}",
        *([f"--forward={forward}"] if forward else []),
        *([f"--forward-ca={config.tracing.otlp_ca_file}"] if config.tracing.otlp_ca_file else []),
    )


def collector_environment(config: ClusterConfig, base: Mapping[str, str]) -> dict[str, str]:
    """`base`: a part's environment."""
    headers = config.tracing.otlp_headers
    return dict(base) | ({HEADERS_VARIABLE: json.dumps(headers)} if headers else {})


def tracing_environment(config: ClusterConfig) -> dict[str, str]:
    """Who is traced, for processes in which traces begin, and how much SGLang says."""
    ratio = config.tracing.sample_ratio
    return TRACE_LEVEL_ENV | (
        {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": repr(ratio)}
        if ratio < 1
        else {}
    )


def master(addresses: Addresses, ports: Ports) -> str:
    """HOST:PORT of the store's index."""
    return authority(addresses.at("master"), ports.master)


def scheduler_url(addresses: Addresses, ports: Ports) -> str:
    return f"tcp://{authority(addresses.at('scheduler'), ports.scheduler)}"


def collector_url(addresses: Addresses, ports: Ports) -> str:
    return f"http://{authority(addresses.at('collector'), ports.collector)}"


def scheduler_command(config: ClusterConfig, addresses: Addresses, ports: Ports) -> list[str]:
    return _python(
        "scheduler_svc",
        f"--bind=tcp://{authority(addresses.listens('scheduler'), ports.scheduler)}",
        f"--metrics-host={addresses.listens('scheduler')}",
        f"--metrics-port={ports.scheduler_metrics}",
        *security.scheduler_flags(config.security, addresses),
        f"--policy={config.scheduler.policy}",
        f"--placement={config.scheduler.placement}",
        *([f"--otlp-endpoint={collector_url(addresses, ports)}"] if config.tracing.enabled else []),
    )


def router_command(
    config: ClusterConfig, addresses: Addresses, ports: Ports, engines: Sequence[EngineSpec]
) -> list[str]:
    workers: list[str] = []
    for engine in engines:
        if engine.role is Role.PREFILL:
            workers += ["--prefill", engine.url(addresses), str(engine.bootstrap_port)]
        else:
            workers += ["--decode", engine.url(addresses)]
    host = addresses.listens("router")
    placing = asks_for_placement(config)
    kind = placing_flags if placing else rust_flags
    return _python(
        "sglang_router.launch_router",
        "--pd-disaggregation",
        *workers,
        # The Rust router parses host and port together.
        f"--host={host if placing else in_url(host)}",
        f"--port={ports.router}",
        # A dead or hung engine is noticed soon.
        "--health-check-interval-secs=5",
        *kind(config, addresses, ports),
    )


def asks_for_placement(config: ClusterConfig) -> bool:
    """Whether the scheduler chooses the engines.  There is none in upstream's modes."""
    return config.router.kind is RouterKind.PLACING and config.mode in (Mode.AUTO, *SCHEDULED)


def rust_flags(config: ClusterConfig, addresses: Addresses, ports: Ports) -> list[str]:
    return [
        f"--policy={config.router.policy}",
        f"--prometheus-host={addresses.listens('router')}",
        f"--prometheus-port={ports.router_metrics}",
        # Workers are looked for every second, not every 30.
        "--worker-startup-check-interval=1",
        # A retry goes to the same dead engine until the health check has noticed: let the client
        # decide about asking again.
        "--disable-retries",
    ]


def placing_flags(config: ClusterConfig, addresses: Addresses, ports: Ports) -> list[str]:
    collector = f"--otlp-traces-endpoint={authority(addresses.at('collector'), ports.collector)}"
    return [
        "--mini-lb",
        f"--dualpath-scheduler={scheduler_url(addresses, ports)}",
        # An engine that has come up is used at once.
        "--health-success-threshold=1",
        *security.router_flags(config.security),
        *(
            [f"--dualpath-engine-url-prefix=http://{config.kubernetes.pod_network}:{config.ports.engines}"]
            if config.kubernetes is not None
            else []
        ),
        *(["--enable-trace", collector] if config.tracing.enabled else []),
    ]


def engine_command(
    config: ClusterConfig, addresses: Addresses, engine: EngineSpec, ports: Ports
) -> list[str]:
    host = addresses.engine(engine.name).compute
    flags = [*common_flags(config, engine.group, host, engine.port), f"--disaggregation-mode={engine.role}"]
    flags.append(f"--disaggregation-transfer-backend={config.transport.backend}")
    if engine.role is Role.PREFILL:
        flags.append(f"--disaggregation-bootstrap-port={engine.bootstrap_port}")
    decode_caches = config.mode in DECODE_CACHES
    if engine.role is Role.PREFILL or decode_caches:
        flags += _hicache_flags(config, engine.group)
    else:
        # A decode engine backs retracted requests up in host memory even without HiCache; sized by
        # SGLang it would want 10 GiB free.
        flags.append(_host_pool_flag(engine.group))
    if engine.role is Role.DECODE and decode_caches:
        flags.append("--disaggregation-decode-enable-radix-cache")
    if engine.meeting_port is not None:
        flags.append(f"--nccl-port={engine.meeting_port}")
    if addresses.engine(engine.name).compute_device and config.transport.backend == PD_OVER_RDMA:
        flags.append(f"--disaggregation-ib-device={addresses.engine(engine.name).compute_device}")
    if config.device == "cuda" and engine.first_gpu:
        flags.append(f"--base-gpu-id={engine.first_gpu}")
    if config.tracing.enabled:
        flags += [
            "--enable-trace",
            f"--otlp-traces-endpoint={authority(addresses.at('collector'), ports.collector)}",
            "--trace-modules=request",
            f"--otlp-service-name={engine.name}",
        ]
    return _python("dualpath_sgl.launch.engine", *flags, *engine.group.extra_args)


def single_server_command(config: ClusterConfig, port: int) -> list[str]:
    """A plain server of the same model: no PD, no HiCache, no tracing."""
    return _python(
        "dualpath_sgl.launch.engine",
        *common_flags(config, config.prefill, config.host, port),
        *config.prefill.extra_args,
    )


def common_flags(config: ClusterConfig, group: Group, host: str, port: int) -> list[str]:
    flags = [
        f"--model-path={config.model.directory()}",
        f"--host={host}",
        f"--port={port}",
        f"--page-size={config.page_size}",
        f"--tp-size={group.tp_size}",
        "--grammar-backend=xgrammar",
        "--enable-cache-report",
        "--enable-metrics",
        *(CPU_FLAGS if config.device == "cpu" else CUDA_FLAGS),
    ]
    if group.max_total_tokens is not None:
        flags.append(f"--max-total-tokens={group.max_total_tokens}")
    return flags


def engine_environment(
    config: ClusterConfig,
    addresses: Addresses,
    engine: EngineSpec,
    ports: Ports,
    base: Mapping[str, str],
) -> dict[str, str]:
    own = addresses.engine(engine.name)
    environment = {
        **server_environment(config, engine.group, own, part_environment(addresses, base)),
        **MOONCAKE_ENV,
        **PD_ENV,
        "MOONCAKE_PROTOCOL": config.transport.storage,
        "MOONCAKE_MASTER": master(addresses, ports),
        "MOONCAKE_LOCAL_HOSTNAME": own.storage,
    }
    if own.storage_device:
        environment["MOONCAKE_DEVICE"] = own.storage_device
    if config.tracing.enabled:
        environment |= tracing_environment(config)
    if config.mode in SCHEDULED:
        environment |= {
            **_patience(config),
            "DUALPATH_ENABLED": "1",
            "DUALPATH_MODE": config.mode,
            "DUALPATH_SCHEDULER": scheduler_url(addresses, ports),
            "DUALPATH_ENGINE_ID": engine.name,
            "DUALPATH_HOST": own.compute,
            "DUALPATH_PROTOCOL": config.transport.compute,
            **security.engine_environment(config.security, addresses, engine.name),
        }
        if own.compute_device:
            environment["DUALPATH_DEVICE"] = own.compute_device
        if engine.page_port:
            environment["DUALPATH_PAGE_PORT"] = str(engine.page_port)
        if config.tracing.enabled:
            environment["DUALPATH_OTLP_ENDPOINT"] = collector_url(addresses, ports)
    return environment | engine.group.env


def part_environment(addresses: Addresses, base: Mapping[str, str]) -> dict[str, str]:
    """What every process of the cluster gets."""
    environment = inherited(base, addresses.every)
    if is_ipv6(addresses.store):
        environment["MC_USE_IPV6"] = "1"
    return environment


def server_environment(
    config: ClusterConfig, group: Group, own: EngineAddresses, base: Mapping[str, str]
) -> dict[str, str]:
    """What any SGLang server needs; `base` is a part's environment."""
    environment = dict(base)
    environment |= OFFLINE_ENV | HTTP_ENV | {"SGLANG_HOST_IP": own.compute}
    if own.compute_nic is not None:
        environment["SGLANG_LOCAL_IP_NIC"] = own.compute_nic
    if config.device == "cpu":
        environment |= CPU_ENV
        if group.tp_size > 1:
            # Without a binding SGLang wants one NUMA node per rank.
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(group.tp_size))
    return environment


def _patience(config: ClusterConfig) -> dict[str, str]:
    """How long a PE waits for its DE: the DE must know, which holds a request back for its load."""
    return {name: value for name, value in config.prefill.env.items() if name == BOOTSTRAP_TIMEOUT}


def _host_pool_flag(group: Group) -> str:
    pool = group.host_pool
    return f"--hicache-ratio={pool.ratio:g}" if pool.ratio is not None else f"--hicache-size={pool.size_gb}"


def _hicache_flags(config: ClusterConfig, group: Group) -> list[str]:
    # SGLang's default of 256 tokens would hide short prefixes.
    extra: dict[str, Any] = {"prefetch_threshold": config.page_size}
    rate = config.store.read_rate
    backend = "mooncake"
    if config.mode in SCHEDULED:
        if config.device == "cpu":
            extra[OPTIONS_KEY] = {"bounce_bytes": CPU_BOUNCE_BYTES}
    elif rate is not None:
        backend = "dynamic"
        extra |= LIMITED_BACKEND
    if rate is not None:
        extra[READ_RATE_KEY] = bits_per_s(rate) // 8
    return [
        "--enable-hierarchical-cache",
        _host_pool_flag(group),
        *page_flags(config),
        "--hicache-write-policy=write_through",
        "--hicache-storage-prefetch-policy=wait_complete",
        f"--hicache-storage-backend={backend}",
        f"--hicache-storage-backend-extra-config={json.dumps(extra)}",
    ]


def page_flags(config: ClusterConfig) -> tuple[str, str]:
    """How pages lie in the host pool and are copied.  SGLang's fastest for GPUs disturbs decode steps least."""
    if config.device == "cuda" and config.mode is not Mode.DECODE_SIDE:
        return "--hicache-mem-layout=page_first", "--hicache-io-backend=kernel"
    return "--hicache-mem-layout=page_first_direct", "--hicache-io-backend=direct"


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
