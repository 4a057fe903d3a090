"""When the two storage lanes of one request are expected to end.

With queues `q` in bytes, drain rates `r` in bytes per second and pages of `b` bytes, a split `x`
lets the lanes end after

    PE:  (q_P + (K - max(x, L_P)) * b) / r_P     seconds, 0 when it reads nothing
    DE:  (q_D + (x - L_D) * b) / r_D             seconds, 0 when it reads nothing

The DE needs `[L_D, x)` without a gap, so it also reads pages below L_P that the PE has already.
Forwarding the DE's share over the compute network runs behind its storage read, page batch by
page batch, and is taken to be no slower than that (the paper's bottleneck-free analysis: for the
P/D ratios it recommends no compute link is the bottleneck).
"""

from __future__ import annotations

from typing import NamedTuple

from scheduler_svc.policies.path_request import PathRequest

LEAST_RATE_BYTES_PER_S = 1.0
"""A rate below this was not measured."""

MAX_RATE_RATIO = 8.0
"""The slower lane counts as at least this part of the faster one.  A lane is measured only while
it reads: one bad first measurement (connecting, a cold disk) must not keep work from it for ever."""


class LaneModel(NamedTuple):
    """Times are seconds; while no rate is known (`rates_known` is false) they are bytes."""

    prefill_local_pages: int
    decode_local_pages: int
    hit_pages: int
    prefill_wait: float
    decode_wait: float
    """Until the read queue of each side is drained."""
    prefill_page: float
    decode_page: float
    """To read one page on each side."""
    rates_known: bool

    @classmethod
    def of(cls, request: PathRequest) -> LaneModel:
        """One unknown rate is taken to equal the other."""
        prefill_rate = request.prefill.read_rate_bytes_per_s
        decode_rate = request.decode.read_rate_bytes_per_s
        fastest = max(prefill_rate, decode_rate)
        known = fastest >= LEAST_RATE_BYTES_PER_S
        if not known:
            prefill_rate = decode_rate = 1.0
        else:
            prefill_rate = _usable(prefill_rate, fastest)
            decode_rate = _usable(decode_rate, fastest)
        return cls(
            request.prefill_local_pages,
            request.decode_local_pages,
            request.hit_pages,
            request.prefill.read_queue_bytes / prefill_rate,
            request.decode.read_queue_bytes / decode_rate,
            request.page_bytes / prefill_rate,
            request.page_bytes / decode_rate,
            known,
        )

    def prefill_end(self, split_page: int) -> float:
        pages = self.hit_pages - max(split_page, self.prefill_local_pages)
        return self.prefill_wait + pages * self.prefill_page if pages > 0 else 0.0

    def decode_end(self, split_page: int) -> float:
        pages = split_page - self.decode_local_pages
        return self.decode_wait + pages * self.decode_page if pages > 0 else 0.0

    def end(self, split_page: int) -> float:
        """When the later lane ends."""
        prefill, decode = self.prefill_end(split_page), self.decode_end(split_page)
        return prefill if prefill > decode else decode


def _usable(rate: float, fastest: float) -> float:
    if rate < LEAST_RATE_BYTES_PER_S:
        return fastest
    return max(rate, fastest / MAX_RATE_RATIO)
