"""Everything one engine rank runs for DualPath, built when SGLang attaches the storage backend."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.decode import DecodeSide
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.lanes.open_loads import OpenLoads
from dualpath_sgl.lanes.page_load import PageLoad, acknowledge
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.lanes.rank_sync import RankSync
from dualpath_sgl.lanes.store_lane import StoreLane
from dualpath_sgl.pools import layout, weights
from dualpath_sgl.pools.integrity import PoolCheck
from dualpath_sgl.pools.key_tag import TAG
from dualpath_sgl.prefill import PrefillSide
from dualpath_sgl.spans import stages
from dualpath_sgl.start.config import Settings
from dualpath_sgl.start.dp_rank import dp_place
from dualpath_sgl.threads import faults
from scheduler_svc.telemetry.tracing import init_tracing
from scheduler_svc.wire.engine_names import engine_name
from scheduler_svc.wire.protocol import RankInfo, Role

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
        PrefetchOperation,
    )

logger = logging.getLogger(__name__)


class Runtime:
    """One per SGLang scheduler process.  `controller` is bound when its I/O thread starts."""

    controller: HybridCacheController

    def __init__(self, settings: Settings, config: HiCacheStorageConfig, pool: Any) -> None:
        from sglang.srt.runtime_context import get_disagg, get_server_args

        dp_rank, dp_size = dp_place()
        self.settings = settings = settings.model_copy(
            update={"engine_id": engine_name(settings.engine_id, dp_rank)}
        )
        self.pool = pool
        self.page_size = pool.page_size
        self.page_bytes = layout.page_bytes(pool)
        self.rank = config.tp_rank
        self.tp_size = config.tp_size
        self.role = _role(get_disagg().disaggregation_mode)
        self.layout = _layout(config, pool)
        self.fingerprint = weights.current().fingerprint(self.layout)
        """Changes with the weights."""
        self.tracer = init_tracing(
            settings.engine_id, settings.otlp_endpoint, {"dualpath.rank": config.tp_rank}
        )
        self.forwarder = Forwarder(settings.host, settings.protocol, settings.device, _buffers(pool))
        self.store_lane = StoreLane()
        self.open_loads = OpenLoads()
        self.unplanned_read_bytes = 0
        self.device_free_tokens = 0
        """As of SGLang's last scheduler iteration (an idle one makes at least one a second)."""
        self.pool_check = PoolCheck(pool)
        self.rank_sync = RankSync()
        self.peer_keys = PeerKeys(settings.key_file, settings.peer_keys) if settings.peer_keys else None
        self.server: PageServer | None = None
        if self.role is Role.DECODE:
            self.server = PageServer(
                settings.host,
                self.forwarder.session,
                self.fingerprint,
                settings.lease_s,
                settings.subscribe_timeout_s,
                self.peer_keys,
            )
            self.side: PrefillSide | DecodeSide = DecodeSide(self)
        else:
            self.side = PrefillSide(self)
        args = get_server_args()
        self._engine = RankInfo(
            engine_id=settings.engine_id,
            role=self.role,
            rank=self.rank,
            tp_size=config.tp_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            url=settings.http_url(args.host, args.port),
            bootstrap_port=(args.disaggregation_bootstrap_port if self.role is Role.PREFILL else None),
            page_endpoint=self.server.endpoint if self.server else None,
            fingerprint=self.fingerprint,
            page_size=self.page_size,
            page_bytes=self.page_bytes,
        )
        self.control = ControlChannel(
            settings.scheduler,
            self._engine,
            self.side.load,
            self.side.on_plan,
            (settings.key_file, settings.scheduler_key_file) if settings.key_file else None,
            self.side.on_no_plan,
        )

    def start(self) -> None:
        stages.follow(self.tracer)
        self.store_lane.start()
        if self.server is not None:
            self.server.start()
        self.control.start()
        weights.current().follow(self._follow_weights)
        logger.info("DualPath: %s rank %d runs, layout %s", self.role, self.rank, self.fingerprint)

    def attach_again(self, config: HiCacheStorageConfig) -> None:
        """SGLang's storage is back, perhaps under another name."""
        self.layout = _layout(config, self.pool)
        self._follow_weights()

    def _follow_weights(self) -> None:
        self.fingerprint = weights.current().fingerprint(self.layout)
        if self.server is not None:
            self.server.fingerprint = self.fingerprint
        if isinstance(self.side, PrefillSide):
            self.side.rename_layout(self.fingerprint)
        self._engine = msgspec.structs.replace(self._engine, fingerprint=self.fingerprint)
        self.control.send(self._engine)

    def take(self, controller: HybridCacheController, operation: PrefetchOperation) -> None:
        """An operation of SGLang's has host memory; called on its prefetch I/O thread, never raises."""
        try:
            self.side.take(controller, operation)
        except Exception:
            faults.record("request %s is computed without its stored pages", operation.request_id)
            acknowledge(controller, operation, 0)

    def load_from_store(self, controller: HybridCacheController, operation: PrefetchOperation) -> None:
        """An operation without a plan of its own: read it as upstream does."""
        load = PageLoad(
            controller,
            operation,
            open_loads=self.open_loads,
            page_bytes=self.page_bytes,
            on_lanes_done=self._count_unplanned,
        )
        self.store_lane.submit(load, 0, load.pages)
        load.close_part()

    def quiesce(self) -> None:
        """Let go of everything of SGLang's: it is about to drop its cache, or stops its storage threads.

        On SGLang's scheduler thread.  Raises RuntimeError when a transfer does not end in time.
        """
        self.side.reset()
        self.open_loads.drain()

    def _count_unplanned(self, load: PageLoad) -> None:
        self.unplanned_read_bytes += sum(clock.bytes for clock in load.clocks)

    def storage_load(self) -> dict[str, float | int]:
        """The storage part of `protocol.Workload`."""
        return {
            "read_queue_bytes": max(0, self.store_lane.queue_bytes),
            "read_rate_bytes_per_s": self.store_lane.rate_bytes_per_s,
            "unplanned_read_bytes": self.unplanned_read_bytes,
            "host_free_pages": self.pool.available_size() // self.page_size,
            "held": self.side.held + len(self.open_loads),
            "pool_checks": self.pool_check.checks,
            "kept_pages": self.pool_check.kept_pages,
            "faults": faults.count() + self.control.faults,
        }


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


def start(settings: Settings, config: HiCacheStorageConfig, pool: Any) -> Runtime:
    """The process's runtime: built when SGLang first attaches the storage, and kept if it does so again.

    Raises RuntimeError when another host pool has one already.
    """
    global _current
    if _current is None:
        runtime = Runtime(settings, config, pool)
        runtime.start()
        _current = runtime
    elif _current.pool is not pool:
        raise RuntimeError("DualPath runs already in this process, for another host pool")
    else:
        _current.attach_again(config)
    return _current


def current() -> Runtime | None:
    return _current
