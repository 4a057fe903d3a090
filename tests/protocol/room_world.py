"""Two requests on one PE and two DEs: `Cluster`, `ControlChannel`, `PrefillSide`, `DecodeSide` and `PageServer` as they are.

Played: ZeroMQ, SGLang, and both lanes, whose protocols have worlds of their own (pull_world.py, ring_world.py).
"""

from __future__ import annotations

import sys
import threading
import types
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue

import pull_world
import pytest
from opentelemetry.trace import NoOpTracer
from played_network import Quiet, Wire, no_faults
from played_time import CLOCK, Letters
from pull_world import Controller, Operation, PrefetchAck

from dualpath_sgl import decode, room_reports
from dualpath_sgl.control import channel, link
from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.decode import DecodeSide
from dualpath_sgl.lanes.loads import Loads
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.prefill import PrefillSide
from dualpath_sgl.request_state import PrefillState
from dualpath_sgl.restore import RestoreGuard
from dualpath_sgl.room_reports import RoomReports
from scheduler_svc.ledger.engines import EngineTable
from scheduler_svc.ledger.rooms import ROOM_TTL_S, RoomTable
from scheduler_svc.policies.path_policies import path_policy
from scheduler_svc.policies.placement_policies import placement_policy
from scheduler_svc.state import Cluster
from scheduler_svc.telemetry.faults import Faults
from scheduler_svc.wire.protocol import RankInfo, Role, Workload, decode_request, encode

PAGES = 2
"""That the store has of each prompt."""
LONG_S = 6
"""No plan comes after so long, no lease holds, and no request is held back."""
PATIENCE_S = 3.0
SETTLING_STEPS = 60


@dataclass(frozen=True)
class Plot:
    rooms: tuple[int, ...] = (0,)
    """The DE of each request."""
    faults: tuple[str, ...] = ()
    """Kinds that may happen: lose, again, late, restart (the scheduler), abort, leave, revoke, decline, short, silent."""
    most_faults: int = 0
    longs: int = 0
    at_once: bool = False
    """Messages arrive when they are sent, SGLang has host memory when it needs some, and takes what it may."""
    held: int = 0
    """Pages that a DE has of each prompt."""


class SchedulerWire(Wire):
    def recv(self) -> bytes:
        return self.recv_multipart()[0]


class Channel(ControlChannel):
    def _new_socket(self) -> SchedulerWire:
        return SchedulerWire()

    def start(self) -> None:
        pass


class StoreLane:
    """Reads when the world says so."""

    def __init__(self) -> None:
        self.parts: list[tuple[PageLoad, int, int]] = []

    def submit(self, load: PageLoad, first: int, end: int) -> None:
        load.open_part("store", first, end)
        self.parts.append((load, first, end))

    def take_over(self, load: PageLoad, first: int, end: int, reason: str) -> None:
        load.fallback_reason = load.fallback_reason or reason
        self.submit(load, first, end)


class Prefix:
    """What a DE holds of a prompt."""

    node = 0

    def __init__(self, tokens: int) -> None:
        self.tokens = self.matched_tokens = tokens

    def host_indices(self) -> list[int]:
        return list(range(self.tokens))

    def lock(self, tree: Tree):
        tree.locks += 1

        def unlock() -> None:
            tree.locks -= 1

        return unlock


class Tree:
    """SGLang's, of a DE: its prefetches."""

    hicache_storage_pass_prefix_keys = False
    tree_core = types.SimpleNamespace(is_eagle=False)

    def __init__(self, engine: Decode, held: int) -> None:
        self.engine = engine
        self.held = held
        self.locks = 0
        self.prefetches: dict[str, Operation] = {}
        self.taken: set[str] = set()
        self.over: list[Operation] = []

    def get_last_hash_value(self, _node: int) -> None:
        return None

    def prefetch_from_storage(self, handle: str, *_anything: object, **_named: object) -> None:
        if self.engine.declines:
            self.engine.declines = False
            return
        self.prefetches[handle] = Operation(int(handle), PAGES - self.held, self.held)

    def has_ongoing_prefetch(self, handle: str) -> bool:
        return handle in self.prefetches

    def check_prefetch_progress(self, handle: str) -> bool:
        operation = self.prefetches.get(handle)
        if operation is not None and self.engine.controller.has_back(operation):
            self.end(handle)
        return handle not in self.prefetches

    def end(self, handle: str) -> None:
        """It takes or frees the pages."""
        self.engine.side.give_back(handle)
        assert not self.engine.server.offers(int(handle)), "SGLang takes pages that are still offered"
        self.over.append(self.prefetches.pop(handle))

    def pop_prefetch_loaded_tokens(self, _handle: str) -> None:
        pass

    def finish(self, handle: str, _outcome: object) -> None:
        if handle in self.prefetches:
            self.prefetches[handle].stopped = True
            self.end(handle)


