"""How fast pages leave a decode engine's host memory, beside Mooncake alone with as many bytes.

The forwards are those of a `resident` cell (`evals/gpu/loads.py`), as its `forward` spans time them;
Mooncake alone moves the same number of bytes between two plain processes of the same host while the
cluster idles.  Its memory is plain, in one block: the most that it can do.  How it does with blocks of
one page, and with memory pinned as SGLang's host pools are, tells what a gap is made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from dualpath_sgl.evals.gpu.loads import Cell
from dualpath_sgl.evals.load.raw_rates import Place, raw_rates
from dualpath_sgl.evals.spans import jaeger
from scheduler_svc.telemetry.span_names import DECODE_TO_PREFILL

RAW_REPETITIONS = 7
PLAIN = "plain memory, one block"


@dataclass(frozen=True)
class RawRead:
    label: str
    of_pages: bool = False
    pinned: bool = False


RAW_READS = (
    RawRead(PLAIN),
    RawRead("plain memory, blocks of a page", of_pages=True),
    RawRead("pinned memory, one block", pinned=True),
)


class Forward(NamedTuple):
    """One `forward` span."""

    size_bytes: int
    bytes_per_s: float
    transfers: int
    """Calls of Mooncake; with more than one, the span holds gaps between them."""
    blocks: int


@dataclass
class Goodput:
    tokens: int
    """Length of the prompt whose pages are forwarded."""
    size_bytes: int
    """Forwarded a sample."""
    raw_bytes_per_s: dict[str, list[float]] = field(default_factory=dict)
    """Label of `RAW_READS` -> repetitions."""
    forwards: list[Forward] = field(default_factory=list)

    @property
    def bytes_per_s(self) -> float | None:
        return median(forward.bytes_per_s for forward in self.forwards) if self.forwards else None


def beside_mooncake(cell: Cell, host: str, page_bytes: int) -> Goodput:
    """Measure Mooncake alone on `host` with the bytes of a sample of `cell`.  Raises EvalError."""
    found = Goodput(cell.tokens, cell.forwarded_bytes // len(cell.job_s))
    here = Place(host)
    for read in RAW_READS:
        found.raw_bytes_per_s[read.label] = raw_rates(
            here,
            here,
            found.size_bytes,
            RAW_REPETITIONS,
            block_bytes=page_bytes if read.of_pages else None,
            pinned=read.pinned,
        )
    return found


def forwards(spans_path: Path, windows_ns: Iterable[tuple[int, int]]) -> list[Forward]:
    """The forwards that began in one of the windows (since 1970), in order of their begins."""
    windows = list(windows_ns)
    found = []
    for trace in jaeger.traces(jaeger.read_lines(spans_path)):
        for span in trace["spans"]:
            begun_ns = span["startTime"] * 1000
            if span["operationName"] == DECODE_TO_PREFILL and any(a <= begun_ns < b for a, b in windows):
                tags = {tag["key"]: tag["value"] for tag in span["tags"]}
                forward = Forward(
                    int(tags["dualpath.bytes"]),
                    int(tags["dualpath.bytes"]) / (max(span["duration"], 1) / 1e6),
                    int(tags["dualpath.transfers"]),
                    int(tags["dualpath.blocks"]),
                )
                found.append((begun_ns, forward))
    return [forward for _, forward in sorted(found)]
