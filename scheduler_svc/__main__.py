"""`python -m scheduler_svc`: the scheduler as a process."""

from __future__ import annotations

import gc
import logging
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, TypeVar

import typer
import zmq

from scheduler_svc import http_side
from scheduler_svc.decision_spans import DecisionSpans
from scheduler_svc.metrics import Metrics
from scheduler_svc.policies.path_policies import DEFAULT_PATH_POLICY, PATH_POLICIES, path_policy
from scheduler_svc.policies.placement_policies import DEFAULT_PLACEMENT, PLACEMENT_POLICIES, placement_policy
from scheduler_svc.server import BindRefused, Server
from scheduler_svc.standby import await_free
from scheduler_svc.state import Cluster
from scheduler_svc.telemetry.tracing import init_tracing, shutdown
from scheduler_svc.wire.addresses import authority
from scheduler_svc.wire.authenticator import PeerAuthenticator
from scheduler_svc.wire.descriptors import allow_many_connections
from scheduler_svc.wire.keys import KeyFileError

MOST_PORT = 65535

logger = logging.getLogger(__name__)

Policy = TypeVar("Policy")


def serve(
    bind: Annotated[
        str, typer.Option(help="ZeroMQ address; port 0 takes a free one.")
    ] = "tcp://127.0.0.1:5557",
    policy: Annotated[
        str, typer.Option(help=f"Path policy: {', '.join(PATH_POLICIES)}.")
    ] = DEFAULT_PATH_POLICY,
    placement: Annotated[
        str, typer.Option(help=f"Placement policy: {', '.join(PLACEMENT_POLICIES)}.")
    ] = DEFAULT_PLACEMENT,
    otlp_endpoint: Annotated[str | None, typer.Option(help="OTLP/gRPC collector for spans.")] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="HTTP port of /metrics and /healthz; 0 takes a free one."),
    ] = None,
    metrics_host: Annotated[
        str | None,
        typer.Option(
            help="Address of that port, whatever --bind says; left out: 127.0.0.1, or all of them with "
            "--insecure-bind."
        ),
    ] = None,
    place_over_http: Annotated[
        bool,
        typer.Option(
            "--place-over-http",
            help="POST /place at the HTTP port names a pair of engines, to whoever reaches it, without a key.",
        ),
    ] = False,
    curve_server_key_file: Annotated[
        Path | None, typer.Option(help="The scheduler's .key_secret: peers must speak CURVE.")
    ] = None,
    authorized_keys_dir: Annotated[
        Path | None,
        typer.Option(help="Directory with every peer's .key file; a change counts within seconds."),
    ] = None,
    standby: Annotated[
        bool,
        typer.Option(
            "--standby", help="Wait until --bind is free: another scheduler serves there until it ends."
        ),
    ] = False,
    insecure_bind: Annotated[
        bool,
        typer.Option("--insecure-bind", help="Allow an address that other hosts can reach, without CURVE."),
    ] = False,
) -> None:
    """Choose engines and load paths for a DualPath cluster until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    allow_many_connections()
    path = _named(path_policy, policy, "--policy")
    placing = _named(placement_policy, placement, "--placement")
    if (curve_server_key_file is None) != (authorized_keys_dir is None):
        raise typer.BadParameter(
            "give both --curve-server-key-file and --authorized-keys-dir: one proves who the scheduler is, "
            "the other says who may connect"
        )
    if metrics_host is not None and metrics_port is None:
        raise typer.BadParameter("give --metrics-port too, or leave it out", param_hint="--metrics-host")
    if place_over_http and metrics_port is None:
        raise typer.BadParameter("give --metrics-port too, or leave it out", param_hint="--place-over-http")

    if standby:
        _stand_by(bind)
    metrics = Metrics()
    cluster = Cluster(path, placing, started_s=time.monotonic())
    # Without a collector spans would be made, at a quarter of a request's cost, and dropped.
    observers = (
        [DecisionSpans(init_tracing("dualpath-scheduler", otlp_endpoint))]
        if otlp_endpoint is not None
        else []
    )
    with ExitStack() as running:
        context: zmq.SyncContext = zmq.Context.instance()
        authorized_keys = None
        try:
            if authorized_keys_dir is not None:
                count_refused = metrics.refused_connections.labels("auth").inc
                admitting = PeerAuthenticator(authorized_keys_dir, context, count_refused)
                authorized_keys = running.enter_context(admitting).keys
            server = Server(
                bind,
                cluster,
                metrics,
                observers=observers,
                insecure_bind=insecure_bind,
                curve_server_key_file=curve_server_key_file,
                authorized_keys=authorized_keys,
                context=context,
            )
        except (BindRefused, KeyFileError) as error:
            hint = "--bind" if isinstance(error, BindRefused) else "CURVE keys"
            raise typer.BadParameter(str(error), param_hint=hint) from None
        if metrics_port is not None:
            host = metrics_host or ("0.0.0.0" if insecure_bind else "127.0.0.1")
            try:
                port = http_side.serve(
                    metrics.registry, server, metrics_port, host, may_place=place_over_http
                )
            except OSError as error:
                where = authority(host, metrics_port)
                raise typer.BadParameter(
                    f"{where}: {error.strerror}; choose another, or another --metrics-host",
                    param_hint="--metrics-port",
                ) from None
            logger.info("metrics and health at http://%s", authority(host, port))

        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, lambda *_: server.stop())
        # Engines and rooms form no reference cycles (a test sees to it), and looking for some among a
        # hundred thousand rooms would hold up plans for a second.
        gc.disable()
        print(f"scheduler ready at {server.address}", flush=True)
        try:
            server.run()
        finally:
            shutdown()


def _stand_by(bind: str) -> None:
    host, _, port = bind.removeprefix("tcp://").rpartition(":")
    if not (port.isdecimal() and 1 <= int(port) <= MOST_PORT):
        raise typer.BadParameter(
            f"--standby waits for one port, got {bind!r}; give tcp://HOST:PORT", param_hint="--bind"
        )
    try:
        await_free(host, int(port))
    except OSError as error:
        raise typer.BadParameter(
            f"{bind}: {error}; give an address of this host", param_hint="--bind"
        ) from None


def _named(make: Callable[[str], Policy], name: str, option: str) -> Policy:
    try:
        return make(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


if __name__ == "__main__":
    typer.run(serve)
