"""What one evaluation found: the schema of `summary.json`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Quantiles(_Record):
    p50: Seconds
    p99: Seconds
    mean: Seconds


class EngineRead(_Record):
    """Bytes one engine took in for prompts, all ranks."""

    role: str
    store_read_bytes: Count
    forwarded_bytes: Count


class ByRole(_Record):
    prefill: Count = 0
    decode: Count = 0


class PathCounts(_Record):
    """Requests per load path (`scheduler_svc.wire.protocol.Path`)."""

    none: Count = 0
    prefill: Count = 0
    decode: Count = 0
    split: Count = 0


class Mismatch(_Record):
    """The first turn of a session whose tokens are not the single server's."""

    session: str
    turn: Count
    expected: list[int] | str
    """Token ids, or the text of a chat."""
    got: list[int] | str


class ModeResult(_Record):
    mode: str
    cluster_mode: str
    policy: str | None
    """The scheduler's path policy; None where no scheduler decides."""
    tokens_equal: bool
    mismatches: list[Mismatch]
    requests: Count
    sessions: Count
    job_s: Seconds
    """Job completion time (JCT)."""
    storage_limit_s: Seconds | None = None
    """What the storage links alone need for the bytes that were read, spread evenly over the engines that
    may read; None where no rate is set."""
    ttft_s: Quantiles
    ttst_s: Quantiles
    tpot_s: Quantiles
    e2e_s: Quantiles
    hit_rate: Rate
    """Measured: prompt tokens the server did not compute, over all prompt tokens."""
    engines: dict[str, EngineRead]
    store_read_bytes: ByRole
    forwarded_bytes: Count
    paths: PathCounts
    fallbacks: dict[str, Count]
    duplicate_store_pages: Count | None
    """Pages of one request that both engines read from the store; None where nobody counts them."""


class WorkloadInfo(_Record):
    source: str
    sessions: Count
    requests: Count
    scale_factor: float
    """Replayed tokens per token of the trace."""
    longest_tokens: Count
    """Prompt and answer of the longest request, after scaling."""
    prompt_tokens: Count
    output_tokens: Count
    raw_hit_rate: Rate
    """Theoretical, of the trace as it is: whole blocks, infinite cache."""
    hit_rate: Rate
    """Theoretical, of what was replayed: whole pages, infinite cache."""
    page_size: Count
    concurrency: Count
    seed: int


class Summary(_Record):
    """Top level: of the only mode, or sums over the modes; `modes` has each one apart."""

    tokens_equal: bool
    requests: Count
    sessions: Count
    paths: PathCounts
    store_read_bytes: ByRole
    forwarded_bytes: Count
    duplicate_store_pages: Count
    traces: Count
    """Traces in `traces.json` beside this file; 0 when the cluster was run without tracing."""
    workload: WorkloadInfo
    modes: dict[str, ModeResult]

    @classmethod
    def of(cls, workload: WorkloadInfo, modes: dict[str, ModeResult], traces: int) -> Summary:
        results = list(modes.values())

        def total(field: str, part: str) -> int:
            return sum(getattr(getattr(result, field), part) for result in results)

        return cls(
            tokens_equal=all(result.tokens_equal for result in results),
            requests=sum(result.requests for result in results),
            sessions=workload.sessions,
            paths=PathCounts(**{part: total("paths", part) for part in PathCounts.model_fields}),
            store_read_bytes=ByRole(
                **{part: total("store_read_bytes", part) for part in ByRole.model_fields}
            ),
            forwarded_bytes=sum(result.forwarded_bytes for result in results),
            duplicate_store_pages=sum(result.duplicate_store_pages or 0 for result in results),
            traces=traces,
            workload=workload,
            modes=modes,
        )
