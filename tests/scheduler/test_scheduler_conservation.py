"""Stateful property test: whatever engines say, in whatever order, the books stay balanced."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scheduler_vocabulary import (
    PAGE_BYTES,
    cluster,
    decode_report,
    done,
    heartbeat,
    lane,
    prefill_report,
    relay_beat,
)

from scheduler_svc.helping import PERIOD_S
from scheduler_svc.ledger.engines import ENGINE_EXPIRY_S, RankKey
from scheduler_svc.ledger.rooms import CLOSED_LINGER_S, ROOM_TTL_S
from scheduler_svc.wire.protocol import Error, Mode, Path, Role

ENGINES = [(name, rank) for name in ("p0", "p1", "p2", "d0", "d1") for rank in (0, 1)]
IN_RELAY_MODE = "p2"
RELAYS = ("a", "b", "c")
MAX_ROOMS = 4
room_ids = st.integers(0, 6)
page_counts = st.integers(0, 8)


class Conservation(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.state = cluster("shorter_queue", *self._beats(), max_rooms=MAX_ROOMS)
        self.told: dict[tuple[str, int], set[str]] = {}

    @staticmethod
    def _beat(name, rank):
        mode = Mode.RELAY if name == IN_RELAY_MODE else Mode.DECODE_SIDE
        return heartbeat(name, rank=rank, tp_size=2, mode=mode)

    @classmethod
    def _beats(cls):
        return [cls._beat(*which) for which in ENGINES]

    def _handle(self, message):
        result = self.state.handle(message, self.now_s)
        for key, plan in result.pushes:
            room = self.state.rooms.get(plan.room)
            assert room.plan is plan, "every rank gets the plan of its room"
            assert (key.engine_id, key.rank) in ENGINES
            assert plan.split_page == 0 or min(plan.decode_local_pages, plan.hit_pages) <= plan.split_page
            assert plan.split_page <= plan.hit_pages
            if plan.prefill_id == IN_RELAY_MODE:
                assert plan.split_page == 0 and not room.sides[Role.DECODE].charges
            if plan.path is Path.NONE:
                assert plan.hit_pages <= plan.prefill_local_pages
        if isinstance(result.reply, Error):
            assert not result.pushes and not result.events

    @rule(room=room_ids, which=st.sampled_from(ENGINES[:6]), local=page_counts, more=page_counts)
    def prefill_reports(self, room, which, local, more):
        self._handle(prefill_report(room, local, local + more, by=which[0], rank=which[1]))

    @rule(room=room_ids, which=st.sampled_from(ENGINES[6:]), local=page_counts)
    def decode_reports(self, room, which, local):
        self._handle(decode_report(room, local, by=which[0], rank=which[1]))

    @rule(room=room_ids, which=st.sampled_from(ENGINES), first=page_counts, count=page_counts)
    def rank_is_done(self, room, which, first, count):
        self._handle(done(room, which[0], lane("store", first, first + count), rank=which[1]))

    @rule(seconds=st.sampled_from([0.1, 1.0, ENGINE_EXPIRY_S + 0.1, CLOSED_LINGER_S, ROOM_TTL_S]))
    def time_passes(self, seconds):
        self.now_s += seconds

    @rule(which=st.sampled_from(ENGINES))
    def rank_beats(self, which):
        self._handle(self._beat(*which))

    @rule(name=st.sampled_from(RELAYS), draining=st.booleans())
    def relay_beats(self, name, draining):
        self._handle(relay_beat(name, draining=draining))

    @rule()
    def helpers_are_told(self):
        self.now_s += PERIOD_S
        self.state.expire(self.now_s)
        for key, helpers in self.state.helpers_due(self.now_s):
            self.told[key] = {one.name for one in helpers.relays}
        serving = {relay.name for relay in self.state.relays.serving()}
        for rank in (0, 1):
            if self.state.engines._by_age.get(RankKey(IN_RELAY_MODE, rank)) is not None:
                assert self.told[IN_RELAY_MODE, rank] == serving
        assert {name for name, _ in self.told} <= {IN_RELAY_MODE}

    @rule()
    def all_beat(self):
        for beat in self._beats():
            self._handle(beat)

    @invariant()
    def planned_bytes_equal_what_open_rooms_were_charged(self):
        ranks = [rank for key in ENGINES if (rank := self.state.engines._by_age.get(key)) is not None]
        charged: dict[int, int] = {}
        for rooms in (self.state.rooms._open, self.state.rooms._closed):
            for room in rooms.values():
                for side in room.sides.values():
                    for rank, amount in side.charges.values():
                        assert amount % PAGE_BYTES == 0 and amount > 0
                        charged[id(rank)] = charged.get(id(rank), 0) + amount
        for rank in ranks:
            assert rank.planned_bytes == charged.get(id(rank), 0)

    @invariant()
    def relays_are_counted_by_who_speaks_for_them(self):
        table = self.state.relays
        assert sum(table._held.values()) == len(table) == len(table._by_age) <= len(RELAYS)
        assert len(self.state.helping._told) <= 2

    @invariant()
    def rooms_are_bounded(self):
        assert len(self.state.rooms._open) <= MAX_ROOMS
        assert len(self.state.rooms._closed) <= MAX_ROOMS

    def teardown(self):
        self.all_beat()
        held = list(self.state.engines._by_age.values())
        self.state.rooms.expire(self.now_s + 2 * ROOM_TTL_S)
        assert self.state.rooms.open_count == 0
        assert [rank.planned_bytes for rank in held] == [0] * len(held)


TestConservation = Conservation.TestCase
TestConservation.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
