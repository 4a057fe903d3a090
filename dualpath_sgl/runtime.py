"""Everything one engine rank runs for DualPath, built when SGLang attaches the storage backend."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.control.workload import RankWorkload
from dualpath_sgl.decode import DecodeSide
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.lanes.loads import Loads
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.lanes.peer_lane import OnMissing, PeerLane
from dualpath_sgl.lanes.peer_lanes import PeerLanes
from dualpath_sgl.lanes.rank_sync import RankSync
from dualpath_sgl.lanes.store_lane import StoreLane
from dualpath_sgl.metrics import rank as metrics
from dualpath_sgl.metrics.sampler import Sampler
from dualpath_sgl.pools import layout, weights
from dualpath_sgl.pools.integrity import PoolCheck
from dualpath_sgl.pools.key_tag import TAG
from dualpath_sgl.prefill import PrefillSide
from dualpath_sgl.relay.client.relays import told
from dualpath_sgl.restore import RestoreGuard
from dualpath_sgl.room_reports import RoomReports
from dualpath_sgl.spans import request_span, stages
from dualpath_sgl.start.config import Settings
from dualpath_sgl.start.dp_rank import dp_place, port_of_rank
from scheduler_svc.telemetry.tracing import init_tracing
from scheduler_svc.wire.engine_names import engine_name
from scheduler_svc.wire.protocol import Loaded, RankInfo, Role

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    from dualpath_sgl.lanes.page_load import PageLoad
    from dualpath_sgl.relay.client.loader import Loader

logger = logging.getLogger(__name__)


class Runtime:
    """One per SGLang scheduler process: builds and wires what a rank is made of."""

    def __init__(self, settings: Settings, config: HiCacheStorageConfig, pool: Any, is_told: bool) -> None:
        """`is_told`: relays that the scheduler tells of may help."""
        from sglang.srt.runtime_context import get_disagg, get_server_args

        dp_rank, dp_size = dp_place()
        engine_id = engine_name(settings.engine_id, dp_rank)
        role = _role(get_disagg().disaggregation_mode)
        args = get_server_args()
        self.pool = pool
        self.page_bytes = layout.page_bytes(pool)
        self.tp_size = config.tp_size
        self._layout = _layout(config, pool)
        self.fingerprint = weights.current().fingerprint(self._layout)
        """Changes with the weights."""

        # Everything that moves pages.
        self._forwarder = Forwarder(settings.host, settings.protocol, settings.device, _buffers(pool))
        """A DE calls nothing of it, but its memory can be read only while it lives."""
        peer_keys = None
        if settings.key_file is not None and settings.peer_keys is not None:
            peer_keys = PeerKeys(settings.key_file, settings.peer_keys)
        self.store_lane = StoreLane()
        self.loads = Loads(self.store_lane, self.page_bytes, self._count_unplanned)
        self.rank_sync = RankSync()
        self.server: PageServer | None = None
        if role is Role.DECODE:
            self.server = PageServer(
                settings.host,
                self._forwarder.mooncake_address,
                self.fingerprint,
                settings.lease_s,
                settings.subscribe_timeout_s,
                peer_keys,
                port_of_rank(settings.page_port, config),
            )

        # What the scheduler hears and says.
        self._engine = RankInfo(
            engine_id=engine_id,
            role=role,
            rank=config.tp_rank,
            tp_size=config.tp_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            url=settings.http_url(args.host, args.port),
            bootstrap_port=args.disaggregation_bootstrap_port if role is Role.PREFILL else None,
            page_endpoint=self.server.endpoint if self.server else None,
            fingerprint=self.fingerprint,
            page_size=pool.page_size,
            page_bytes=self.page_bytes,
            helped=is_told and role is Role.PREFILL,
        )
        key_files = None
        if settings.key_file is not None and settings.scheduler_key_file is not None:
            key_files = settings.key_file, settings.scheduler_key_file
        self.control = ControlChannel(settings.scheduler, self._engine, key_files)
        self._metrics = metrics.start(self._engine)
        self.loader: Loader | None = None
        """Through which relays take part in what this engine reads itself; of the storage that is attached."""
        self._tracer = init_tracing(engine_id, settings.otlp_endpoint, {"dualpath.rank": config.tp_rank})
        requests = None
        if role is Role.DECODE and config.tp_rank == 0:
            requests = request_span.follow(settings.otlp_endpoint, engine_id)
        reports = RoomReports(
            engine_id=engine_id,
            role=role,
            rank=config.tp_rank,
            control=self.control,
            plan_timeout_s=settings.plan_timeout_s,
            tracer=self._tracer,
            on_over=self._metrics.room_over if self._metrics is not None else None,
            requests=requests,
        )
        self._on_loaded = requests.loaded if requests is not None else _nobody_asks

        # The side of the role.
        self._peer_lanes: PeerLanes | None = None
        self.side: PrefillSide | DecodeSide
        if self.server is not None:
            self.side = DecodeSide(
                tp_size=config.tp_size,
                pool=pool,
                reports=reports,
                loads=self.loads,
                store_lane=self.store_lane,
                server=self.server,
                restores=RestoreGuard(self._tracer),
                left=self.control.left,
            )
        else:
            new_lane = partial(
                _new_lane, self._forwarder, settings.peer_timeout_s, self.store_lane.take_over, peer_keys
            )
            self._peer_lanes = PeerLanes(new_lane, self.fingerprint)
            self.side = PrefillSide(
                rank=config.tp_rank,
                page_size=pool.page_size,
                reports=reports,
                loads=self.loads,
                store_lane=self.store_lane,
                peer_lanes=self._peer_lanes,
                left=self.control.left,
            )

        self.pool_check = PoolCheck(pool)
        self.workload = RankWorkload(
            side=self.side,
            store_lane=self.store_lane,
            loads=self.loads,
            pool=pool,
            pool_check=self.pool_check,
        )

    def start(self) -> None:
        stages.follow(self._tracer)
        self.store_lane.start()
        if self.server is not None:
            self.server.start()
        self.control.serve(
            self.workload.now,
            self.side.on_plan,
            self.side.on_no_plan,
            told.take,
            on_loaded=self._on_loaded,
        )
        if self._metrics is not None:
            Sampler(
                self._metrics,
                workload=self.workload.now,
                connected=lambda: self.control.connected,
                counts=lambda: self.loader.counts if self.loader is not None else None,
                arrived=lambda: self.loads.open.arrived_bytes,
            ).start()
        weights.current().follow(self._follow_weights)
        logger.info(
            "DualPath: %s rank %d runs, layout %s", self._engine.role, self._engine.rank, self.fingerprint
        )

    def attach_again(self, config: HiCacheStorageConfig) -> None:
        """SGLang's storage is back, perhaps under another name."""
        self._layout = _layout(config, self.pool)
        self._follow_weights()

    def _follow_weights(self) -> None:
        self.fingerprint = weights.current().fingerprint(self._layout)
        if self.server is not None:
            self.server.fingerprint = self.fingerprint
        if self._peer_lanes is not None:
            self._peer_lanes.rename_layout(self.fingerprint)
        self._engine = msgspec.structs.replace(self._engine, fingerprint=self.fingerprint)
        self.control.send(self._engine)

    def _count_unplanned(self, load: PageLoad) -> None:
        if self._metrics is not None:
            self._metrics.read_unplanned(load.operation.request_id, load.lane_work)

    def quiesce(self) -> None:
        """Let go of everything of SGLang's: it is about to drop its cache, or stops its storage threads.

        On SGLang's scheduler thread.  Raises RuntimeError when a transfer does not end in time.
        """
        self.side.reset()
        self.loads.open.drain()


