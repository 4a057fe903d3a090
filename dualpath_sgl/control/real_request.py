"""Which of SGLang's requests DualPath has to do with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def is_real(req: Req) -> bool:
    """No health check or warm-up, which pass through the same queues with a fake bootstrap host."""
    from sglang.srt.disaggregation.utils import _is_fake_transfer

    return req.bootstrap_room is not None and not _is_fake_transfer(req)
