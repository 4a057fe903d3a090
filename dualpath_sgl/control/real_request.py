"""Which of SGLang's requests DualPath has to do with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def real(requests: Iterable[Req]) -> list[Req]:
    """All but health checks and warm-ups, which pass through the same queues with fake bootstrap hosts."""
    from sglang.srt.disaggregation.utils import _is_fake_transfer

    return [req for req in requests if req.bootstrap_room is not None and not _is_fake_transfer(req)]
