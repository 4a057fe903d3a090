"""The router as a process: HTTP in, one HTTP session and one ZeroMQ socket out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from dualpath_sgl.router import paths
from dualpath_sgl.router.answers.middleware import Handler, errors_as_json
from dualpath_sgl.router.fleet.body import Bodies
from dualpath_sgl.router.fleet.cluster_calls import ClusterCalls
from dualpath_sgl.router.fleet.engines import EngineDirectory
from dualpath_sgl.router.fleet.errors import BadRequest
from dualpath_sgl.router.fleet.health import HealthWatch
from dualpath_sgl.router.limit import RequestLimit
from dualpath_sgl.router.metrics import RouterMetrics
from dualpath_sgl.router.pairing import Pairing
from dualpath_sgl.router.placement import PlacementClient
from dualpath_sgl.router.route import Route
from dualpath_sgl.router.settings.admission import Admission
from dualpath_sgl.router.settings.settings import RouterSettings
from dualpath_sgl.router.spans import RouterSpans
from scheduler_svc.wire.descriptors import allow_many_connections
from scheduler_svc.wire.keys import KeyFileError

if TYPE_CHECKING:
    from sglang_router.router_args import RouterArgs

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
KEEP_IDLE_S = 4.0
"""Less than the 5 s after which SGLang's server (uvicorn) closes an idle connection: a request sent
just then would be lost on one engine, and its other half would wait for it."""


def serve(args: RouterArgs) -> None:
    """Until SIGTERM or SIGINT.  Exits with the remedy when an argument is wrong."""
    try:
        settings = RouterSettings.from_args(args)
    except ValueError as error:
        raise SystemExit(f"router: {error}") from None
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s")
    allow_many_connections()
    try:
        web.run_app(
            make_app(settings),
            host=settings.host,
            port=settings.port,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=settings.shutdown_s,
            print=None,
        )
    except KeyFileError as error:
        raise SystemExit(f"router: {error}") from None
    except OSError as error:
        raise SystemExit(
            f"router: cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another --port"
        ) from None


async def make_app(settings: RouterSettings) -> web.Application:
    """Everything the router consists of; closed with the application.  Raises KeyFileError."""
    scheduler = PlacementClient(settings.scheduler, settings.key_files)
    spans = RouterSpans(settings.otlp_endpoint)
    metrics = RouterMetrics()
    http = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_IDLE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        # No proxy of the environment stands between router and engines, and a cookie is its client's alone.
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding",),
    )
    health = HealthWatch(http, settings.health)
    directory = EngineDirectory(
        settings.prefill_urls, settings.decode_urls, Admission(settings.engine_url_prefixes), health.watch
    )
    route = Route(
        http,
        Pairing(scheduler, directory, spans, metrics),
        spans,
        metrics,
        RequestLimit(settings.limit),
        Bodies(settings.max_body_bytes),
        request_timeout_s=settings.request_timeout_s,
        max_retries=settings.max_retries,
    )
    calls = ClusterCalls(http, directory)

    async def close(app: web.Application) -> None:
        await health.close()
        await http.close()
        scheduler.close()
        spans.close()

    app = web.Application(client_max_size=settings.max_body_bytes, middlewares=[errors_as_json])
    app.on_cleanup.append(close)
    app.add_routes(
        [
            *(web.post(path, route.handle) for path in paths.GENERATES),
            *(web.get(path, calls.alive) for path in ("/health", "/liveness")),
            web.get("/readiness", calls.ready),
            web.get("/metrics", metrics.scrape),
            *(web.route(method, path, calls.any_engine) for method, path in paths.each(paths.ANY_ENGINE)),
            *(web.route(method, path, calls.every_engine) for method, path in paths.each(paths.EVERY_ENGINE)),
            *(web.route("*", path, _refuse(why)) for path, why in paths.REFUSED.items()),
            *(web.get(path, calls.server_info) for path in ("/server_info", "/get_server_info")),
        ]
    )
    logger.info(
        "router on %s:%d, scheduler %s, engines %s",
        settings.host,
        settings.port,
        settings.scheduler,
        ", ".join(engine.url for engine in directory),
    )
    return app


def _refuse(why: str) -> Handler:
    async def refuse(request: web.Request) -> web.StreamResponse:
        raise BadRequest(f"{request.path}: {why}")

    return refuse