class Pages(Controller):
    """SGLang's controller, and what it has been told."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[PrefetchAck] = []

    def has_back(self, operation: Operation) -> bool:
        while not self.prefetch_sync_queue.empty():
            self.words.append(self.prefetch_sync_queue.get())
        return sum(word.completed_req and word.operation is operation for word in self.words) > 0


class Engine:
    def __init__(self, name: str, role: Role, plan_timeout_s: float = PATIENCE_S) -> None:
        self.name = name
        number = int(name[1:]) + (4 if role is Role.DECODE else 0)
        self.info = RankInfo(
            engine_id=name, role=role, rank=0, tp_size=1, url=f"http://127.0.0.1:{3000 + number}",
            page_endpoint=f"tcp://127.0.0.1:{number}" if role is Role.DECODE else None,
            fingerprint="layout", page_size=1, page_bytes=1,
        )  # fmt: skip
        self.channel = Channel("tcp://127.0.0.1:1", self.info)
        self.wire: SchedulerWire = self.channel._socket
        self.controller = Pages()
        self.store = StoreLane()
        self.loads = Loads(self.store, 1)
        self.reports = RoomReports(
            engine_id=name, role=role, rank=0, control=self.channel, plan_timeout_s=plan_timeout_s,
            tracer=NoOpTracer(),
        )  # fmt: skip

    def speaks(self) -> None:
        for order in self.channel._mailbox.drain():
            self.channel._pass_on(self.wire, order)

    def hears(self, data: bytes) -> None:
        self.wire.inbox.append([data])
        self.channel._receive(self.wire)


class Prefill(Engine):
    def __init__(self, world: RoomWorld) -> None:
        super().__init__("p0", Role.PREFILL)
        self._world = world
        self.pulls: dict[int, tuple[PageLoad, int, int]] = {}
        """By room: load, pages, and number of the DE."""
        self.side = PrefillSide(
            rank=0, page_size=1, reports=self.reports, loads=self.loads, store_lane=self.store, peer_lanes=self,
            left=lambda: None,
        )  # fmt: skip
        self.channel.serve(Workload, self.side.on_plan, self.side.on_no_plan)
        self.operations: dict[int, Operation] = {}
        """By request, from the moment SGLang has looked at the store."""
        self.given: set[int] = set()
        """Those that have host memory, or get none."""

    # As peer lanes

    def submit(self, _endpoint: str, engine: str, load: PageLoad, room: int, end: int, _hash: str) -> None:
        load.open_part("peer", 0, end)
        self.pulls[room] = load, end, int(engine[1:])

    def let_go(self, _endpoint: str, engine: str, room: int) -> None:
        self._world.decodes[int(engine[1:])].server.withdraw(room)


class Decode(Engine):
    def __init__(self, number: int, held: int) -> None:
        super().__init__(f"d{number}", Role.DECODE)
        self.tree = Tree(self, held)
        self.declines = False
        self.server = PageServer("127.0.0.1", "nowhere", "layout", LONG_S / 2, LONG_S / 2)
        self.side = DecodeSide(
            tp_size=1, pool=types.SimpleNamespace(page_size=1), reports=self.reports, loads=self.loads,
            store_lane=self.store, server=self.server, restores=RestoreGuard(NoOpTracer()), left=lambda: None,
        )  # fmt: skip
        self.channel.serve(Workload, self.side.on_plan, self.side.on_no_plan)
        self.queue = types.SimpleNamespace(queue=[], tree_cache=self.tree)


def play(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for all that the world plays."""
    pull_world.play(monkeypatch)
    for module in (decode, room_reports, link):
        monkeypatch.setattr(module, "time", CLOCK)
    monkeypatch.setattr(link, "Mailbox", Letters)
    monkeypatch.setattr(link, "LimitedLog", Quiet)
    monkeypatch.setattr(link, "logger", Quiet())
    monkeypatch.setattr(decode, "logger", Quiet())
    monkeypatch.setattr(channel, "LimitedLog", Quiet, raising=False)
    monkeypatch.setattr(decode, "longest_hold_s", lambda: LONG_S / 2)
    monkeypatch.setattr(decode, "held_on_host", lambda tree, req: Prefix(tree.held))
    monkeypatch.setattr(decode, "page_blocks", lambda pool, indices: ([(int(i),) for i in indices], (1,)))
    monkeypatch.setattr(Faults, "record", no_faults)
    outcomes = types.SimpleNamespace(CacheRequestOutcome=types.SimpleNamespace(ABORT=0))
    monkeypatch.setitem(sys.modules, "sglang.srt.mem_cache.base_prefix_cache", outcomes)


