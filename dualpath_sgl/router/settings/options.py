"""Which of `sglang_router`'s options the placing router obeys; all others are refused when somebody set them.

The list is of what is obeyed, so that an option of a later version is refused until somebody has seen to it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_router.router_args import RouterArgs

MEANING = {
    "pd_disaggregation": "needed: the router sends each request to a pair of engines",
    "mini_lb": "needed: the Rust router cannot ask the scheduler",
    "dualpath_scheduler": "ZeroMQ address of the scheduler, such as `tcp://127.0.0.1:5557`",
    "dualpath_key_file": "the router's own CURVE secret key, where the scheduler wants keys",
    "dualpath_scheduler_key_file": "the scheduler's public CURVE key; give both or neither",
    "dualpath_engine_url_prefix": "admits engines that join later: `http://10.1.0.0/16:30000` or "
    "`http://HOST:PORT`; may be repeated",
    "prefill_urls": "a prefill engine's URL and bootstrap port; may be repeated",
    "decode_urls": "a decode engine's URL; may be repeated",
    "host": "address to listen on",
    "port": "port to listen on",
    "log_level": "`debug`, `info`, `warn` or `error`",
    "max_payload_size": "largest body of a request, bytes",
    "max_concurrent_requests": "requests answered at once; -1: any number",
    "queue_size": "requests that may wait for a place among them",
    "queue_timeout_secs": "how long they wait",
    "request_timeout_secs": "longest request, from its first byte to its last",
    "shutdown_grace_period_secs": "how long open requests may take after SIGTERM",
    "retry_max_retries": "other pairs that are tried when an engine took no request",
    "disable_retries": "the first pair is the only one",
    "health_check_endpoint": "path that engines are asked for",
    "health_check_interval_secs": "time between two checks of one engine",
    "health_check_timeout_secs": "time that an answer may take",
    "health_failure_threshold": "failed checks in a row until an engine is down",
    "health_success_threshold": "good checks in a row until it is up again",
    "disable_health_check": "only engines that are down are checked",
    "disable_circuit_breaker": "accepted; there is none",
    "enable_trace": "export spans",
    "otlp_traces_endpoint": "OTLP/gRPC receiver of the spans",
}
"""What is obeyed, and what it does (docs/configuration.md is made of this)."""
OBEYED = frozenset(MEANING)
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
_FLAGS = {
    "server_cert_path": "tls-cert-path",
    "server_key_path": "tls-key-path",
    "prefill_urls": "prefill",
    "decode_urls": "decode",
}
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
