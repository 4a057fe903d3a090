"""SGLang's prefetch with two of its calls under way: what it is told is what it is told without."""

from __future__ import annotations

import itertools
import threading
import time
from types import SimpleNamespace

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_tree import Tree

from dualpath_sgl import plugin
from dualpath_sgl.evals.relay.world import HOST, eventually
from dualpath_sgl.relay.client.prefetch import hooks
from dualpath_sgl.relay.client.prefetch.call import present
from dualpath_sgl.relay.client.store import RelayStore

PAGE_TOKENS = 4
CALL_TOKENS = 128 * PAGE_TOKENS
"""SGLang asks for 128 pages at a time."""
WAIT_S = 30.0
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Calls:
    """Of the backend, in the order in which they begin; one that is held waits in it."""

    def __init__(self, backend) -> None:
        self.begun: list[str] = []
        """First key of each."""
        self.over: list[str] = []
        self.known: list[object] = []
        """What is known of each."""
        self.most = 0
        """At a time."""
        self._go: dict[int, threading.Event] = {}
        self._lock = threading.Lock()
        self._read = backend._get_batch_zero_copy_impl
        backend._get_batch_zero_copy_impl = self._noted

    def hold(self, *numbers: int) -> None:
        self._go |= {number: threading.Event() for number in numbers}

    def release(self, number: int) -> None:
        self._go[number].set()

    def _noted(self, keys, addresses, sizes):
        with self._lock:
            number = len(self.begun)
            self.begun.append(keys[0])
            self.known.append(present())
            self.most = max(self.most, len(self.begun) - len(self.over))
        if number in self._go:
            assert self._go[number].wait(WAIT_S), "a call was never released"
        got = self._read(keys, addresses, sizes)
        self.over.append(keys[0])
        return got


@pytest.fixture
def new_tree(own_fresh_process, scene, monkeypatch):
    for name, value in {
        "DUALPATH_ENABLED": "1",
        "DUALPATH_MODE": "relay",
        "DUALPATH_ENGINE_ID": "prefill-0",
        "MOONCAKE_MASTER": scene.store.master,
        "MOONCAKE_PROTOCOL": "tcp",
        "MOONCAKE_TE_META_DATA_SERVER": "P2PHANDSHAKE",
        "MOONCAKE_GLOBAL_SEGMENT_SIZE": "0",
        "MOONCAKE_LOCAL_HOSTNAME": HOST,
    }.items():
        monkeypatch.setenv(name, value)

    def new_tree(looks_ahead: bool = True, policy: str = "wait_complete", kind: str = "full") -> Tree:
        plugin.activate()
        HookRegistry.apply_hooks()
        monkeypatch.setattr(RelayStore, "calls_may_overlap", looks_ahead)
        tree = Tree(kind, PAGE_TOKENS if kind == "full" else 64, "mooncake", {}, policy=policy)
        acks = tree.controller.prefetch_sync_queue
        tree.acks, put = [], acks.put

        def noted(ack) -> None:
            if ack is not None:
                tree.acks.append((ack.rid, ack.completed_tokens, ack.pool_hits, ack.completed_req))
            put(ack)

        acks.put = noted
        tree.calls = Calls(tree.backend)
        return tree

    return new_tree


def prompts(tree: Tree, *lengths: int) -> list[list[int]]:
    """Stored, and different from the first token on."""
    made = [
        list(range(first, first + length))
        for first, length in zip(itertools.count(10**4, 10**4), lengths, strict=False)
    ]
    for prompt in made:
        tree.store_holds(prompt)
    return made


def begin(tree: Tree, some: list[list[int]], name: str = "request") -> list[object]:
    """A request for each, in this order."""
    return [tree.begin(prompt, f"{name}-{number}") for number, prompt in enumerate(some)]


def loaded(tree: Tree, *handles: object) -> list[int | None]:
    return [tree.tree.prefetch_loaded_tokens_by_reqid.get(handle) for handle in handles]


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_sglang_is_told_the_same_with_one_call_at_a_time_and_with_two(new_tree, looks_ahead):
    tree = new_tree(looks_ahead)
    lengths = 3 * CALL_TOKENS + 100, 200, 2 * CALL_TOKENS
    handles = begin(tree, prompts(tree, *lengths))
    tree.ends(*handles)
    assert loaded(tree, *handles) == list(lengths)
    assert tree.wrong() == []
    assert looks_ahead or tree.calls.most == 1
    assert tree.acks == [
        *(("request-0", tokens, None, None) for tokens in (512, 1024, 1536, lengths[0])),
        ("request-0", None, None, True),
        ("request-1", lengths[1], None, None),
        ("request-1", None, None, True),
        ("request-2", 512, None, None),
        ("request-2", 1024, None, None),
        ("request-2", None, None, True),
    ]


