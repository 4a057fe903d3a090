"""Synthetic agent sessions with the statistics of the paper's Table 2.

Source: DualPath, arXiv 2602.21548v2, Table 2 (means over 500 production trajectories a row;
the trajectories themselves are not published).

The means alone do not multiply out (60 turns of 608 + 148 tokens are 45,360, not 28,639), so
long sessions must have short turns.  We draw, per session, a turn count and a turn size that are
log-normal with correlation -1; `E[n a] = E[n] E[a] exp(-sigma^2)` then gives sigma.  A context
mean above half of the total says how long the first prompt is: `first = 2 context - total`.
Within a session the appends and generations are exponential around the session's mean.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from dualpath_sgl.evals.agents.trace import TraceRequest, TraceSession

BLOCK_SIZE_TOKENS = 64


class Row(NamedTuple):
    """Means of one row of Table 2, all in tokens but `turns`."""

    max_len: int
    turns: int
    append: int
    generation: int
    total: int
    context: int


ROWS = {
    "32k": Row(32 * 1024, 60, 608, 148, 28_639, 17_183),
    "48k": Row(48 * 1024, 106, 474, 172, 42_607, 25_120),
    "64k": Row(64 * 1024, 157, 429, 176, 55_958, 32_721),
}


def trajectories(row: Row, count: int, seed: int) -> list[TraceSession]:
    """Draw `count` sessions; the same seed gives the same sessions."""
    return [_trajectory(row, index, random.Random(f"{seed}/{row.max_len}/{index}")) for index in range(count)]


def _trajectory(row: Row, index: int, rng: random.Random) -> TraceSession:
    first_mean = 2 * row.context - row.total
    grown = row.total - first_mean
    sigma = math.sqrt(math.log(row.turns * (row.append + row.generation) / grown))
    z = rng.gauss(0.0, 1.0)
    turns = max(1, round(row.turns * math.exp(sigma * z - sigma**2 / 2)))
    size = math.exp(-sigma * z - sigma**2 / 2)

    requests: list[TraceRequest] = []
    prompt = max(1, min(row.max_len // 2, round(first_mean * rng.uniform(0.5, 1.5))))
    while len(requests) < turns:
        output = max(1, round(rng.expovariate(1 / (row.generation * size))))
        if requests and prompt + output > row.max_len:
            break
        output = min(output, row.max_len - prompt)
        requests.append(
            TraceRequest(
                prompt_tokens=prompt, output_tokens=output, hash_ids=tuple(range(prompt // BLOCK_SIZE_TOKENS))
            )
        )
        prompt += output + max(1, round(rng.expovariate(1 / (row.append * size))))
    return TraceSession(
        id=f"table2-{row.max_len // 1024}k-{index:03d}",
        block_size=BLOCK_SIZE_TOKENS,
        requests=tuple(requests),
    )
