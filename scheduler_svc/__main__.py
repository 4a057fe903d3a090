"""`python -m scheduler_svc`: the scheduler as a process."""

from __future__ import annotations

import logging
import signal
import time
from typing import Annotated

import typer

from scheduler_svc.metrics import Metrics
from scheduler_svc.placement import RoundRobinPlacement
from scheduler_svc.policies import DEFAULT_PATH_POLICY, PATH_POLICIES, path_policy
from scheduler_svc.server import BindRefused, Server
from scheduler_svc.state import Cluster
from scheduler_svc.tracing import DecisionSpans, init_tracing, shutdown


def serve(
    bind: Annotated[
        str, typer.Option(help="ZeroMQ address; port 0 takes a free one.")
    ] = "tcp://127.0.0.1:5557",
    policy: Annotated[
        str, typer.Option(help=f"Path policy: {', '.join(PATH_POLICIES)}.")
    ] = DEFAULT_PATH_POLICY,
    otlp_endpoint: Annotated[str | None, typer.Option(help="OTLP/gRPC collector for spans.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Prometheus scrape port; 0 takes a free one.")
    ] = None,
    insecure_bind: Annotated[
        bool, typer.Option("--insecure-bind", help="Allow an address that other hosts can reach.")
    ] = False,
) -> None:
    """Choose engines and load paths for a DualPath cluster until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        chosen_policy = path_policy(policy)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--policy") from None

    metrics = Metrics()
    cluster = Cluster(chosen_policy, RoundRobinPlacement(), started_s=time.monotonic())
    tracer = init_tracing("dualpath-scheduler", otlp_endpoint)
    try:
        server = Server(
            bind, cluster, metrics, observers=[DecisionSpans(tracer)], insecure_bind=insecure_bind
        )
    except BindRefused as error:
        raise typer.BadParameter(str(error), param_hint="--bind") from None
    if metrics_port is not None:
        try:
            port = metrics.serve(metrics_port, host="0.0.0.0" if insecure_bind else "127.0.0.1")
        except OSError as error:
            raise typer.BadParameter(
                f"port {metrics_port}: {error.strerror}; choose another", param_hint="--metrics-port"
            ) from None
        logging.info("metrics on port %d", port)

    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: server.stop())
    print(f"scheduler ready at {server.address}", flush=True)
    try:
        server.run()
    finally:
        shutdown()


if __name__ == "__main__":
    typer.run(serve)