class RoomWorld:
    unseen = frozenset(
        {
            "_log", "_keys", "_noise", "req", "_tracer", "lane_work", "_policy", "faults", "helping", "work", "_ticks",
            "_engine", "_address", "_words", "_workload", "_on_helpers", "loads", "_loads", "_reports", "_world", "channel",
            "controller", "_store_lane", "store", "paths", "fallbacks", "_on_lanes_done", "_hold", "_on_prefix", "words",
            "_last_workload", "_peer_lanes", "_by_age", "totals",
        }
    )  # fmt: skip
    opaque = (type(threading.Lock()), threading.Event, Quiet, SimpleQueue, Tree, RestoreGuard, PageServer)

    def __init__(self, plot: Plot) -> None:
        CLOCK.reset()
        self.plot = plot
        self.faults_left, self.longs = plot.most_faults, plot.longs
        self.decodes = [Decode(number, plot.held) for number in range(2)]
        self.prefill = Prefill(self)
        self.engines: dict[str, Engine] = {"p0": self.prefill, "d0": self.decodes[0], "d1": self.decodes[1]}
        self.answers: dict[str, deque[bytes]] = {name: deque() for name in self.engines}
        """Of the scheduler, on their way."""
        self.plans: dict[tuple[int, int], object] = {}
        """By the scheduler's life and room."""
        self.life = 0
        self.cluster = self.new_cluster()
        self.arrived: set[tuple[str, int]] = set()
        self.reads: Counter[tuple[int, int]] = Counter()
        """By request and page, how often the store was read."""
        for name, engine in self.engines.items():
            self.connect(name, engine)
        self.requests = [
            types.SimpleNamespace(
                rid=str(index), bootstrap_room=index, origin_input_ids=[0] * (PAGES + 1), extra_key=None,
                cache_salt=None, cache_request_handle=str(index),
                time_stats=types.SimpleNamespace(trace_ctx=types.SimpleNamespace(tracing_enable=False)),
            )
            for index in range(len(plot.rooms))
        ]  # fmt: skip

    @staticmethod
    def new_cluster() -> Cluster:
        return Cluster(
            path_policy("decode"), placement_policy("round_robin"), started_s=-60.0, engines=EngineTable(),
            rooms=RoomTable(),
        )  # fmt: skip

    def connect(self, name: str, engine: Engine) -> None:
        """A connection, a heartbeat, and its answer."""
        engine.channel._beat(engine.wire)
        while engine.wire.sent:
            self.scheduler_hears(name, engine.wire.sent.popleft()[0])
        while self.answers[name]:
            engine.hears(self.answers[name].popleft())

    def roots(self) -> object:
        return [
            (CLOCK.now_s, self.faults_left, self.longs, self.life, sorted(self.arrived), sorted(self.reads.items())),
            (self.cluster.engines._live, self.cluster.rooms._open, self.cluster.rooms._closed),
            self.answers, sorted(self.prefill.operations), sorted(self.prefill.given),
            [
                (
                    engine.wire.sent, engine.channel._mailbox, engine.channel.connected, engine.channel._unanswered,
                    [(_load_state(load), first, end) for load, first, end in engine.store.parts],
                )
                for engine in self.engines.values()
            ],
            [_request(request) for request in self.prefill.side._by_rid.values()],
            [(_load_state(load), end, number) for load, end, number in self.prefill.pulls.values()],
            [
                (
                    [(_request(request), request.received) for request in each.side._requests.values()],
                    sorted(each.side._rooms), sorted(each.side._late), sorted(each.side._loading_rooms),
                    len(each.side._unlocks), each.tree.locks, sorted(each.tree.prefetches), sorted(each.tree.taken),
                    [entry.req.rid for entry in each.queue.queue], each.declines,
                    [(room, len(offer.pages), offer.ended) for room, offer in each.server._offers.items()],
                    list(each.server._withdrawn),
                )
                for each in self.decodes
            ],
        ]  # fmt: skip

    # -- what can happen

    def actions(self) -> Iterator[str]:
        for name, engine in self.engines.items():
            if not engine.channel._mailbox.empty:
                yield f"speaks {name}"
            if engine.wire.sent:
                yield f"to-scheduler {name}"
            if self.answers[name]:
                yield f"from-scheduler {name}"
            yield from (f"store {name} {index}" for index in range(len(engine.store.parts)))
        for index, number in enumerate(self.plot.rooms):
            yield from self.of_prefill(index)
            yield from self.of_decode(index, self.decodes[number])
        yield from (
            f"pulled {room}" for room, pull in self.prefill.pulls.items() if self.may_end(room, pull[2])
        )
        for number in sorted(set(self.plot.rooms)):
            if self.decodes[number].side._requests or self.decodes[number].side._unlocks:
                yield f"ticks {number}"
            if CLOCK.moved and self.decodes[number].server._offers:
                yield f"expires {number}"
        if CLOCK.moved and any(
            each.state is PrefillState.WAITING for each in self.prefill.side._by_rid.values()
        ):
            yield "overdue"
        if self.longs:
            yield "long"
        if self.faults_left:
            yield from self.possible_faults()

    def of_prefill(self, index: int) -> Iterator[str]:
        prefill = self.prefill
        if ("p", index) not in self.arrived:
            yield f"p-arrives {index}"
        elif index not in prefill.operations:
            if prefill.side.holds(str(index)):
                yield f"p-hits {index}"
        elif index not in prefill.given:
            yield f"p-memory {index}"
        elif prefill.side.holds(str(index)) and prefill.controller.has_back(prefill.operations[index]):
            yield f"p-over {index}"

    def of_decode(self, index: int, engine: Decode) -> Iterator[str]:
        request = engine.side._requests.get(str(index))
        if ("d", index) not in self.arrived:
            yield f"d-arrives {index}"
        prefetch = engine.tree.prefetches.get(str(index))
        if prefetch is not None and str(index) not in engine.tree.taken:
            yield f"d-memory {index}"
        queued = any(entry.req.rid == str(index) for entry in engine.queue.queue)
        if queued and request is not None and request.state.admissible:
            yield f"d-admits {index}"

    def may_end(self, room: int, number: int) -> bool:
        """The DE has offered all that there will be."""
        offer = self.decodes[number].server._offers.get(room)
        return offer is not None and (offer.ended or len(offer.pages) == PAGES)

    def possible_faults(self) -> Iterator[str]:
        kinds = self.plot.faults
        for name, engine in self.engines.items():
            for way, link_ in (("to", engine.wire.sent), ("from", self.answers[name])):
                for kind in ("lose", "again", "late"):
                    if kind in kinds and len(link_) > (kind == "late"):
                        yield f"{kind} {way} {name}"
            if "short" in kinds:
                yield from (f"short {name} {index}" for index in range(len(engine.store.parts)))
        if "restart" in kinds:
            yield "restart"
        for index, number in enumerate(self.plot.rooms):
            engine = self.decodes[number]
            if "abort" in kinds and self.prefill.side.holds(str(index)):
                yield f"abort {index}"
            if "leave" in kinds and any(entry.req.rid == str(index) for entry in engine.queue.queue):
                yield f"leave {index}"
            if "revoke" in kinds:
                if index in self.prefill.operations and index not in self.prefill.given:
                    yield f"revoke p {index}"
                if str(index) in engine.tree.prefetches and str(index) not in engine.tree.taken:
                    yield f"revoke d {index}"
            if "decline" in kinds and not engine.declines and ("d", index) in self.arrived:
                yield f"decline {index}"
        if "silent" in kinds:
            yield from (f"silent {room}" for room in self.prefill.pulls)

    def do(self, action: str) -> None:
        what, *arguments = action.split()
        self.faults_left -= what in self.plot.faults
        getattr(self, what.replace("-", "_"))(*arguments)
        while self.plot.at_once:
            self.deliver()
            following = [
                action
                for index, number in enumerate(self.plot.rooms)
                for action in (*self.of_prefill(index), *self.of_decode(index, self.decodes[number]))
                if not action.startswith(("p-arrives", "d-arrives"))
            ]
            if not following:
                break
            what, *arguments = following[0].split()
            getattr(self, what.replace("-", "_"))(*arguments)

    def deliver(self) -> None:
        for name, engine in self.engines.items():
            engine.speaks()
            while engine.wire.sent:
                self.to_scheduler(name)
        for name in self.engines:
            while self.answers[name]:
                self.from_scheduler(name)

    def speaks(self, name: str) -> None:
        self.engines[name].speaks()

    def to_scheduler(self, name: str) -> None:
        self.scheduler_hears(name, self.engines[name].wire.sent.popleft()[0])

    def scheduler_hears(self, name: str, data: bytes) -> None:
        result = self.cluster.handle(decode_request(data), CLOCK.now_s, name.encode())
        if result.reply is not None:
            self.answers[name].append(encode(result.reply))
        for key, plan in result.pushes:
            self.answers[key.engine_id].append(encode(plan))
            first = self.plans.setdefault((self.life, plan.room), plan)
            assert plan == first, "a room has two plans"

    def from_scheduler(self, name: str) -> None:
        self.engines[name].hears(self.answers[name].popleft())

    def store(self, name: str, index: str) -> None:
        load, first, end = self.engines[name].store.parts.pop(int(index))
        self.reads.update((load.operation.index, load.first_page + page) for page in range(first, end))
        load.land(first, end)
        load.close_part()

    def p_arrives(self, index: str) -> None:
        self.arrived.add(("p", int(index)))
        self.prefill.side.begin(self.requests[int(index)])
        self.prefill.side.matched(index, 0)

    def p_hits(self, index: str) -> None:
        operation = self.prefill.operations[int(index)] = Operation(int(index), PAGES)
        self.prefill.side.hits_known(operation, PAGES, 1)

    def p_memory(self, index: str) -> None:
        self.prefill.given.add(int(index))
        self.prefill.side.take_operation(self.prefill.controller, self.prefill.operations[int(index)])

    def p_over(self, index: str) -> None:
        self.prefill.side.forget(index)

    def d_arrives(self, index: str) -> None:
        self.arrived.add(("d", int(index)))
        engine, request = self.decodes[self.plot.rooms[int(index)]], self.requests[int(index)]
        engine.queue.queue.append(types.SimpleNamespace(req=request))
        engine.side.add(engine.queue, request)

    def d_memory(self, index: str) -> None:
        engine = self.decodes[self.plot.rooms[int(index)]]
        engine.tree.taken.add(index)
        engine.side.take_operation(engine.controller, engine.tree.prefetches[index])

    def d_admits(self, index: str) -> None:
        engine = self.decodes[self.plot.rooms[int(index)]]
        engine.queue.queue = [entry for entry in engine.queue.queue if entry.req.rid != index]

    def ticks(self, number: str) -> None:
        """An iteration of SGLang's scheduler, which first takes what its prefetches have brought."""
        engine = self.decodes[int(number)]
        for handle in list(engine.tree.prefetches):
            engine.tree.check_prefetch_progress(handle)
        engine.side.tick(engine.queue)

    def expires(self, number: str) -> None:
        self.decodes[int(number)].server._turn()

    def overdue(self) -> None:
        self.prefill.side.start_overdue()

    def pulled(self, room: str) -> None:
        """The peer lane has brought what was offered; the rest comes from the store."""
        load, end, number = self.prefill.pulls.pop(int(room))
        server = self.decodes[number].server
        offered = len(server._offers[int(room)].pages)
        load.land(0, offered)
        if offered < end:
            self.prefill.store.take_over(load, offered, end, "peer offered too few pages")
        server.withdraw(int(room))
        load.close_part()

    def long(self) -> None:
        self.longs -= 1
        self.time_passes(LONG_S)

    def time_passes(self, seconds: int) -> None:
        """Heartbeats come meanwhile."""
        for _ in range(seconds):
            CLOCK.now_s += 1.0
            for name, engine in self.engines.items():
                self.cluster.handle(engine.channel._heartbeat(hello=False), CLOCK.now_s, name.encode())

    # -- what can go wrong

    def link(self, way: str, name: str) -> deque:
        return self.engines[name].wire.sent if way == "to" else self.answers[name]

    def lose(self, way: str, name: str) -> None:
        self.link(way, name).popleft()

    def again(self, way: str, name: str) -> None:
        link = self.link(way, name)
        link.append(link[0])

    def late(self, way: str, name: str) -> None:
        link = self.link(way, name)
        link.append(link.popleft())

    def restart(self) -> None:
        """The scheduler dies, and another one takes its place."""
        self.life += 1
        self.cluster = self.new_cluster()
        for name, engine in self.engines.items():
            engine.wire.sent.clear()
            self.answers[name].clear()
            engine.channel._lose()
        for name, engine in self.engines.items():
            self.connect(name, engine)

    def abort(self, index: str) -> None:
        """The client has left, and the PE drops its request."""
        if int(index) in self.prefill.operations:
            self.prefill.operations[int(index)].stopped = True
        self.prefill.given.add(int(index))
        self.prefill.side.forget(index, aborted=True)

    def leave(self, index: str) -> None:
        """The DE drops it."""
        self.d_admits(index)

    def revoke(self, side: str, index: str) -> None:
        """SGLang has no host memory for it."""
        if side == "p":
            self.prefill.given.add(int(index))
            self.prefill.side.revoked(index, "no host memory")
            self.prefill.side.forget(index)
        else:
            engine = self.decodes[self.plot.rooms[int(index)]]
            engine.tree.end(index)

    def decline(self, index: str) -> None:
        self.decodes[self.plot.rooms[int(index)]].declines = True

    def short(self, name: str, index: str) -> None:
        """The store brings nothing."""
        self.engines[name].store.parts.pop(int(index))[0].close_part()

    def silent(self, room: str) -> None:
        """The PE hears nothing from the DE."""
        load, end, _ = self.prefill.pulls.pop(int(room))
        self.prefill.store.take_over(load, 0, end, "peer silent")
        load.close_part()

    # -- what must hold

    def check(self) -> None:
        charged: Counter[int] = Counter()
        for rooms in (self.cluster.rooms._open, self.cluster.rooms._closed):
            for room in rooms.values():
                for side in room.sides.values():
                    for rank, amount in side.charges.values():
                        charged[id(rank)] += amount
        for state in self.cluster.engines._live.values():
            for rank in state.ranks.values():
                assert rank.planned_bytes == charged[id(rank)], "planned bytes are nobody's"
        assert self.cluster.errors == 0 or self.plot.faults, (
            "the scheduler refuses a message without any fault"
        )
        if self.faults_left == self.plot.most_faults and self.longs == self.plot.longs:
            twice = [page for page, times in self.reads.items() if times > 1]
            assert not twice, f"read twice: {twice}"

    def at_rest(self) -> bool:
        return not (
            self.prefill.side.held
            or any(each.side.held or each.side._loading_rooms or each.queue.queue for each in self.decodes)
            or any(self.answers.values())
            or any(
                len(each.loads.open) or each.wire.sent or not each.channel._mailbox.empty
                for each in self.engines.values()
            )
        )

    def settle(self) -> None:
        for step in range(SETTLING_STEPS):
            self.deliver()
            for name, engine in self.engines.items():
                while engine.store.parts:
                    self.store(name, "0")
            for index in range(len(self.plot.rooms)):
                for action in (
                    *self.of_prefill(index),
                    *self.of_decode(index, self.decodes[self.plot.rooms[index]]),
                ):
                    if not action.endswith("arrives"):
                        self.do(action)
            for room, (_, _, number) in list(self.prefill.pulls.items()):
                if self.may_end(room, number):
                    self.pulled(str(room))
                elif step > SETTLING_STEPS // 3:
                    self.silent(str(room))
            for number in (0, 1):
                self.ticks(str(number))
                self.expires(str(number))
            self.overdue()
            self.check()
            if self.at_rest():
                break
            if step > 4:
                self.time_passes(1)
        assert not self.prefill.side.held, "the PE holds a request"
        for engine in self.decodes:
            assert not engine.side.held, "the DE holds a request"
            assert not engine.tree.locks, "pages stay locked"
            assert not engine.side._loading_rooms, "a room stays taken"
            assert not engine.queue.queue, "a request is never admitted"
        for engine in self.engines.values():
            assert not len(engine.loads.open), "a load stays open"
            assert not engine.channel._unanswered, "a report waits for ever"
        self.cluster.rooms.expire(CLOCK.now_s + 2 * ROOM_TTL_S)
        assert not self.cluster.rooms.open_count
        for state in self.cluster.engines._live.values():
            assert not any(rank.planned_bytes for rank in state.ranks.values()), "bytes stay planned"


def _request(request: object) -> object:
    load = request.page_load
    return (
        request.room, request.state, request.plan, request.refused, request.reported_s, request.fallback_reason,
        load and _load_state(load),
    )  # fmt: skip


def _load_state(load: PageLoad) -> object:
    return (
        load.operation.index, load.prefix, bytes(load._landed), load._open_parts, load.cancelled,
        load._acknowledged, load.fallback_reason,
    )  # fmt: skip