def test_the_next_call_begins_while_one_is_under_way(new_tree):
    tree = new_tree()
    some = prompts(tree, 3 * CALL_TOKENS, CALL_TOKENS, CALL_TOKENS)
    tree.calls.hold(*range(5))
    stats = SimpleNamespace(trace_ctx=SimpleNamespace(tracing_enable=False))
    hooks.before_prefetch_kvcache(None, SimpleNamespace(rid="request-0", time_stats=stats))
    hooks._traces["request-1"] = TRACEPARENT
    handles = begin(tree, some)
    for number in range(5):
        # Two at a time: of the operation, and behind its end of the next ones.
        tree.goes_on(lambda number=number: len(tree.calls.begun) == min(number + 2, 5))
        time.sleep(0.05)
        assert len(tree.calls.begun) == min(number + 2, 5)
        tree.calls.release(number)
    tree.ends(*handles)
    assert tree.calls.over == tree.calls.begun
    assert tree.wrong() == []
    assert loaded(tree, *handles) == [len(prompt) for prompt in some]
    known = [(call.request_id, call.traceparent) for call in tree.calls.known]
    assert known == [("request-0", None)] * 3 + [("request-1", TRACEPARENT), ("request-2", None)]


def test_a_call_that_is_over_before_the_one_in_front_waits_for_its_turn(new_tree):
    tree = new_tree()
    some = prompts(tree, 2 * CALL_TOKENS, CALL_TOKENS)
    tree.calls.hold(0)
    handles = begin(tree, some)
    tree.goes_on(lambda: len(tree.calls.over) == 1)
    assert tree.acks == []
    tree.calls.release(0)
    tree.ends(*handles)
    assert tree.wrong() == []
    assert [tokens for _, tokens, _, _ in tree.acks] == [512, 1024, None, 512, None]


def test_an_operation_that_is_terminated_ends_when_the_call_ahead_is_over(new_tree):
    tree = new_tree()
    (prompt,) = prompts(tree, 4 * CALL_TOKENS)
    tree.calls.hold(0, 1)
    (handle,) = begin(tree, [prompt])
    tree.goes_on(lambda: len(tree.calls.begun) == 2)
    operation = tree.tree.ongoing_prefetch[handle].operation
    tree.controller.terminate_prefetch(operation)
    tree.calls.release(0)
    eventually(lambda: len(tree.acks) == 4, "SGLang acknowledges what it does not ask for any more")
    time.sleep(0.1)
    # What the call ahead brings does not count, and until it is over the memory is its own.
    assert [(tokens, over) for _, tokens, _, over in tree.acks] == [(512, None)] * 4
    assert tree.calls.known[1].given_up and not tree.calls.known[0].given_up
    tree.calls.release(1)
    tree.goes_on(lambda: tree.acks[-1] == ("request-0", None, None, True), handle)
    assert len(tree.calls.begun) == 2
    assert loaded(tree, handle) == [512]


def test_a_missing_page_or_a_failing_store_ends_its_operation_and_no_other(new_tree):
    tree = new_tree()
    some = prompts(tree, 3 * CALL_TOKENS, 2 * CALL_TOKENS, CALL_TOKENS)
    missing, broken = tree.hashes(some[0])[100], tree.hashes(some[1])[0]
    read = tree.backend._get_batch_zero_copy_impl

    def fail(keys, *places):
        if broken in keys[0]:
            raise OSError("the store is gone")
        got = read(keys, *places)
        return [-704 if missing in key else count for key, count in zip(keys, got, strict=True)]

    tree.backend._get_batch_zero_copy_impl = fail
    handles = begin(tree, some)
    tree.ends(*handles)
    assert loaded(tree, handles[0], handles[2]) == [100 * PAGE_TOKENS, CALL_TOKENS]
    assert [tokens for _, tokens, _, _ in tree.acks] == [400, 400, 400, None, 0, 0, None, 512, None]


def test_the_threads_stop_only_when_no_call_is_under_way(new_tree):
    tree = new_tree()
    some = prompts(tree, CALL_TOKENS, CALL_TOKENS)
    tree.calls.hold(0, 1)
    begin(tree, some)
    tree.goes_on(lambda: len(tree.calls.begun) == 2)
    tree.controller.storage_stop_event.set()
    tree.calls.release(0)
    thread = tree.controller.prefetch_io_aux_thread
    thread.join(0.2)
    assert thread.is_alive()
    tree.calls.release(1)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert tree.acks == [("request-0", 512, None, None), ("request-0", None, None, True)]


def test_prefetches_that_are_cut_short_at_any_time_leave_the_host_pool_as_it_was(new_tree):
    tree = new_tree(policy="best_effort")
    some = prompts(tree, 3 * CALL_TOKENS, CALL_TOKENS)
    pool = tree.controller.mem_pool_host
    for cut in range(4):
        tree.tree.reset()
        free, begun = pool.available_size(), len(tree.calls.begun)
        handles = begin(tree, some, f"cut-{cut}")
        tree.goes_on(lambda calls=begun + cut: len(tree.calls.begun) >= calls)
        tree.ends(*handles)
        held = sum(tokens or 0 for tokens in loaded(tree, *handles))
        tree.goes_on(lambda left=free - held: pool.available_size() == left)


@pytest.mark.parametrize("kind", ["mamba", "swa"])
def test_states_and_windows_come_behind_the_pages_as_before(new_tree, kind):
    tree = new_tree(kind=kind)
    some = prompts(tree, 1024, 1024)
    handles = begin(tree, some)
    tree.ends(*handles)
    assert loaded(tree, *handles) == [1024, 1024]
    assert tree.wrong() == []
    hits = [pool_hits for _, _, pool_hits, _ in tree.acks if pool_hits is not None]
    assert len(hits) == 2 and all(hits)
