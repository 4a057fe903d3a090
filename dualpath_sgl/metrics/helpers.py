"""What relays and decode engines brought to this rank or had from it, and what of it failed.

Their threads count in plain numbers; here the growth of these is added to metrics, once a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dualpath_sgl.relay.client.counts import Counts
    from dualpath_sgl.relay.resident.server import Served

LOADS = {
    "own_bytes": "Bytes read by the engine's own client of the store.",
    "own_objects": "Objects asked of the engine's own client of the store.",
    "loads": "Calls of SGLang's that helpers took part in.",
    "direct_calls": "Calls that were too small, or met no helper.",
    "overdue": "Objects taken back from helpers at a load's end because they had not come.",
}
"""Fields of `Counts`."""
LANE = {
    "batches": "Batches that landed.",
    "bytes": "Bytes that landed.",
    "objects": "Objects that landed.",
    "failed_objects": "Objects that it could not bring; others were asked for them.",
    "given_back": "Objects claimed for it that did not come, whatever the reason.",
    "refused": "Batches that it refused.",
    "invalid": "Batches pulled too late to count.",
    "lost": "Times that it was given up: silent, gone, or its bytes did not come.",
    "hung_pulls": "Pulls that hung.",
    "wait_s": "Seconds between asking for a batch and its being ready, added up.",
    "pull_s": "Seconds in pulls, added up.",
    "copy_s": "Seconds in copies out of bounce memory, added up.",
}
"""Fields of `LaneCounts`."""
SERVED = {
    "questions": "Questions for what this decode engine holds.",
    "objects": "Objects whose addresses were given.",
    "bytes": "Bytes of objects that stayed until they were released.",
    "not_held": "Objects asked for that were not held.",
    "invalid": "Leases in which an object did not stay.",
    "expired": "Leases that were not released in time.",
}
"""Fields of `Served`."""
KINDS = {"relays": "relay", "residents": "decode"}
"""Of helpers, by the field of `Counts`."""
SOURCE = {"relay": "relay", "decode": "peer"}
"""Of their bytes."""


class NewCounter(Protocol):
    def __call__(self, name: str, text: str, *labels: str) -> Callable[..., Any]: ...


class HelperMetrics:
    """For one thread."""

    def __init__(self, counter: NewCounter, came: Callable[[str, int], None]) -> None:
        """`came(source, bytes)`: so much more has come."""
        self._came = came
        self._loads = {name: counter(f"load_{name}", text)() for name, text in LOADS.items()}
        self._served = {name: counter(f"served_{name}", text)() for name, text in SERVED.items()}
        self._lane = {
            name: counter(f"helper_{_with_unit(name)}", text, "helper", "kind") for name, text in LANE.items()
        }
        self._counts: Counts | None = None
        self._seen: dict[tuple[str, ...], float] = {}

    def now(self, counts: Counts) -> None:
        """As of now; other counts than the last time began at 0, with storage that was attached anew."""
        if counts is not self._counts:
            self._counts = counts
            self._seen = {key: value for key, value in self._seen.items() if key[0] == "served"}
        for name, metric in self._loads.items():
            grown = self._grown(("load", name), getattr(counts, name))
            metric.inc(grown)
            if name == "own_bytes":
                self._came("store", int(grown))
        for of, kind in KINDS.items():
            for helper, lane in list(getattr(counts, of).items()):
                for name, metric in self._lane.items():
                    grown = self._grown((kind, helper, name), getattr(lane, name))
                    metric(helper, kind).inc(grown)
                    if name == "bytes":
                        self._came(SOURCE[kind], int(grown))

    def served(self, served: Served) -> None:
        """As of now, since the engine began."""
        for name, metric in self._served.items():
            metric.inc(self._grown(("served", name), getattr(served, name)))

    def _grown(self, key: tuple[str, ...], value: float) -> float:
        before = self._seen.get(key, 0.0)
        self._seen[key] = value
        return value - before


def _with_unit(name: str) -> str:
    return f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name
