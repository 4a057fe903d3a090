"""Which weights an engine's cached pages were computed with, and what happens when they change.

KV of other weights is wrong KV.  SGLang drops its own when its cache is flushed; the store keeps what
it has, and a peer may not have got the update yet.  So the weights have a name, part of every key in
the store and of the fingerprint that peers compare:

    none (as started) ── weights change ──> one never used again ── flush ──> the version's

From the change to the flush an engine's cache may hold pages of both: nothing of it is shared with
anybody.  The version is what the caller of the update says (`weight_version`), so that engines that
got the same update share again; without one it is a name that only this engine has.

Changes come on SGLang's scheduler thread, on every rank of an engine in the same order; any thread may
read the name.  It outlives a storage backend that is detached and attached again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dualpath_sgl.pools.layout import digest

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

logger = logging.getLogger(__name__)

AS_STARTED = "default"
"""SGLang's `--weight-version` when an operator gives none."""


class Weights:
    def __init__(self, version: str) -> None:
        """`version`: what the engine was started with."""
        self.name = "" if version == AS_STARTED else digest(version)
        """Empty for first weights without a version."""
        self._version: str | None = version
        self._unique = ""
        """The name that the last change brought."""
        self._is_mixed = False
        """The cache may hold pages of earlier weights."""
        self._is_session_open = False
        """More changes may follow."""
        self._on_name: Callable[[], None] = lambda: None

    def follow(self, on_name: Callable[[], None]) -> None:
        """Call `on_name` after every change of the name, instead of whom was called before."""
        self._on_name = on_name

    def fingerprint(self, layout: str) -> str:
        """What two engines must have in common: the layout of their pages, and the weights behind them."""
        return f"{layout}/w{self.name}" if self.name else layout

    def begin(self, unique: str) -> None:
        """A session of several changes begins; nothing has ever had the name `unique`."""
        self._is_session_open = True
        self.changing(unique)

    def changing(self, unique: str) -> None:
        """The weights are about to change; nothing has ever had the name `unique`."""
        if not self._is_mixed:
            logger.info("DualPath: weights change; no cached page is shared until the cache is flushed")
        self._version, self._unique, self._is_mixed = None, unique, True
        self._rename()

    def call(self, version: str) -> None:
        """The last change made `version`.  Weights that did not change keep their name."""
        if self._version is None:
            self._version = version
            self._rename()

    def flushed(self) -> None:
        """No page of earlier weights is left in this engine, nor on its way into the store."""
        if self._is_mixed:
            self._is_mixed = False
            self._rename()

    def end(self) -> None:
        """The session has ended."""
        if self._is_session_open:
            self._is_session_open = False
            self._rename()

    def _rename(self) -> None:
        is_settled = not (self._is_mixed or self._is_session_open)
        if is_settled:
            self.name = digest(self._version or ["no version", self._unique])
        else:
            self.name = digest(["unsettled", self._unique])
        self._on_name()
        if is_settled and self._version is None:
            logger.warning(
                "DualPath: the new weights have no version: this engine shares no page with others until "
                "they have one; give every engine the same weight_version with the update"
            )


_weights: Weights | None = None


def current() -> Weights:
    """This process's weights."""
    global _weights
    if _weights is None:
        from sglang.srt.runtime_context import get_serving

        _weights = Weights(get_serving().weight_version)
    return _weights


# -- hooks ---------------------------------------------------------------------------------------


def before_update(updater: SchedulerWeightUpdaterManager, *_args: Any, **_kwargs: Any) -> None:
    current().changing(_agreed_name(updater.tp_cpu_group))


def before_update_in_session(updater: SchedulerWeightUpdaterManager, *_args: Any, **_kwargs: Any) -> None:
    if updater._session is not None:  # else SGLang refuses the update
        current().changing(_agreed_name(updater.tp_cpu_group))


def before_begin_session(updater: SchedulerWeightUpdaterManager, *_args: Any, **_kwargs: Any) -> None:
    if updater._session is None:
        current().begin(_agreed_name(updater.tp_cpu_group))


def before_end_session(updater: SchedulerWeightUpdaterManager, *_args: Any, **_kwargs: Any) -> None:
    """A session without an update call: somebody else wrote the weights meanwhile (RDMA)."""
    if updater._session is not None and not updater._session.loaded_weights:
        current().changing(_agreed_name(updater.tp_cpu_group))


def after_end_session(_result: Any, updater: SchedulerWeightUpdaterManager, *_args: Any, **_kw: Any) -> None:
    if updater._session is None:
        current().end()


def after_version_recorded(_result: None, _scheduler: Any, new_version: str | None) -> None:
    if new_version is not None:
        current().call(new_version)


def after_tree_reset(_result: None, _tree: Any) -> None:
    if _weights is not None:
        _weights.flushed()


def _agreed_name(group: torch.distributed.ProcessGroup) -> str:
    """A random name, the same on every rank of `group`."""
    # Not torch's generator: it is seeded, and gives the same numbers after a restart.
    name = torch.tensor([secrets.randbits(63)])
    torch.distributed.broadcast(name, torch.distributed.get_process_group_ranks(group)[0], group)
    return f"{int(name):x}"


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache."

MUST_NOT_FAIL = (before_update, before_update_in_session, before_begin_session, before_end_session)

HOOKS: tuple[tuple[str, Callable, str], ...] = (
    (_UPDATER + "update_weights_from_disk", before_update, "before"),
    (_UPDATER + "update_weights_from_ipc", before_update, "before"),
    (_UPDATER + "begin_weight_update", before_begin_session, "before"),
    (_UPDATER + "update_weights_from_distributed", before_update_in_session, "before"),
    (_UPDATER + "update_weights_from_tensor", before_update_in_session, "before"),
    (_UPDATER + "end_weight_update", before_end_session, "before"),
    (_UPDATER + "end_weight_update", after_end_session, "after"),
    (_SCHEDULER + "record_weight_version_change", after_version_recorded, "after"),
    (_TREE + "reset", after_tree_reset, "after"),
)
