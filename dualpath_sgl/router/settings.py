"""What the router goes by, from `sglang_router`'s own arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_router.router_args import RouterArgs

UNSUPPORTED = {
    "service_discovery": "engines that join at run time are learned from the scheduler",
    "api_key": "the client's Authorization header is passed on to the engines",
    "server_cert_path": "put a proxy in front that speaks TLS",
    "client_cert_path": "engines are reached over plain HTTP",
    "control_plane_api_keys": "there is no control plane to protect",
    "jwt_issuer": "there is no control plane to protect",
}
"""Arguments of the Rust router that would be missed if they were ignored, and what holds instead."""


@dataclass(frozen=True)
class HealthSettings:
    path: str
    interval_s: float
    """Between two checks of an engine that is up; infinite: only engines that are down are checked."""
    timeout_s: float
    failures: int
    """In a row, until an engine is down."""
    successes: int
    """In a row, until it is up again."""


@dataclass(frozen=True)
class RouterSettings:
    host: str
    port: int
    scheduler: str
    """ZeroMQ address."""
    key_files: tuple[Path, Path] | None
    """This router's CURVE secret key and the scheduler's public one."""
    prefill_urls: tuple[tuple[str, int | None], ...]
    """With bootstrap ports; the engines used while the scheduler is away."""
    decode_urls: tuple[str, ...]
    request_timeout_s: float
    max_body_bytes: int
    max_retries: int
    shutdown_s: float
    health: HealthSettings
    otlp_endpoint: str | None

    @classmethod
    def from_args(cls, args: RouterArgs) -> RouterSettings:
        """Raises ValueError naming the argument, its value and the remedy."""
        if not args.mini_lb:
            raise ValueError(
                "--dualpath-scheduler needs --mini-lb: the Rust router cannot ask the scheduler; without "
                "--dualpath-scheduler the scheduler still chooses the load path"
            )
        if not args.pd_disaggregation:
            raise ValueError("--dualpath-scheduler needs --pd-disaggregation: it places pairs of engines")
        if not args.prefill_urls or not args.decode_urls:
            raise ValueError(
                "give at least one --prefill and one --decode: they are used while the scheduler is away"
            )
        if not args.dualpath_scheduler.startswith(("tcp://", "ipc://")):
            raise ValueError(
                f"--dualpath-scheduler is {args.dualpath_scheduler!r}; give a ZeroMQ address such as "
                "tcp://127.0.0.1:5557"
            )
        for name, instead in UNSUPPORTED.items():
            if getattr(args, name):
                option = name.replace("_", "-").replace("server-cert-path", "tls-cert-path")
                raise ValueError(f"--{option} does not work with --dualpath-scheduler: {instead}")
        keys = (args.dualpath_key_file, args.dualpath_scheduler_key_file)
        if (keys[0] is None) != (keys[1] is None):
            raise ValueError("give both --dualpath-key-file and --dualpath-scheduler-key-file, or neither")
        return cls(
            host=args.host,
            port=args.port,
            scheduler=args.dualpath_scheduler,
            key_files=None if keys[0] is None else (Path(keys[0]), Path(keys[1])),
            prefill_urls=tuple(args.prefill_urls),
            decode_urls=tuple(args.decode_urls),
            request_timeout_s=args.request_timeout_secs,
            max_body_bytes=args.max_payload_size,
            max_retries=0 if args.disable_retries else args.retry_max_retries,
            shutdown_s=args.shutdown_grace_period_secs,
            health=HealthSettings(
                path=args.health_check_endpoint,
                interval_s=math.inf if args.disable_health_check else args.health_check_interval_secs,
                timeout_s=args.health_check_timeout_secs,
                failures=args.health_failure_threshold,
                successes=args.health_success_threshold,
            ),
            otlp_endpoint=_with_scheme(args.otlp_traces_endpoint) if args.enable_trace else None,
        )


def _with_scheme(endpoint: str) -> str:
    return endpoint if "://" in endpoint else f"http://{endpoint}"
