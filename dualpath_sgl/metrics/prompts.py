"""Where the pages of each prompt came from, on a prefill engine.

    needed = device + host + peer + store + recomputed

Each term has its own witness: `needed` is what SGLang's look at tree and store found; `device` and `host` are what
SGLang's prefill says it found there; `peer` and `store` are what the lanes brought; `recomputed` is what SGLang's
prefill did not find at all.  So the sum says whether a page was lost or counted twice.  It is larger where another
request has computed pages of a prompt while they were loaded.

In mode relay SGLang itself reads: what it found in the storage backend is `store`, whoever brought it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from scheduler_svc.wire.protocol import Path

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MOST_PROMPTS = 4096
"""Under way; SGLang refuses some without a word to its cache, and they would stay.  The oldest are forgotten."""


class Over(NamedTuple):
    """A prompt that was served."""

    prompt_pages: int
    needed_pages: int
    path: str
    """`none` where nothing was loaded."""
    pages: dict[str, int]
    """Needed ones, by source."""


@dataclass(eq=False)
class _Prompt:
    req: Req
    needed_tokens: int = 0
    path: str = Path.NONE.value
    brought: dict[str, int] = field(default_factory=dict)
    """Pages by source."""


class Prompts:
    """`arrives`, `matched` and `over` are called on SGLang's scheduler thread, `found` on its prefetch thread,
    `brought` on a lane's.
    """

    def __init__(self, page_size: int, on_over: Callable[[Over], None], lanes_tell: bool) -> None:
        """`page_size` in tokens.  `lanes_tell`: what is loaded; else SGLang's prefetch reads, and its word counts."""
        self._page_size = page_size
        self._on_over = on_over
        self._lanes_tell = lanes_tell
        self._by_rid: dict[str, _Prompt] = {}

    def arrives(self, req: Req) -> None:
        """SGLang is about to look for its stored prefix; it may do so again."""
        if req.rid not in self._by_rid:
            self._by_rid[req.rid] = _Prompt(req)
            if len(self._by_rid) > MOST_PROMPTS:
                del self._by_rid[next(iter(self._by_rid))]

    def matched(self, rid: str, local_tokens: int) -> None:
        """SGLang's tree holds so much."""
        self._needs(rid, local_tokens)

    def found(self, rid: str, tokens: int) -> None:
        """The store has so much beyond what the tree holds, and it is worth a load."""
        prompt = self._by_rid.get(rid)
        if prompt is not None:
            self._needs(rid, (prompt.req.storage_prefetch_last_match_len or 0) + tokens)

    def brought(self, rid: str, path: str, source: str, pages: int) -> None:
        prompt = self._by_rid.get(rid)
        if prompt is not None:
            prompt.path = path
            prompt.brought[source] = prompt.brought.get(source, 0) + pages

    def over(self, rid: str, was_served: bool) -> None:
        """SGLang has finished with it; one that was aborted counts as nothing."""
        prompt = self._by_rid.pop(rid, None)
        if prompt is None or not was_served:
            return
        req, size = prompt.req, self._page_size
        needed = prompt.needed_tokens // size
        device, host = req.cached_tokens_device // size, req.cached_tokens_host // size
        stored = req.cached_tokens_storage // size
        pages = {"device": device, "host": host, "recomputed": max(0, needed - device - host - stored)}
        pages |= prompt.brought if self._lanes_tell else {"store": stored}
        self._on_over(Over(len(req.origin_input_ids) // size, needed, prompt.path, pages))

    def _needs(self, rid: str, tokens: int) -> None:
        prompt = self._by_rid.get(rid)
        if prompt is not None:
            prompt.needed_tokens = max(prompt.needed_tokens, tokens)
