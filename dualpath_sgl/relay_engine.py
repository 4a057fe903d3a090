"""An engine rank in relay mode: what it tells the scheduler, and whom it learns of.

It loads nothing and holds nothing: SGLang reads through `relay/client/store.py`, and what that needs to know
is who may help.  The rest is for placement: how busy the rank is, and which requests have come.

    relay_hooks.py -> control/prefill_work.py, control/decode_work.py -> Report and Done of a room, heartbeats
    control/channel.py -> Helpers -> relay/client/relays.py
    relay/client/store.py -> where the rank gives objects away, or which ones it takes

Only the leader rank reports rooms.  It waits for no plan, so `Done` follows at once: a decode-side engine at the
other end then knows that nothing will be forwarded.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.control.decode_work import DecodeWork
from dualpath_sgl.control.prefill_work import Arrived, LoadAtHand, PrefillWork
from dualpath_sgl.metrics import rank as metrics
from dualpath_sgl.metrics.sampler import Sampler
from dualpath_sgl.pools.device_memory import free_tokens, page_bytes
from dualpath_sgl.relay.client.relays import told
from dualpath_sgl.spans import request_span
from dualpath_sgl.spans.tracing import traceparent_of
from dualpath_sgl.start.config import Settings
from dualpath_sgl.start.dp_rank import dp_place
from dualpath_sgl.threads import faults
from scheduler_svc.wire.engine_names import engine_name
from scheduler_svc.wire.protocol import (
    LEADER_RANK,
    MAX_COUNT,
    MAX_RATE,
    Done,
    Mode,
    Outcome,
    RankInfo,
    Report,
    Role,
    Workload,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    from dualpath_sgl.relay.client.counts import Counts
    from dualpath_sgl.relay.client.loader import Loader
    from dualpath_sgl.relay.resident.server import Served

logger = logging.getLogger(__name__)

NO_LAYOUT = "relay"
"""In place of a layout's fingerprint: pages are asked for by their keys, which name it."""


