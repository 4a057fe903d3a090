"""A whole simulated cluster: agents, scheduler, links and engines joined to one life of a request."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.common.imbalance import max_over_mean
from dualpath_sgl.evals.sim.model.decode import DecodeCosts, DecodeGroup
from dualpath_sgl.evals.sim.model.engines import Request, SimEngine
from dualpath_sgl.evals.sim.model.loop import EventLoop
from dualpath_sgl.evals.sim.model.prefill import PrefillCosts, PrefillGroup
from dualpath_sgl.evals.sim.model.relays import RelayLoads
from dualpath_sgl.evals.sim.model.scheduling import (
    PolicyScheduler,
    Scheduler,
    ServiceScheduler,
    path_of,
    placement_of,
)
from dualpath_sgl.evals.sim.model.setup import Setup
from dualpath_sgl.evals.sim.model.storage import Balance, StorageLink
from dualpath_sgl.evals.sim.model.workload import PAGE_TOKENS, Workload
from scheduler_svc.wire.protocol import Mode as EngineMode
from scheduler_svc.wire.protocol import RankInfo, Role

PROGRESS_TURNS = 2000
"""Turns between two calls of `progress`."""

Progress = Callable[[int], None]
"""Called with the number of turns finished since the last call."""


class TurnTimes(NamedTuple):
    """One finished turn."""

    arrived_s: float
    ttft_s: float
    """From its arrival to the end of its prefill."""
    tpot_s: float
    """Mean time of a token after the first; 0 when there was none."""


class Outcome(NamedTuple):
    """Seconds are simulated."""

    jct_s: float
    """Until the last agent was done."""
    turns: int
    ttft_s: float
    """Means over turns."""
    tpot_s: float
    storage_max_over_mean: float
    """Mean over windows in which something was read."""
    storage_max_over_mean_total: float
    """The same over the whole run's traffic."""
    attention_max_over_mean: float
    prefill_storage_busy: float
    """Share of the run in which an average PE node's link was busy."""
    decode_storage_busy: float
    store_read_bytes: int


