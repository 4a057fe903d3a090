"""Which of `sglang_router`'s options the placing router obeys; all others are refused when somebody set them.

The list is of what is obeyed, so that an option of a later version is refused until somebody has seen to it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_router.router_args import RouterArgs

OBEYED = frozenset(
    (
        *("host", "port", "mini_lb", "pd_disaggregation", "prefill_urls", "decode_urls", "log_level"),
        *("dualpath_scheduler", "dualpath_key_file", "dualpath_scheduler_key_file"),
        "dualpath_engine_url_prefix",
        *("max_payload_size", "max_concurrent_requests", "queue_size", "queue_timeout_secs"),
        *("request_timeout_secs", "shutdown_grace_period_secs", "retry_max_retries", "disable_retries"),
        *("health_failure_threshold", "health_success_threshold", "health_check_timeout_secs"),
        *("health_check_interval_secs", "health_check_endpoint", "disable_health_check"),
        *("enable_trace", "otlp_traces_endpoint"),
        # There is no circuit breaker to disable.
        "disable_circuit_breaker",
    )
)
INSTEAD = {
    "worker_urls": "name engines with --prefill and --decode",
    "policy": "the scheduler chooses the engines, by its own --placement",
    "prefill_policy": "the scheduler chooses the engines, by its own --placement",
    "decode_policy": "the scheduler chooses the engines, by its own --placement",
    "dp_aware": "the scheduler knows every DP rank by itself",
    "service_discovery": "engines that join at run time are learned from the scheduler, see "
    "--dualpath-engine-url-prefix",
    "api_key": "the client's Authorization header is passed on to the engines",
    "server_cert_path": "put a proxy in front that speaks TLS",
    "server_key_path": "put a proxy in front that speaks TLS",
    "client_cert_path": "engines are not shown a certificate",
    "client_key_path": "engines are not shown a certificate",
    "ca_cert_paths": "an engine with https needs a certificate that this machine's own store knows",
    "cors_allowed_origins": "put a proxy in front that answers browsers",
    "rate_limit_tokens_per_second": "limit what runs at once with --max-concurrent-requests",
    "request_id_headers": "all of the client's headers are passed on, and spans tell requests apart "
    "(--enable-trace)",
    "prometheus_port": "metrics are at /metrics of the router's own port",
    "prometheus_host": "metrics are at /metrics of the router's own port",
    "log_dir": "the log goes to standard error",
    "control_plane_api_keys": "there is no control plane to protect",
    "jwt_issuer": "there is no control plane to protect",
}
"""What holds for options that would be missed."""
_FLAGS = {"server_cert_path": "tls-cert-path", "server_key_path": "tls-key-path"}
"""Where the option is not called like its field."""
_UNKNOWN = object()


def flag(name: str) -> str:
    """`max_payload_size` -> `--max-payload-size`."""
    return f"--{_FLAGS.get(name, name.replace('_', '-'))}"


def refuse_others(args: RouterArgs) -> None:
    """Raises ValueError naming every option that was set and would not be obeyed.

    Not their values: some are secrets, and the message goes to a log.
    """
    defaults = _defaults(type(args))
    problems = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in OBEYED or any(value == usual.get(field.name, _UNKNOWN) for usual in defaults):
            continue
        instead = INSTEAD.get(field.name, "leave it out")
        problems.append(f"{flag(field.name)} does not work with --dualpath-scheduler: {instead}")
    if problems:
        raise ValueError("; ".join(problems))


def _defaults(args_type: type[RouterArgs]) -> tuple[dict[str, Any], ...]:
    """An option that nobody gave is one of two values: the command line has defaults of its own."""
    from sglang_router.launch_router import parse_router_args

    return vars(args_type()), vars(parse_router_args([]))
