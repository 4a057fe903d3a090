"""A storm on SGLang's real tree: many requests, small pools, and a fate for each, all drawn from one seed.

One engine is real (tree_story.py), the other one a peer with a real page server or lane.  The storm is
SGLang's loop, on the test's thread: every turn it makes one iteration of SGLang's own work and moves some
requests one step on, in an order by chance.  A request's two halves are generators: `yield` means "some other
time".
"""

from __future__ import annotations

import itertools
import random
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator

import torch
from data_path_world import page_numbers
from sglang.srt.managers.schedule_batch import Req
from storm_forwarder import StormForwarder
from tree_story import STEP_S, Engine, Peer

from dualpath_sgl import decode, request_state, room_reports
from dualpath_sgl.lanes import store_lane
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.pools.prompt_hash import prompt_hash
from scheduler_svc.wire.protocol import Outcome

REQUESTS = 60
AT_ONCE = 8
MOST_PAGES = 9
MOST_OWN_PAGES = 3
DOCUMENTS = 10
"""Beginnings that prompts share."""
CALM_S = 30.0
"""A storm in which nothing has ended for so long is stuck; what it leaves behind is gone by then."""
FOREIGN = -1.0

FATES = ("well",) * 5 + (
    "ends early", "taken back", "never offered", "stalls", "never asked", "asks late", "asks late", "no plan",
    "late plan", "aborted", "aborted", "aborted", "duplicate room", "duplicate room", "stranger",
)  # fmt: skip
WEATHER = ("flush", "foreign writes", "squeeze", "squeeze", "other work", "transfers")
"""What happens to the whole engine, now and then."""


