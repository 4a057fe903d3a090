"""Path policies: for one request, which side reads which pages from the store.

A policy sees one `PathRequest` and answers with the split page `x` (DESIGN section 1): the PE
gets pages `[L_P, x)` from the DE and `[x, K)` from the store; the DE reads `[L_D, x)` from the
store.  Nothing here does I/O or looks at a clock; the service and the simulator run the same
objects.  Callers go through `choose_path`, which keeps the bounds every policy must respect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from scheduler_svc.policies.lane_model import LaneModel
from scheduler_svc.policies.path_request import PathRequest

FORWARD_COST_S = 0.005
"""What it costs to forward anything at all: the plan's way to the DE, its first batch's way back and
the hop of the last batch (8 MiB, the smallest, take 4 ms at the 2 GB/s measured between two processes)."""

FORWARD_COST_BYTES = 4 * 1024 * 1024
"""The same while no rate is known: 5 ms of a link of 0.8 GB/s."""

DEFAULT_PATH_POLICY = "split"


class SplitReason(NamedTuple):
    """Why `Split` chose, put into words by `str`: that takes longer than choosing does."""

    request: PathRequest
    lanes: LaneModel
    chosen: str
    candidates: list[tuple[str, float]]
    """Name and expected end."""

    def __str__(self) -> str:
        unit, scale = ("ms", 1e3) if self.lanes.rates_known else ("MB", 1e-6)
        expected = ", ".join([f"{name} {end * scale:.1f}" for name, end in self.candidates])
        prefill, decode = self.request.prefill, self.request.decode
        return (
            f"{self.chosen}: expected ends ({unit}) {expected}; "
            f"queues {prefill.read_queue_bytes} and {decode.read_queue_bytes} B, "
            f"rates {prefill.read_rate_bytes_per_s:.3g} and {decode.read_rate_bytes_per_s:.3g} B/s"
        )


class PathChoice(NamedTuple):
    split_page: int
    """x."""
    reason: str | SplitReason
    """The numbers that led to it, for people; as text only when someone reads it."""
    lanes: LaneModel | None = None
    """Where the policy made one."""


class PathPolicy(Protocol):
    """A named rule.  State (a counter, say) lives in the object and nowhere else."""

    name: str

    def choose(self, request: PathRequest) -> PathChoice:
        """Called only when a storage read is needed that either side could make.

        The answer must satisfy `request.least_split <= split_page <= request.hit_pages`.
        """


def choose_path(policy: PathPolicy, request: PathRequest) -> PathChoice:
    """Ask the policy, unless there is nothing to decide.

    Raises ValueError when the policy answers outside its bounds: a fault in the policy.
    """
    least, hit = request.least_split, request.hit_pages
    if hit <= request.prefill_local_pages:
        held = request.prefill_local_pages
        return PathChoice(least, f"nothing to load: {hit} pages stored, prefill holds {held}")
    if least == hit:
        return PathChoice(hit, f"no storage read: decode holds all {hit} pages")
    choice = policy.choose(request)
    if not least <= choice.split_page <= hit:
        raise ValueError(f"policy {policy.name} chose page {choice.split_page} outside [{least}, {hit}]")
    return choice


class PrefillPath:
    """The PE reads everything (the paper's Basic)."""

    name = "prefill"

    def choose(self, request: PathRequest) -> PathChoice:
        return PathChoice(request.least_split, "always the prefill side")


class DecodePath:
    """The DE reads everything and forwards it."""

    name = "decode"

    def choose(self, request: PathRequest) -> PathChoice:
        return PathChoice(request.hit_pages, "always the decode side")


class RoundRobin:
    """The sides take turns, prefill first (the paper's reference in its load-balance figure)."""

    name = "round_robin"

    def __init__(self) -> None:
        self._decode_is_next = False

    def choose(self, request: PathRequest) -> PathChoice:
        decode, self._decode_is_next = self._decode_is_next, not self._decode_is_next
        if decode:
            return PathChoice(request.hit_pages, "turn of the decode side")
        return PathChoice(request.least_split, "turn of the prefill side")


class ShorterQueue:
    """Read on the side with fewer bytes queued for storage reads (paper section 6.1, path choice).

    Equal queues take turns, so that an idle cluster uses both storage links.
    """

    name = "shorter_queue"

    def __init__(self) -> None:
        self._ties = RoundRobin()

    def choose(self, request: PathRequest) -> PathChoice:
        prefill_bytes = request.prefill.read_queue_bytes
        decode_bytes = request.decode.read_queue_bytes
        queues = f"read queues: prefill {prefill_bytes} B, decode {decode_bytes} B"
        if prefill_bytes < decode_bytes:
            return PathChoice(request.least_split, f"{queues}: prefill is shorter")
        if decode_bytes < prefill_bytes:
            return PathChoice(request.hit_pages, f"{queues}: decode is shorter")
        turn = self._ties.choose(request)
        return PathChoice(turn.split_page, f"{queues}: equal, {turn.reason}")


class Split:
    """Both sides read a part, such that both lanes are expected to end together (DESIGN section 2).

    `LaneModel` gives the end of the later lane for each `x`.  The earliest of these is taken, and
    of equal ones the first:

        prefill   x = L_D     end
        split     x = x*      end + FORWARD_COST_S
        decode    x = K       end + FORWARD_COST_S

    where x* is the page in (max(L_P, L_D), K) whose end is earliest.  Both lanes then end within
    one page's time of each other, or a pure path is no worse.  While no rate is known, ends are in
    bytes of the longer lane and the cost is FORWARD_COST_BYTES.

    So a share that saves less than it costs is never forwarded; with very unequal queues the
    split degenerates to the path of the shorter one; and a DE that lacks many pages the PE has
    (L_D far below L_P) is asked only if reading those too still pays.

    A longer PE queue never lowers x, a longer DE queue never raises it.
    """

    name = "split"

    def choose(self, request: PathRequest) -> PathChoice:
        lanes = LaneModel.of(request)
        cost = FORWARD_COST_S if lanes.rates_known else FORWARD_COST_BYTES
        name, page, end = "prefill", request.least_split, lanes.end(request.least_split)
        candidates = [(name, end)]
        meeting = _where_lanes_meet(lanes)
        for other, other_page in (("split", meeting), ("decode", request.hit_pages)):
            if other_page is None:
                continue
            other_end = lanes.end(other_page) + cost
            candidates.append((other, other_end))
            if other_end < end:
                name, page, end = other, other_page, other_end
        return PathChoice(page, SplitReason(request, lanes, name, candidates), lanes)


def _where_lanes_meet(lanes: LaneModel) -> int | None:
    """The split of both lanes whose later end is earliest; None when there is no page for each."""
    first = max(lanes.prefill_local_pages, lanes.decode_local_pages) + 1
    last = lanes.hit_pages - 1
    if first > last:
        return None
    # prefill_wait + (K - x) * prefill_page == decode_wait + (x - L_D) * decode_page, solved for x
    meeting = (
        lanes.prefill_wait
        - lanes.decode_wait
        + lanes.hit_pages * lanes.prefill_page
        + lanes.decode_local_pages * lanes.decode_page
    ) / (lanes.prefill_page + lanes.decode_page)
    below = math.floor(min(max(meeting, first), last))
    above = min(below + 1, last)
    return below if lanes.end(below) <= lanes.end(above) else above


PATH_POLICIES: dict[str, Callable[[], PathPolicy]] = {
    policy.name: policy for policy in (PrefillPath, DecodePath, RoundRobin, ShorterQueue, Split)
}


def path_policy(name: str) -> PathPolicy:
    """A fresh policy.  Raises ValueError naming the known ones."""
    if name not in PATH_POLICIES:
        raise ValueError(f"policy {name!r} is unknown; choose one of {', '.join(PATH_POLICIES)}")
    return PATH_POLICIES[name]()
