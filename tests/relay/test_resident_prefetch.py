"""SGLang's prefetch on a prefill engine gets a prompt out of a decode engine's host memory."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from decode_tree import PAGE_TOKENS, prompt, store_at
from sglang_tree import Tree

from dualpath_sgl.evals.relay.world import MIB, Child, eventually
from dualpath_sgl.relay.client.relays import Kind
from scheduler_svc.wire.protocol import Helpers, Resident

PAGES, SEED = 40, 77
PROGRAM = Path(__file__).with_name("decode_program.py")


@pytest.fixture
def decode(scene):
    child = Child([sys.executable, str(PROGRAM), scene.store.master, str(PAGES), str(SEED)], "serves")
    yield child
    child.end()


@pytest.fixture
def prefill(own_fresh_process, scene, decode):
    store_at(scene.store.master)
    options = {"least_call_bytes": 0, "bounce_bytes": 16 * MIB}
    names = {
        "backend_name": "relay",
        "module_path": "dualpath_sgl.relay.client.store",
        "class_name": "RelayStore",
        "interface_v1": 1,
    }
    tree = Tree("full", PAGE_TOKENS, "dynamic", {"relay": options, **names})
    objects, endpoint = decode.greeting.split()[1::2]
    assert tree.backend.objects == objects and tree.backend.fetch_endpoint is None
    tree.backend.relays.take(Helpers(residents=(Resident("decode-0", endpoint),)))
    tree.hashes(prompt(1, 0))  # SGLang compiles what hashes, which may take longer than a prefetch
    eventually(lambda: tree.backend.loader.lanes_up(Kind.RESIDENT), "the decode engine may be asked")
    return tree


def test_a_prompt_that_is_nowhere_else_comes_from_the_decode_engine(scene, prefill):
    tokens = prompt(PAGES, SEED)
    scene.store.client.remove_all(True)
    came: list[int] = []

    def all_came() -> bool:
        """On a busy host an answer may come too late for one load."""
        came.append(prefill.prefetch(tokens) or 0)
        return sum(came) == len(tokens)

    eventually(all_came, "the decode engine brings it")
    counts = prefill.backend.loader.counts
    assert counts.own_objects == 0
    assert sum(lane.objects for lane in counts.residents.values()) == 2 * PAGES


def test_a_decode_engine_that_is_killed_is_not_missed(scene, decode, prefill):
    """What it holds is in the store, too."""
    tokens = prompt(PAGES, SEED)
    assert prefill.backend.batch_exists(prefill.hashes(tokens)) == PAGES
    decode.send(signal.SIGKILL)
    assert prefill.prefetch(tokens) == len(tokens)
    counts = prefill.backend.loader.counts
    assert counts.forwarded_bytes == 0 and counts.own_objects == 2 * PAGES


def test_a_decode_engine_that_hangs_costs_its_part_of_the_links(scene, decode, prefill):
    tokens = prompt(PAGES, SEED)
    assert prefill.backend.batch_exists(prefill.hashes(tokens)) == PAGES
    decode.send(signal.SIGSTOP)
    assert prefill.prefetch(tokens) == len(tokens)
    counts = prefill.backend.loader.counts
    assert counts.forwarded_bytes == 0 and counts.own_objects == 2 * PAGES
