"""Forwarding: merged one-sided reads between two real Mooncake engines over loopback."""

from __future__ import annotations

import os
import subprocess
import sys

os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualpath_sgl.lanes.forward import Forwarder, merge_runs

PEER = """
import sys, torch
from dualpath_sgl.lanes.forward import Forwarder
memory = torch.arange(1 << 16, dtype=torch.int32)
forwarder = Forwarder("127.0.0.1", "tcp", "", [memory])
print(forwarder.mooncake_address, memory.data_ptr(), flush=True)
sys.stdin.read()
"""


@st.composite
def block_lists(draw):
    """Blocks that do not overlap locally, many of them neighbours on one side or on both."""
    local, remote, lengths = [], [], []
    here = there = 1000
    for _ in range(draw(st.integers(0, 40))):
        length = draw(st.integers(1, 5))
        here += draw(st.sampled_from([0, 0, 0, 3]))
        there += draw(st.sampled_from([0, 0, 0, 7, -2]))
        local.append(here), remote.append(there), lengths.append(length)
        here, there = here + length, there + length
    order = draw(st.permutations(range(len(local))))
    return tuple([column[i] for i in order] for column in (local, remote, lengths))


def copied(local, remote, lengths) -> dict[int, int]:
    """Destination byte -> source byte."""
    return {
        here + offset: there + offset
        for here, there, length in zip(local, remote, lengths, strict=True)
        for offset in range(length)
    }


@given(block_lists())
def test_merging_copies_the_same_bytes_in_fewer_blocks(blocks):
    merged = merge_runs(*blocks)
    assert copied(*merged) == copied(*blocks)
    assert sum(merged[2]) == sum(blocks[2])
    assert len(merged[0]) <= len(blocks[0])


@given(block_lists())
def test_no_two_merged_blocks_could_be_joined(blocks):
    runs = sorted(zip(*merge_runs(*blocks), strict=True))
    for (here, there, length), (next_here, next_there, _) in pairwise(runs):
        assert (here + length, there + length) != (next_here, next_there)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError):
        merge_runs([0, 8], [0, 8], [8])


@pytest.fixture
def peer():
    """Another process with 256 KiB of registered memory: (process, Mooncake address, memory's)."""
    process = subprocess.Popen(
        [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        mooncake_address, address = process.stdout.readline().split()
        yield process, mooncake_address, int(address)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_read_brings_the_bytes_of_another_process_and_a_dead_one_gives_false(peer):
    process, mooncake_address, remote = peer
    memory = torch.full((1 << 16,), -1, dtype=torch.int32)
    forwarder = Forwarder("127.0.0.1", "tcp", "", [memory])
    # Remote pages in reverse order, with a gap in the middle.
    blocks = [(page * 4096, (14 - page) * 4096) for page in range(15) if page != 7]

    assert forwarder.read(
        mooncake_address,
        [memory.data_ptr() + here for here, _ in blocks],
        [remote + there for _, there in blocks],
        [4096] * len(blocks),
    )
    expected = torch.full_like(memory, -1)
    source = torch.arange(1 << 16, dtype=torch.int32)
    for here, there in blocks:
        expected[here // 4 : here // 4 + 1024] = source[there // 4 : there // 4 + 1024]
    assert torch.equal(memory, expected)

    process.kill()
    process.wait()
    assert not forwarder.read(mooncake_address, [memory.data_ptr()], [remote], [4096])
    assert not forwarder.read(mooncake_address, [memory.data_ptr()], [remote], [4096])


def test_memory_that_the_peer_did_not_register_cannot_be_read(peer):
    _, mooncake_address, remote = peer
    memory = torch.full((1024,), -1, dtype=torch.int32)
    forwarder = Forwarder("127.0.0.1", "tcp", "", [memory])
    assert not forwarder.read(mooncake_address, [memory.data_ptr()], [remote + (1 << 24)], [4096])
    assert torch.equal(memory, torch.full_like(memory, -1))


def test_memory_that_mooncake_refuses_to_register_is_a_clear_error():
    with pytest.raises(RuntimeError, match=r"register the KV host pool: code -\d+"):
        Forwarder("127.0.0.1", "tcp", "", [torch.empty(0)])
