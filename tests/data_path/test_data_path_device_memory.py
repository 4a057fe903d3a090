"""Free device memory as an engine reports it.  The end-to-end tests compare it with real engines' pools."""

from __future__ import annotations

from types import SimpleNamespace

from data_path_world import rooms
from engine_parts import EngineParts

from dualpath_sgl import decode, hooks, runtime
from scheduler_svc.wire.protocol import Role

UNTRACED = SimpleNamespace(trace_ctx=SimpleNamespace(tracing_enable=False))


def engine(role: Role, monkeypatch) -> EngineParts:
    """A running engine reduced to what a heartbeat is made of: a real one needs a model."""
    parts = EngineParts(role)
    monkeypatch.setattr(runtime, "_current", parts.as_runtime)
    return parts


def tree(free_pages: int, evictable: int) -> SimpleNamespace:
    allocator = SimpleNamespace(available_size=lambda: free_pages * 16)
    return SimpleNamespace(token_to_kv_pool_allocator=allocator, evictable_size=lambda: evictable)


def request(tokens: int) -> SimpleNamespace:
    room = next(rooms)
    return SimpleNamespace(
        rid=f"request-{room}",
        bootstrap_room=room,
        origin_input_ids=[0] * tokens,
        extra_key=None,
        cache_salt=None,
        time_stats=UNTRACED,
    )


def test_pages_that_the_tree_would_evict_count_as_free(monkeypatch):
    load = engine(Role.PREFILL, monkeypatch).workload.now
    hooks.after_check_hicache_events(None, tree(free_pages=2, evictable=160))
    assert load().device_free_tokens == 2 * 16 + 160


def test_requests_that_wait_for_device_memory_are_taken_off(monkeypatch):
    monkeypatch.setattr(decode, "held_on_host", lambda tree, req: SimpleNamespace(tokens=0))
    parts = engine(Role.DECODE, monkeypatch)
    side, load = parts.side, parts.workload.now
    hooks.after_check_hicache_events(None, tree(free_pages=10, evictable=0))
    queue = SimpleNamespace(tree_cache=None)
    side.add(queue, request(tokens=100))
    assert load().device_free_tokens == 60
    side.add(queue, request(tokens=100))
    assert load().device_free_tokens == 0