class Simulation:
    """Build, then either `run_offline` once, or `start` agents yourself and run `loop`."""

    def __init__(self, setup: Setup, workload: Workload, progress: Progress = lambda turns: None) -> None:
        """Raises EvalError when the workload does not fit the engines' memory."""
        self.loop = EventLoop()
        self._setup = setup
        self._workload = workload
        self._progress = progress
        self._nic = math.inf if setup.mode.oracle else setup.hardware.compute_bytes_per_s
        self._build_engines()
        self._scheduler = self._build_scheduler()
        self._relays = RelayLoads(
            self.loop,
            self.prefill_engines,
            self.decode_links if setup.mode.relay else (),
            workload.page_bytes,
            self._scheduler.read_ended,
            self._loaded,
        )
        self.on_turn: Callable[[TurnTimes], None] | None = None
        self.on_all_done: Callable[[], None] | None = None
        """When no agent that was started has a turn left."""
        self.turns = 0
        self._agents_left = 0
        self._ttft_sum_s = 0.0
        self._tpot_sum_s = 0.0
        self._tpot_turns = 0

    def _build_engines(self) -> None:
        setup, hardware, model = self._setup, self._setup.hardware, self._setup.model
        kv_tokens = int(setup.kv_bytes(setup.decode_group) / model.kv_bytes_per_token)
        longest = self._workload.longest_tokens
        if longest > kv_tokens:
            raise EvalError(
                f"a turn of {longest} tokens does not fit a decode engine with memory for {kv_tokens} tokens "
                f"of {model.name}; give more decode nodes or shorter trajectories"
            )
        self.prefill_links, self.prefill_engines = self._nodes(Role.PREFILL, setup.prefill_nodes, None)
        self.decode_links, self.decode_engines = self._nodes(Role.DECODE, setup.decode_nodes, kv_tokens)
        fixed_s = hardware.layer_step_s * model.layers
        prefill_costs = PrefillCosts(
            fixed_s,
            hardware.attention_quota_s,
            self._nic,
            setup.mode.layerwise,
            setup.kv_bytes(setup.prefill_group),
            self._workload.page_bytes,
        )
        sequence_s = model.decode_sequence_s(self._workload.mean_context_tokens, hardware)
        decode_costs = DecodeCosts(fixed_s, sequence_s, self._nic)
        self._prefill_groups: list[PrefillGroup] = []
        self._prefill_group: dict[SimEngine, PrefillGroup] = {}
        for engines in _groups(self.prefill_engines, setup.prefill_group):
            self._prefill_groups.append(PrefillGroup(self.loop, engines, prefill_costs, self._prefilled))
            self._prefill_group |= dict.fromkeys(engines, self._prefill_groups[-1])
        self._decode_group: dict[SimEngine, DecodeGroup] = {}
        for engines in _groups(self.decode_engines, setup.decode_group):
            group = DecodeGroup(self.loop, engines, decode_costs, self._finished)
            self._decode_group |= dict.fromkeys(engines, group)

    def _nodes(
        self, role: Role, nodes: int, kv_tokens: int | None
    ) -> tuple[list[StorageLink], list[SimEngine]]:
        hardware, page_bytes = self._setup.hardware, self._workload.page_bytes
        links, engines = [], []
        for node in range(nodes):
            name = f"{role}-{node}"
            links.append(StorageLink(name, hardware.storage_bytes_per_s))
            for gpu in range(hardware.gpus_per_node):
                description = RankInfo(
                    engine_id=f"{name}-{gpu}",
                    role=role,
                    url=f"http://{name}:{30000 + gpu}",
                    page_endpoint=f"tcp://{name}:{31000 + gpu}" if role is Role.DECODE else None,
                    fingerprint=self._setup.model.name,
                    page_size=PAGE_TOKENS,
                    page_bytes=page_bytes,
                    mode=EngineMode.RELAY if self._setup.mode.relay else EngineMode.DECODE_SIDE,
                )
                engines.append(
                    SimEngine(
                        description, links[-1], page_bytes, self._workload.prefill_tokens_per_s, kv_tokens
                    )
                )
        return links, engines

    def _build_scheduler(self) -> Scheduler:
        setup = self._setup
        engines = self.prefill_engines + self.decode_engines
        placement, path = placement_of(setup.mode.placement, setup.seed), path_of(setup.mode.path)
        page_bytes = self._workload.page_bytes
        if setup.scheduler == "service":
            return ServiceScheduler(self.loop, engines, placement, path, page_bytes, setup.seed)
        return PolicyScheduler(engines, placement, path, page_bytes)

    # The life of a request

    def start(self, agent: int) -> None:
        """Agent `agent` of the workload begins its trajectory now."""
        self._agents_left += 1
        self._next_turn(agent, 0)

    def _next_turn(self, agent: int, index: int) -> None:
        turn = self._workload.agents[agent][index]
        hit_pages = 0 if self._setup.mode.oracle else turn.hit_pages
        planned = self._scheduler.plan(turn.prompt_tokens, hit_pages)
        request = Request(
            agent,
            index,
            turn,
            self.loop.now_s,
            planned.prefill,
            planned.decode,
            planned.split_page,
            planned.room,
            0,
            turn.attention_s,
            turn.experts_s,
        )
        if self._setup.mode.relay and hit_pages:
            self._relays.ask(request, hit_pages)
            return
        self._ask(request, planned.prefill.storage, hit_pages - planned.split_page)
        self._ask(request, planned.decode.storage, planned.split_page)
        if not request.reads:
            self._loaded(request)

    def _ask(self, request: Request, link: StorageLink, pages: int) -> None:
        if pages:
            bytes_ = pages * self._workload.page_bytes
            request.reads += 1
            self.loop.at(link.ask(bytes_, self.loop.now_s), self._read, (request, link, bytes_))

    def _read(self, argument: tuple[Request, StorageLink, int]) -> None:
        request, link, bytes_ = argument
        link.ended(bytes_)
        self._scheduler.read_ended(link, bytes_)
        request.reads -= 1
        if not request.reads:
            self._loaded(request)

    def _loaded(self, request: Request) -> None:
        self._scheduler.loaded(request)
        self._prefill_group[request.prefill].loaded(request)

    def _prefilled(self, request: Request) -> None:
        request.prefilled_s = self.loop.now_s
        self._scheduler.prefilled(request)
        self._decode_group[request.decode].prefilled(request)

    def _finished(self, request: Request) -> None:
        self._scheduler.finished(request)
        self._measure(request)
        if request.index + 1 < len(self._workload.agents[request.agent]):
            self._next_turn(request.agent, request.index + 1)
        else:
            self._agents_left -= 1
            if not self._agents_left and self.on_all_done:
                self.on_all_done()

    def _measure(self, request: Request) -> None:
        ttft_s = request.prefilled_s - request.arrived_s
        more_tokens = request.turn.output_tokens - 1
        tpot_s = (self.loop.now_s - request.decode_begun_s) / more_tokens if more_tokens else 0.0
        self.turns += 1
        self._ttft_sum_s += ttft_s
        if more_tokens:
            self._tpot_sum_s += tpot_s
            self._tpot_turns += 1
        if self.on_turn:
            self.on_turn(TurnTimes(request.arrived_s, ttft_s, tpot_s))
        if self.turns % PROGRESS_TURNS == 0:
            self._progress(PROGRESS_TURNS)

    # Runs

    def run_offline(self) -> Outcome:
        """All agents start at once (the paper's offline experiment); until the last one is done."""
        balance = Balance(self.loop, self.prefill_links + self.decode_links)

        def all_done() -> None:
            balance.is_open = False
            self.stop()

        self.on_all_done = all_done
        # Millions of short-lived objects and no cycles: the collector would only look at them again.
        gc.disable()
        try:
            for agent in range(len(self._workload.agents)):
                self.start(agent)
            self.loop.run()
        finally:
            gc.enable()
        self._progress(self.turns % PROGRESS_TURNS)
        return self._outcome(balance)

    def stop(self) -> None:
        self._scheduler.stop()
        self.loop.stopped = True

    def _outcome(self, balance: Balance) -> Outcome:
        jct_s = self.loop.now_s
        links = self.prefill_links + self.decode_links
        rate = self._setup.hardware.storage_bytes_per_s
        attention_s = sum(group.mean_attention_s for group in self._prefill_groups)
        read = [link.read_bytes for link in links]
        return Outcome(
            jct_s,
            self.turns,
            self._ttft_sum_s / self.turns,
            self._tpot_sum_s / max(1, self._tpot_turns),
            fmean(balance.ratios) if balance.ratios else 1.0,
            max_over_mean(read) if any(read) else 1.0,
            sum(group.longest_attention_s for group in self._prefill_groups) / attention_s,
            fmean(link.read_bytes for link in self.prefill_links) / rate / jct_s,
            fmean(link.read_bytes for link in self.decode_links) / rate / jct_s,
            sum(read),
        )


def _groups(engines: Sequence[SimEngine], size: int) -> list[list[SimEngine]]:
    return [list(engines[first : first + size]) for first in range(0, len(engines), size)]
