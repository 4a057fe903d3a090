"""How much a lane claims follows what it brings, and never falls below what is wanted at first."""

from __future__ import annotations

import time

from dualpath_sgl.relay.client.batch_size import BATCH_S, BatchSize

MIB = 2**20


def landed(size: BatchSize, byte_count: int, took_s: float) -> None:
    size.landed(byte_count, time.monotonic() - took_s)


def test_a_lane_that_brought_nothing_yet_claims_the_least():
    assert BatchSize(4 * MIB).wanted_bytes == 4 * MIB


def test_a_fast_lane_claims_what_takes_it_a_while():
    size = BatchSize(4 * MIB)
    landed(size, 100 * MIB, took_s=0.1)
    assert 0.9 < size.wanted_bytes / (1000 * MIB * BATCH_S) <= 1


def test_a_slow_lane_claims_the_least():
    size = BatchSize(4 * MIB)
    landed(size, 4 * MIB, took_s=0.5)
    assert size.wanted_bytes == 4 * MIB


def test_a_lane_that_slows_down_soon_claims_less():
    size = BatchSize(MIB)
    landed(size, 100 * MIB, took_s=0.1)
    before = size.wanted_bytes
    for _ in range(6):
        size._landed_s = 0.0  # the next one is asked for after this one has come
        landed(size, MIB, took_s=1.0)
    assert before > 40 * MIB and size.wanted_bytes < 2 * MIB


def test_batches_that_come_together_are_no_faster_than_their_link():
    size = BatchSize(MIB)
    asked_s = time.monotonic() - 1.0
    for _ in range(3):  # all were asked for a second ago: the second and third took no longer
        size.landed(10 * MIB, asked_s)
    assert size.wanted_bytes < 10 * 10 * MIB * BATCH_S