class RelayEngine:
    """One per SGLang scheduler process."""

    _requests: request_span.RequestSpans | None = None
    """Of a decode engine's leader rank that exports spans."""

    def __init__(self, settings: Settings, scheduler: Scheduler) -> None:
        from sglang.srt.runtime_context import get_disagg, get_server_args

        args = get_server_args()
        role = Role(get_disagg().disaggregation_mode)
        dp_rank, dp_size = dp_place()
        rank, ranks = _rank()
        self._scheduler = scheduler
        self._info = RankInfo(
            engine_id=engine_name(settings.engine_id, dp_rank),
            role=role,
            rank=rank,
            tp_size=ranks,
            dp_rank=dp_rank,
            dp_size=dp_size,
            url=settings.http_url(args.host, args.port),
            fingerprint=NO_LAYOUT,
            page_size=scheduler.page_size,
            page_bytes=page_bytes(scheduler.token_to_kv_pool_allocator, scheduler.page_size),
            bootstrap_port=args.disaggregation_bootstrap_port if role is Role.PREFILL else None,
            mode=Mode.RELAY,
        )
        self._info = self._described()
        key_files = None
        if settings.key_file is not None and settings.scheduler_key_file is not None:
            key_files = settings.key_file, settings.scheduler_key_file
        self.control = ControlChannel(
            settings.scheduler, self._info, key_files, alone="keeps the relays that it knows"
        )
        self.prefill = PrefillWork(self._arrived, self.control.left)
        self.decode = DecodeWork(self.control.left)
        self._otlp_endpoint = settings.otlp_endpoint
        self._free_tokens = 0
        self._queued_tokens = 0

    @property
    def role(self) -> Role:
        return self._info.role

    def start(self) -> None:
        self.control.serve(self._heartbeat, _no_plan, _no_plan, told.take)
        rank = metrics.start(self._info)
        if rank is not None:
            Sampler(
                rank,
                workload=self.workload,
                connected=lambda: self.control.connected,
                counts=self._relay_counts,
                served=self._served,
            ).start()
        if self.role is Role.DECODE and self._info.rank == LEADER_RANK:
            self._requests = request_span.follow(self._otlp_endpoint, self._info.engine_id, "relay")
        logger.info("DualPath: %s rank %d is in mode relay", self._info.role, self._info.rank)

    # -- SGLang's scheduler thread ---------------------------------------------------------------

    def look(self, tree: Any) -> None:
        """Once an iteration of its loop."""
        try:
            self._free_tokens = free_tokens(tree)
        except (AttributeError, NotImplementedError):
            self._free_tokens = 0  # SGLang counts the memory of this model some other way: it is not known
        if self.role is Role.PREFILL:
            self.prefill.look(self._scheduler, tree)

    def queued(self, req: Req) -> None:
        """A DE has taken a request."""
        self.decode.admitted(req)
        traceparent = traceparent_of(req.time_stats)
        if self._requests is not None:
            self._requests.begin(req, traceparent)
        self._arrived(Arrived(req.bootstrap_room, len(req.origin_input_ids), 0, 0, traceparent))

    def look_at_queue(self, queue: Any) -> None:
        """Once an iteration of a DE's loop."""
        self.decode.follow(queue)
        self.decode.count()
        self._queued_tokens = sum(len(one.req.origin_input_ids) for one in queue.queue)
        self.look(queue.tree_cache)

    def _arrived(self, arrived: Arrived) -> None:
        if self._info.rank != LEADER_RANK:
            return
        info, page_size = self._info, self._info.page_size
        is_prefill = self.role is Role.PREFILL
        self.control.send(
            Report(
                room=arrived.room,
                engine_id=info.engine_id,
                role=info.role,
                rank=info.rank,
                prompt_tokens=arrived.prompt_tokens,
                local_pages=arrived.local_tokens // page_size,
                hit_pages=arrived.hit_tokens // page_size if is_prefill else None,
                traceparent=arrived.traceparent,
            )
        )
        self.control.send(
            Done(
                room=arrived.room,
                engine_id=info.engine_id,
                role=info.role,
                rank=info.rank,
                outcome=Outcome.OK,
            )
        )

    # -- the threads of control channel and metrics ----------------------------------------------

    def workload(self) -> Workload:
        if self.role is Role.DECODE:
            sequences, tokens = self.decode.with_queued({})
            return Workload(
                sequences=sequences,
                tokens=tokens,
                device_free_tokens=max(0, self._free_tokens - self._queued_tokens),
                faults=faults.count(),
            )
        load: LoadAtHand = self.prefill.work()
        to_read_bytes = load.to_read_tokens // self._info.page_size * self._info.page_bytes
        return Workload(
            sequences=load.sequences,
            tokens=load.tokens,
            device_free_tokens=self._free_tokens,
            read_queue_bytes=min(to_read_bytes, MAX_COUNT),
            read_rate_bytes_per_s=min(self._read_rate(), MAX_RATE),
            ready_tokens=load.ready_tokens,
            compute_rate_tokens_per_s=min(load.compute_rate_tokens_per_s, MAX_RATE),
            held=load.sequences,
            faults=faults.count(),
        )

    def _heartbeat(self) -> Workload:
        """On the control channel's thread."""
        described = self._described()
        if described != self._info:  # its storage came, or went
            self._info = described
            self.control.send(described)
        return self.workload()

    def _described(self) -> RankInfo:
        backend = storage_backend(self._scheduler)
        return msgspec.structs.replace(
            self._info,
            objects=getattr(backend, "objects", None),
            fetch_endpoint=getattr(backend, "fetch_endpoint", None),
        )

    def _read_rate(self) -> float:
        """Of the own client's link; 0 while no storage is attached."""
        loader = self._loader()
        return loader.rate.bytes_per_s if loader is not None else 0.0

    def _relay_counts(self) -> Counts | None:
        loader = self._loader()
        return loader.counts if loader is not None else None

    def _served(self) -> Served | None:
        served: Served | None = getattr(storage_backend(self._scheduler), "served", None)
        return served

    def _loader(self) -> Loader | None:
        loader: Loader | None = getattr(storage_backend(self._scheduler), "loader", None)
        return loader


def storage_backend(scheduler: Scheduler) -> Any:
    """None where the engine has none."""
    controller = getattr(scheduler.tree_cache, "cache_controller", None)
    return getattr(controller, "storage_backend", None)


def _rank() -> tuple[int, int]:
    """This process among those of its engine, and their number: every one of them reads for itself."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    stage = parallel.attn_cp_size * parallel.attn_tp_size
    in_stage = parallel.attn_cp_rank * parallel.attn_tp_size + parallel.attn_tp_rank
    return parallel.pp_rank * stage + in_stage, parallel.pp_size * stage


def _no_plan(_: object) -> None:
    """A room with this engine forwards nothing, whatever the scheduler says."""


_current: RelayEngine | None = None


def start(settings: Settings, scheduler: Scheduler) -> RelayEngine:
    global _current
    _current = RelayEngine(settings, scheduler)
    _current.start()
    return _current


def current() -> RelayEngine | None:
    return _current
