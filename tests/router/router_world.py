"""The real scheduler and the real patched router as processes, in front of engines that can fail."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from faulty_engine import WAIT_S, Behaviour, FaultyEngine, Room
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from otlp_collector import attributes, collector

from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.processes.process import ManagedProcess
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.protocol import Heartbeat, Role, Workload

HEARTBEAT_S = 0.5
START_TIMEOUT_S = 180.0
"""Of four routers at once; each imports SGLang."""
STRICT_BODY_BYTES = 100_000
# The exporter of spans speaks gRPC, which has a list of exceptions of its own.
NO_WAY_OUT = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "no_grpc_proxy": "127.0.0.1"}
_ports = FreePorts("127.0.0.1")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes
    trace_id: str

    @property
    def json(self) -> dict:
        return json.loads(self.content)


class Router(NamedTuple):
    url: str
    process: ManagedProcess
    places: bool
    """By asking the scheduler."""

    def ask(self, path: str = "/generate", headers: dict[str, str] | None = None, **body) -> Answer:
        data = json.dumps({"text": "hello"} | body).encode()
        return self._answer(path, data, {"Content-Type": "application/json"} | (headers or {}))

    def send(self, body: bytes) -> Answer:
        """Exactly these bytes, well-formed or not."""
        return self._answer("/generate", body, {"Content-Type": "application/json"})

    def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        return self._answer(path, None, headers or {})

    def post(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        """Without a body."""
        return self._answer(path, b"", headers or {})

    def _answer(self, path: str, data: bytes | None, headers: dict[str, str]) -> Answer:
        """Continues a new trace."""
        trace_id = secrets.token_hex(16)
        headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"} | headers
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=2 * WAIT_S) as found:
                return Answer(found.status, dict(found.headers), found.read(), trace_id)
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read(), trace_id)


class World:
    """`p0`, `p1`, `d0`, `d1`, a scheduler, and routers in front."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._processes: list[ManagedProcess] = []
        self._stopping = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        rooms: defaultdict[int, Room] = defaultdict(Room)
        names = ("p0", "p1", "d0", "d1")
        self.engines = {name: FaultyEngine(name, self._loop, rooms) for name in names}
        self.registered = list(self.engines.values())
        """Engines that send heartbeats."""
        self.scheduler_address = f"tcp://127.0.0.1:{_ports.take()}"
        self._open = ExitStack()
        self._collector = self._open.enter_context(collector())
        self._spans: list[tuple[str, Span]] = []
        self.scheduler = self._process(
            "scheduler",
            "scheduler_svc",
            f"--bind={self.scheduler_address}",
            f"--otlp-endpoint={self._collector.address}",
        )
        self._routers: dict[str, Router] = {}

    def __enter__(self) -> World:
        self._loop_thread.start()
        for engine in self.engines.values():
            engine.listen()
        self.scheduler.start()
        self._heart.start()
        self._routers = self._start_routers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._heart.join()
        for process in self._processes:
            if process.pid is not None:
                process.send_group(signal.SIGKILL)
                process.finish(time.monotonic() + WAIT_S)
        for engine in self.engines.values():
            engine.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join()
        self._open.close()

    def __getattr__(self, name: str) -> FaultyEngine:
        try:
            return self.engines[name]
        except KeyError:
            raise AttributeError(name) from None

    def of(self, role: Role) -> list[FaultyEngine]:
        return [engine for engine in self.engines.values() if engine.role is role]

    def let_all(self, role: Role, behaviour: Behaviour) -> None:
        for engine in self.of(role):
            engine.behaviour = behaviour

    def mend_engines(self) -> None:
        for engine in self.engines.values():
            engine.mend()

    def mend(self) -> None:
        self.mend_engines()
        for engine in self.engines.values():
            engine.dp_rank = None
        self.registered = list(self.engines.values())
        if not self.scheduler.running:
            self.restart_scheduler()
        self.scheduler.send(signal.SIGCONT)
        self.wait_for_engines()

    def restart_scheduler(self) -> None:
        self.scheduler.finish(0)
        self.scheduler.start()

    def wait_for_engines(self) -> None:
        """Until the scheduler knows exactly the engines that send heartbeats."""
        deadline_s = time.monotonic() + WAIT_S
        expected = {engine.name for engine in self.registered}
        with SchedulerClient(self.scheduler_address) as client:
            while True:
                try:
                    known = {entry.engine.engine_id for entry in client.status(1.0).engines}
                except TimeoutError:
                    known = set()
                if known == expected:
                    return
                assert time.monotonic() < deadline_s, f"the scheduler knows {known}, not {expected}"
                time.sleep(0.05)

    def placing_router(self) -> Router:
        """With placement by the scheduler, and health checks that notice within seconds."""
        return self._up("placing")

    def strict_router(self) -> Router:
        """The same for `p0` and `d0`, while `p1` and `d1` may join, with a short time limit, no second
        attempts, small bodies, and a proxy in its environment that nobody can reach."""
        return self._up("strict")

    def upstream_router(self) -> Router:
        """mini_lb as SGLang ships it."""
        return self._up("mini_lb")

    def rust_router(self) -> Router:
        return self._up("rust")

    def _up(self, name: str) -> Router:
        self.wait_until_up(self._routers[name])
        return self._routers[name]

    def _start_routers(self) -> dict[str, Router]:
        """All at once: each needs seconds, because `sglang_router` imports SGLang."""
        pair = [self.p0, self.d0]
        placing = (
            "--mini-lb",
            f"--dualpath-scheduler={self.scheduler_address}",
            "--health-check-interval-secs=1",
            "--health-check-timeout-secs=1",
            "--health-failure-threshold=2",
            "--health-success-threshold=1",
            "--enable-trace",
            f"--otlp-traces-endpoint={self._collector.address}",
        )
        everyone = list(self.engines.values())
        return {
            "placing": self._start_router(everyone, *placing),
            "strict": self._start_router(
                pair,
                *placing,
                "--request-timeout-secs=2",
                "--disable-retries",
                f"--max-payload-size={STRICT_BODY_BYTES}",
                f"--dualpath-engine-url-prefix={self.p1.url}",
                f"--dualpath-engine-url-prefix={self.d1.url}",
                environment=NO_WAY_OUT,
            ),
            "mini_lb": self._start_router(pair, "--mini-lb"),
            "rust": self._start_router(
                pair, "--worker-startup-check-interval=1", f"--prometheus-port={_ports.take()}"
            ),
        }

    def spans(self, answer: Answer, *wanted: str) -> dict[str, list[Span]]:
        """The spans of a request by `service name/span name`, once the wanted ones are there.

        Name one as often as there must be of it: exports end anywhere between two spans of a trace.
        """
        while True:
            found: dict[str, list[Span]] = {}
            for service, span in self._spans:
                if span.trace_id.hex() == answer.trace_id:
                    found.setdefault(f"{service}/{span.name}", []).append(span)
            if all(len(found.get(name, ())) >= count for name, count in Counter(wanted).items()):
                return found
            self._spans.append(self._collector.next_span())

    def placed_by(self, answer: Answer) -> str:
        """Who chose the engines in the end."""
        (route,) = self.spans(answer, "dualpath-router/route")["dualpath-router/route"]
        return attributes(route)["dualpath.placed_by"]

    def wait_until_placed(self, router: Router) -> None:
        """Until the router gets its placements from the scheduler; the requests it took are forgotten."""
        deadline_s = time.monotonic() + WAIT_S
        while self.placed_by(router.ask()) != "scheduler":
            assert time.monotonic() < deadline_s, router.process.tail()
            time.sleep(0.05)
        self.mend_engines()

    def wait_until_served(self, router: Router) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while router.ask().status != 200:
            assert time.monotonic() < deadline_s, router.process.tail()
            time.sleep(0.1)

    def wait_until_any_seen(self, role: Role) -> FaultyEngine:
        """The first engine of the role that got a request."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            for engine in self.of(role):
                if engine.seen:
                    return engine
            assert time.monotonic() < deadline_s, f"no {role} engine got a request"
            time.sleep(0.01)

    def _start_router(
        self, engines: list[FaultyEngine], *options: str, environment: Mapping[str, str] | None = None
    ) -> Router:
        port = _ports.take()
        listed = []
        for engine in engines:
            if engine.role is Role.PREFILL:
                listed += ["--prefill", engine.url, "9000"]
            else:
                listed += ["--decode", engine.url]
        process = self._process(
            f"router-{port}",
            "sglang_router.launch_router",
            "--pd-disaggregation",
            *listed,
            "--host=127.0.0.1",
            f"--port={port}",
            *options,
            environment=environment,
        )
        process.start()
        places = any(option.startswith("--dualpath-scheduler") for option in options)
        return Router(f"http://127.0.0.1:{port}", process, places)

    def wait_until_up(self, router: Router) -> None:
        """Until it listens and every engine has passed its checks again."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            assert router.process.running, router.process.tail()
            assert time.monotonic() < deadline_s, router.process.tail()
            try:
                if not router.places and router.get("/health").status == 200:
                    return
                if router.places and all(engine["up"] for engine in router.get("/readiness").json["engines"]):
                    return
            except OSError:
                pass
            time.sleep(0.05)

    def _process(
        self, name: str, module: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> ManagedProcess:
        argv = [sys.executable, "-m", module, *arguments]
        process = ManagedProcess(name, argv, os.environ | (environment or {}), self._folder / f"{name}.log")
        self._processes.append(process)
        return process

    def _beat(self) -> None:
        with SchedulerClient(self.scheduler_address) as client:
            while not self._stopping.wait(HEARTBEAT_S):
                for engine in list(self.registered):
                    client.send(Heartbeat(engine=engine.described(), load=Workload()))