def _nobody_asks(_loaded: Loaded) -> None:
    """Of a rank that exports no request's span."""


def _new_lane(
    forwarder: Forwarder,
    timeout_s: float,
    on_missing: OnMissing,
    keys: PeerKeys | None,
    endpoint: str,
    decode_id: str,
    fingerprint: str,
) -> PeerLane:
    """Raises scheduler_svc.wire.keys.KeyFileError when engines have keys and the DE's is not there."""
    secure = keys.towards(decode_id) if keys else None
    return PeerLane(endpoint, forwarder, fingerprint, timeout_s, on_missing, secure)


def _layout(config: HiCacheStorageConfig, pool: Any) -> str:
    return layout.fingerprint(
        pool,
        config.model_name,
        config.tp_size,
        tp_rank=config.tp_rank,
        store_keys=(config.extra_config or {}).get(TAG),
    )


def _role(mode: str) -> Role:
    try:
        return Role(mode)
    except ValueError:
        raise ValueError(
            f"--disaggregation-mode is {mode!r}: DualPath needs 'prefill' or 'decode'; "
            "unset DUALPATH_ENABLED to run this server without DualPath"
        ) from None


def _buffers(pool: Any) -> list[Any]:
    """The tensors behind a host pool, each registered once for forwarding."""
    accessor = getattr(pool, "get_hybrid_pool_buffer", None)
    return accessor() if accessor is not None else [pool.kv_buffer]


_current: Runtime | None = None


def start(settings: Settings, config: HiCacheStorageConfig, pool: Any, is_told: bool) -> Runtime:
    """The process's runtime: built when SGLang first attaches the storage, and kept if it does so again.

    `is_told`: as of `Runtime`.  Raises RuntimeError when another host pool has one already.
    """
    global _current
    if _current is None:
        runtime = Runtime(settings, config, pool, is_told)
        runtime.start()
        _current = runtime
    elif _current.pool is not pool:
        raise RuntimeError("DualPath runs already in this process, for another host pool")
    else:
        _current.attach_again(config)
    return _current


def current() -> Runtime | None:
    return _current
