"""What the router goes by, from `sglang_router`'s own arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dualpath_sgl.router.settings import options
from dualpath_sgl.router.settings.admission import EngineUrl, UrlPrefix

if TYPE_CHECKING:
    from sglang_router.router_args import RouterArgs

Parsed = TypeVar("Parsed")
_ZEROMQ = re.compile(r"tcp://(\[[^\[\]/]+\]|[^\[\]:/]+):[0-9]{1,5}|ipc://.+")
_LOG_LEVELS = {None: "INFO", "debug": "DEBUG", "info": "INFO", "warn": "WARNING", "error": "ERROR"}
AT_LEAST = {
    **dict.fromkeys(("retry_max_retries", "shutdown_grace_period_secs"), 0),
    **dict.fromkeys(("queue_size", "queue_timeout_secs"), 0),
    **dict.fromkeys(("request_timeout_secs", "max_payload_size", "port"), 1),
    **dict.fromkeys(("health_failure_threshold", "health_success_threshold"), 1),
    **dict.fromkeys(("health_check_timeout_secs", "health_check_interval_secs"), 1),
}


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
class LimitSettings:
    at_once: int | None
    """Requests that are being answered; None: any number."""
    waiting: int
    """More than those, until one of them is answered."""
    wait_s: float


@dataclass(frozen=True)
class RouterSettings:
    host: str
    port: int
    scheduler: str
    """ZeroMQ address."""
    key_files: tuple[Path, Path] | None
    """This router's CURVE secret key and the scheduler's public one."""
    prefill_urls: tuple[tuple[str, int | None], ...]
    """As `EngineUrl` writes them, with bootstrap ports; the engines used while the scheduler is away."""
    decode_urls: tuple[str, ...]
    engine_url_prefixes: tuple[UrlPrefix, ...]
    """What other engines the scheduler may name."""
    request_timeout_s: float
    max_body_bytes: int
    max_retries: int
    shutdown_s: float
    log_level: str
    limit: LimitSettings
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
        if not _ZEROMQ.fullmatch(args.dualpath_scheduler):
            raise ValueError(
                f"--dualpath-scheduler is {args.dualpath_scheduler!r}; give a ZeroMQ address such as "
                "tcp://127.0.0.1:5557"
            )
        options.refuse_others(args)
        _check_values(args)
        keys = (args.dualpath_key_file, args.dualpath_scheduler_key_file)
        if (keys[0] is None) != (keys[1] is None):
            raise ValueError("give both --dualpath-key-file and --dualpath-scheduler-key-file, or neither")
        return cls(
            host=args.host,
            port=args.port,
            scheduler=args.dualpath_scheduler,
            key_files=None if keys[0] is None else (Path(keys[0]), Path(keys[1])),
            prefill_urls=tuple(
                (str(_parsed("--prefill", EngineUrl.parse, url)), port) for url, port in args.prefill_urls
            ),
            decode_urls=tuple(str(_parsed("--decode", EngineUrl.parse, url)) for url in args.decode_urls),
            engine_url_prefixes=tuple(
                _parsed("--dualpath-engine-url-prefix", UrlPrefix.parse, prefix)
                # An older patch of sglang_router has no such option.
                for prefix in getattr(args, "dualpath_engine_url_prefix", ())
            ),
            request_timeout_s=args.request_timeout_secs,
            max_body_bytes=args.max_payload_size,
            max_retries=0 if args.disable_retries else args.retry_max_retries,
            shutdown_s=args.shutdown_grace_period_secs,
            log_level=_LOG_LEVELS[args.log_level],
            limit=LimitSettings(
                at_once=None if args.max_concurrent_requests == -1 else args.max_concurrent_requests,
                waiting=args.queue_size,
                wait_s=args.queue_timeout_secs,
            ),
            health=HealthSettings(
                path=args.health_check_endpoint,
                interval_s=math.inf if args.disable_health_check else args.health_check_interval_secs,
                timeout_s=args.health_check_timeout_secs,
                failures=args.health_failure_threshold,
                successes=args.health_success_threshold,
            ),
            otlp_endpoint=_with_scheme(args.otlp_traces_endpoint) if args.enable_trace else None,
        )


def _check_values(args: RouterArgs) -> None:
    for name, least in AT_LEAST.items():
        if getattr(args, name) < least:
            raise ValueError(f"{options.flag(name)} is {getattr(args, name)}; give at least {least}")
    if args.port > 65535:
        raise ValueError(f"--port is {args.port}; give at most 65535")
    if args.max_concurrent_requests < 1 and args.max_concurrent_requests != -1:
        raise ValueError(
            f"--max-concurrent-requests is {args.max_concurrent_requests}; give at least 1, or -1 for no limit"
        )
    if args.log_level not in _LOG_LEVELS:
        raise ValueError(f"--log-level is {args.log_level!r}; give debug, info, warn or error")
    if not args.host:
        raise ValueError("--host is empty; give an address, 0.0.0.0 for every one")
    if not args.health_check_endpoint.startswith("/"):
        raise ValueError(
            f"--health-check-endpoint is {args.health_check_endpoint!r}; give a path such as /health"
        )


def _parsed(option: str, parse: Callable[[str], Parsed], value: str) -> Parsed:
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _with_scheme(endpoint: str) -> str:
    return endpoint if "://" in endpoint else f"http://{endpoint}"