class Storm:
    """`run` it once.  `wrong` says what was seen that must not be."""

    def __init__(self, build, role: str, seed: int) -> None:
        self.chance = random.Random(f"{role} {seed}")
        pick = self.chance.choice
        self.policy = pick(["wait_complete", "wait_complete", "timeout", "best_effort"])
        StormForwarder.chance = random.Random(seed)
        self.engine: Engine = build(
            role,
            policy=self.policy,
            core=pick(["python", "rust"]),
            page_tokens=pick([4, 16]),
            eagle=pick([False, False, True]),
            host_pages=pick([32, 64]),
            # Nobody here reserves device memory for restores, as SGLang does: there is enough for all.
            device_pages=(AT_ONCE + 1) * (MOST_PAGES + MOST_OWN_PAGES),
            forwarder=StormForwarder,
            settings=dict(plan_timeout_s=0.3, peer_timeout_s=1.0, lease_s=1.0, subscribe_timeout_s=0.5),
            extra_config={"prefetch_timeout_base": pick([0.02, 0.1]), "prefetch_timeout_per_ki_token": 0.0},
        )
        self.peer = Peer(
            self.engine,
            pages=80,
            forwarder=StormForwarder,
            peer_timeout_s=1.0,
            lease_s=1.0,
            subscribe_timeout_s=0.5,
        )
        self.documents = [self._tokens(MOST_PAGES) for _ in range(DOCUMENTS)]
        self.prompts: list[array] = []
        self.requests: list[Request] = []
        self.wrong: list[str] = []
        self._foreign: list[tuple[torch.Tensor, int]] = []
        """Host pages of somebody else, and the turn in which he gives them back."""
        self._turn = self._flushes = 0
        self._seen, self._since_s = (0, 0), time.monotonic()
        self._spoil_store()
        self._spoil_callbacks()
        self._watch_states()

    # -- the weather ----------------------------------------------------------------------------

    def _spoil_store(self) -> None:
        """Reads of the store are small, slow, short, failing or raise."""
        for name in ("LEAST_BATCH_BYTES", "MOST_BATCH_BYTES"):
            setattr(store_lane, name, 2 * self.engine.runtime.page_bytes)
        luck = random.Random(self.chance.random())

        def before_read(_keys) -> None:
            time.sleep(luck.choice([0, 0, 0.002, 0.01, 0.05]))
            if luck.random() < 0.03:
                raise OSError("the store's client broke")

        self.engine.store.before_read = before_read
        self.engine.store.fails = lambda _key: luck.random() < 0.01

    def _spoil_callbacks(self) -> None:
        """What lanes, rooms and hooks call of ours raises now and then."""
        luck = random.Random(self.chance.random())
        for module, name in ((room_reports, "record_load"), (decode, "page_blocks")):
            setattr(module, name, _raising_at_times(getattr(module, name), luck))

    def _watch_states(self) -> None:
        """A move that no request makes is an exception, of which a storm has many: this one counts."""
        check = request_state._checked

        def checked(allowed, now, state):
            try:
                return check(allowed, now, state)
            except request_state.IllegalTransition as error:
                self.wrong.append(str(error))
                raise

        request_state._checked = checked

    def _weather(self, arriving: bool) -> None:
        kind = self.chance.choice(WEATHER)
        if kind == "flush" and self.chance.random() < 0.2:
            self._flush()
        elif kind == "foreign writes":
            free = self.engine.pool.available_size() // self.engine.page_tokens
            self._take(self.chance.randint(0, free // 2))
        elif kind == "squeeze":
            if self.chance.random() < 0.7:
                self.engine.evict_device()
            self.engine.evict_host()
            self._take(None)
        elif kind == "transfers":
            transfers = self.engine.sglang.scheduler.disagg_decode_transfer_queue
            transfers.holding = arriving and not transfers.holding
        elif kind == "other work" and self.prompts:
            tokens = self.chance.choice(self.prompts)
            self.engine.sglang.compute(tokens, self.engine.contents(tokens))

    def _take(self, pages: int | None) -> None:
        slots = self.engine.take_host_pages(pages)
        if len(slots):
            self._foreign.append((slots, self._turn + self.chance.choice([2, 5, 25])))

    def _give_back(self, everything: bool = False) -> None:
        keep = []
        for slots, until_turn in self._foreign:
            if not everything and self._turn < until_turn:
                keep.append((slots, until_turn))
                continue
            pages = self.engine.page_numbers(slots)
            if not torch.all(self.engine.pool.kv_buffer[:, pages] == FOREIGN):
                self.wrong.append("something was written into another one's pages")
            self.engine.controller.mem_pool_host.free(slots)
        self._foreign = keep

    def _flush(self) -> None:
        """As before a weight update: every request is aborted, then the cache is dropped."""
        self._flushes += 1
        for request in self.requests:
            request.abort()
        self._give_back(everything=True)
        if not self.engine.flush():
            self.wrong.append("no flush: SGLang never counted as idle")

    # -- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        while len(self.requests) < REQUESTS or any(request.open for request in self.requests):
            if self._is_stuck():
                break
            self._turn += 1
            self.engine.step()
            self._give_back()
            arriving = len(self.requests) < REQUESTS
            if self.chance.random() < 0.1:
                self._weather(arriving)
            under_way = [request for request in self.requests if request.open]
            if arriving and len(under_way) < AT_ONCE and self.chance.random() < 0.5:
                self._arrive()
            for request in self.chance.sample(under_way, len(under_way)):
                request.advance()
            time.sleep(STEP_S)
        self._give_back(everything=True)
        self._end()

    def _is_stuck(self) -> bool:
        under_way = [request for request in self.requests if request.open]
        if (len(self.requests), len(under_way)) != self._seen:
            self._seen, self._since_s = (len(self.requests), len(under_way)), time.monotonic()
        stuck = time.monotonic() > self._since_s + CALM_S
        self.wrong += [f"stuck: {request}" for request in under_way if stuck]
        return stuck

    def _tokens(self, pages: int) -> array:
        size = self.engine.page_tokens
        return array("q", [self.chance.randrange(10, 50_000) for _ in range(pages * size)])

    def _prompt(self) -> array:
        size, document = self.engine.page_tokens, self.chance.choice(self.documents)
        shared = self.chance.randint(1, MOST_PAGES)
        own = self.chance.choice([0, 0, 1, MOST_OWN_PAGES])
        return document[: shared * size] + self._tokens(own) + array("q", [1, 2])

    def _arrive(self) -> None:
        tokens = self._prompt()
        self.prompts.append(tokens)
        if self.chance.random() < 0.9:
            self.engine.store_holds(tokens, self.chance.choice([None, None, None, 4]))
        fate = self.chance.choice(FATES)
        others = self.requests[-AT_ONCE:] if fate == "duplicate room" else []
        room = self.chance.choice(others).req.bootstrap_room if others else None
        kind = OnPrefill if self.engine.sglang.role == "prefill" else OnDecode
        self.requests.append(kind(self, tokens, fate, room))

    def _end(self) -> None:
        engine = self.engine
        if not engine.within(CALM_S, lambda: engine.held == 0 and self._peer_is_idle()):
            self.wrong.append(f"held is {engine.held}, the peer is idle: {self._peer_is_idle()}")
        for request in self.requests:
            request.check()
        for tokens in self.prompts:
            if not all(engine.in_tree(tokens)):
                self.wrong.append("a page in the tree holds another one's bytes")
        self._check_store()
        if not engine.within(CALM_S, lambda: engine.unevictable() == (0, 0)):
            self.wrong.append(f"host and device pages that cannot be evicted: {engine.unevictable()}")
        free = engine.page_numbers(engine.take_host_pages())
        if sorted(free) != list(range(engine.pool.logical_size // engine.page_tokens)):
            self.wrong.append("a host page is free twice, or never")
        if not engine.runtime.store_lane.is_alive():
            self.wrong.append("the store lane has ended")

    def summary(self) -> str:
        """What the storm was made of, for a reader who wonders whether it was one."""
        dones = [done for request in self.requests for done in self.engine.dones(request.req)]
        lanes = Counter()
        for lane in itertools.chain.from_iterable(done.lanes for done in dones):
            lanes[lane.lane] += lane.end_page - lane.first_page
        pulled = sum(request.pull.prefix for request in self.requests if request.pull)
        outcomes = Counter(done.fallback_reason or done.outcome.value for done in dones)
        return (
            f"{self.engine.sglang.role}, {self.policy}, {len(self.requests)} requests, {self._turn} turns, "
            f"{self._flushes} flushes, {len(StormForwarder.late_writes)} late writes, pages {dict(lanes)}, "
            f"{pulled} pulled; {dict(outcomes)}"
        )

    def _peer_is_idle(self) -> bool:
        if self.peer.server is not None:
            return self.peer.server.offered_rooms == 0
        return not any(request.pull and request.pull.lanes_open for request in self.requests)

    def _check_store(self) -> None:
        """What write-through persisted is right, too: it outlives the engine."""
        for tokens in self.prompts:
            for page, keys in zip(self.engine.contents(tokens), self.engine.keys(tokens), strict=True):
                for key, half in zip(keys, page, strict=False):
                    if self.engine.store.objects.get(key, half.numpy().tobytes()) != half.numpy().tobytes():
                        self.wrong.append(f"the store's {key} holds another page's bytes")


def _raising_at_times(function, luck: random.Random):
    def call(*args, **kwargs):
        if luck.random() < 0.02:
            raise RuntimeError("a callback broke")
        return function(*args, **kwargs)

    return call


class Request:
    """One request on the engine under test (`_here`) and what the peer does for it (`_there`)."""

    def __init__(self, storm: Storm, tokens: array, fate: str, room: int | None) -> None:
        self.storm, self.tokens, self.fate = storm, tokens, fate
        self.pull: PageLoad | None = None
        self.split = 0
        """Planned: pages `[local, split)` come from the decode engine; 0 without a plan."""
        self.local = 0
        self.ended = self.aborted = False
        self._patience = storm.chance.randint(1, 60)
        """Turns until a client with the fate to leave leaves."""
        self.req: Req = storm.engine.arrives(tokens, room)
        self.prompt_there = prompt_hash(self.req) if fate != "stranger" else "0" * 32
        """What the other engine takes the room for."""
        self._halves = deque([self._here(), self._there()])

    @property
    def open(self) -> bool:
        return bool(self._halves)

    def advance(self) -> None:
        chance = self.storm.chance
        self._patience -= 1
        if self.fate == "aborted" and self._patience <= 0:
            self.abort()
        for half in list(self._halves):
            if chance.random() < 0.5:
                continue
            try:
                next(half)
            except StopIteration:
                self._halves.remove(half)

    def abort(self) -> None:
        """The client leaves; both engines hear of it."""
        if not self.ended:
            self.ended = self.aborted = True
            self.storm.engine.aborts(self.req)
            if self.pull is not None:
                self.pull.operation.mark_terminate()

    def plan(self) -> None:
        """The scheduler's plan; none where it would read nothing."""
        storm = self.storm
        local, hit = self.prefill_pages()
        if hit <= local:
            return
        self.local, self.split = local, storm.chance.choice([hit, storm.chance.randint(local + 1, hit)])
        storm.engine.planned(self.req, storm.peer, self.split, local)

    def prefill_pages(self) -> tuple[int, int]:
        """What the PE reports: pages that it holds, and pages that are stored."""
        raise NotImplementedError

    def _here(self) -> Iterator[None]:
        raise NotImplementedError

    def _there(self) -> Iterator[None]:
        raise NotImplementedError

    def check(self) -> None:
        engine = self.storm.engine
        reports, dones = engine.reports(self.req), engine.dones(self.req)
        if reports and len(dones) != len(reports):
            self._wrong(f"{len(reports)} reports, {len(dones)} times done")
        if any(done.outcome is Outcome.OK and done.fallback_reason for done in dones):
            self._wrong("it was reported as ok, with a reason why not")

    def _wrong(self, what: str) -> None:
        self.storm.wrong.append(f"{self}: {what}")

    def __str__(self) -> str:
        pull = f", pulled {self.pull.prefix} of {self.pull.pages}" if self.pull is not None else ""
        halves = ", ".join(half.__name__ for half in self._halves)
        waits = f"waits in {halves}" if halves else "is over"
        return f"{self.req.rid} in room {self.req.bootstrap_room} ({self.fate}{pull}) {waits}"


class OnPrefill(Request):
    """The peer is the decode engine: `_there` opens a room and publishes."""

    def prefill_pages(self) -> tuple[int, int]:
        report = self.storm.engine.reports(self.req)[-1]
        return report.local_pages, report.hit_pages

    def _here(self) -> Iterator[None]:
        engine, chance = self.storm.engine, self.storm.chance
        while not engine.reports(self.req) and not self.ended:
            yield
        if self.fate == "late plan":
            for _ in range(chance.randint(1, 300)):
                yield
        if self.fate != "no plan" and not self.ended:
            self.plan()
        while not self.ended:
            yield
            if not self.ended and engine.admitted(self.req):
                self._run()

    def _run(self) -> None:
        """In a batch: what the tree holds of the prompt is used, the rest is computed."""
        engine = self.storm.engine
        if not all(engine.in_tree(self.tokens)):
            self._wrong("admitted with a page that holds another one's bytes")
        engine.sglang.compute(self.tokens, engine.contents(self.tokens))
        self.ended = True
        engine.finishes(self.req)

    def _there(self) -> Iterator[None]:
        chance, peer = self.storm.chance, self.storm.peer
        while not self.split and self.open and not self.ended:
            yield
        if not self.split or self.fate in ("never offered", "duplicate room"):
            return
        for _ in range(chance.randint(0, 10)):
            yield
        peer.opens(self.req, self.local, of=self.prompt_there)
        stop = self.split
        if self.fate in ("ends early", "taken back", "stalls"):
            stop = chance.randint(self.local, self.split - 1)
        page = self.local
        while page < stop:
            end = min(stop, page + chance.randint(1, 3))
            if not self._publish(page, end):
                break
            page = end
            for _ in range(chance.choice([0, 0, 1, 5])):
                yield
        if self.fate == "taken back":
            peer.server.withdraw(self.req.bootstrap_room)
        elif self.fate != "stalls":
            peer.ends(self.req, None if page == self.split else "storage read fell short")

    def _publish(self, first: int, end: int) -> bool:
        rank, engine = self.storm.peer.rank, self.storm.engine
        slots = rank.pool.alloc((end - first) * engine.page_tokens)
        if slots is None:
            return False
        rank.fill(slots, engine.contents(self.tokens)[first:end])

        def unpin() -> None:
            # Whoever gets the pages next writes into them at once.
            rank.pool.kv_buffer[:, page_numbers(slots, engine.page_tokens)] = float("nan")
            rank.pool.free(slots)

        self.storm.peer.server.publish(self.req.bootstrap_room, *rank.blocks(slots), unpin=unpin)
        return True


class OnDecode(Request):
    """The peer is the prefill engine: `_there` pulls."""

    def prefill_pages(self) -> tuple[int, int]:
        return self.storm.chance.randint(0, 2), len(self.storm.engine.hashes(self.tokens))

    def _here(self) -> Iterator[None]:
        engine, chance = self.storm.engine, self.storm.chance
        if self.fate == "late plan":
            for _ in range(chance.randint(1, 300)):
                yield
        if self.fate != "no plan" and not self.ended and engine.reports(self.req):
            self.plan()
        transfers = engine.sglang.scheduler.disagg_decode_transfer_queue
        while not self.ended:
            yield
            if self.req.rid in transfers.ended and not self.ended:
                self._run(transfers.ended[self.req.rid])

    def _run(self, entry) -> None:
        """Its prompt is whole on the device, and it has decoded."""
        engine = self.storm.engine
        if entry.hicache_restore_status.value == "failed":
            self._wrong("a promise was not kept")
        if not all(engine.in_tree(self.tokens)):
            self._wrong("admitted with a page that holds another one's bytes")
        engine.sglang.compute(self.tokens, engine.contents(self.tokens))
        self.ended = True
        engine.finishes(self.req)

    def _there(self) -> Iterator[None]:
        chance, peer, engine = self.storm.chance, self.storm.peer, self.storm.engine
        while not self.split and self.open and not self.ended:
            yield
        if not self.split or self.fate in ("never asked", "duplicate room"):
            return
        for _ in range(chance.randint(20, 150) if self.fate == "asks late" else chance.randint(0, 20)):
            yield
        pages = self.split - self.local
        if peer.rank.pool.available_size() < pages * engine.page_tokens:
            return
        self.pull = peer.pulls(self.req.bootstrap_room, pages, self.local, of=self.prompt_there)
        while self.pull.lanes_open:
            yield
        for page in peer.wrong_pages(self.pull, self.tokens):
            self._wrong(f"the prefill engine took a page that holds another one's bytes: {page}")
        peer.rank.pool.free(self.pull.operation.host_indices)
