"""One rank's process, as an engine has several: counts into the directory that they share, and stays until it is told.

`rank_counts.py RANK`; prints a line when it has counted, ends when its input does.
"""

from __future__ import annotations

import sys

from dualpath_sgl.metrics.rank import RankMetrics
from dualpath_sgl.metrics.sampler import Sampler
from scheduler_svc.wire.protocol import Outcome, Path, RankInfo, Role, Workload

rank = int(sys.argv[1])
metrics = RankMetrics(
    RankInfo(
        engine_id="prefill-0", role=Role.PREFILL, rank=rank, tp_size=2, url="http://127.0.0.1:1",
        fingerprint="f", page_size=16, page_bytes=1000,
    )
)  # fmt: skip
metrics.room_over("a", Path.SPLIT, Outcome.FALLBACK, "scheduler away", [])
sampler = Sampler(
    metrics,
    workload=lambda: Workload(sequences=10 + rank),
    connected=lambda: rank == 0,
    counts=lambda: None,
)
sampler.start()
print("counted", flush=True)
sys.stdin.read()
