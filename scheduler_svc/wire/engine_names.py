"""Names of engines.  A server with data parallelism is several engines, one for each DP rank.

Each DP rank matches its own cache, reads and serves its own pages, and SGLang gives every one of
them the tensor parallel ranks 0 to tp_size - 1.  So each plans and counts for itself, under the
server's id and its DP rank: `decode-0/dp0`, `decode-0/dp1`.
"""

from __future__ import annotations

import re

_DP_RANK = re.compile(r"/dp\d+$")


def engine_name(server_id: str, dp_rank: int | None) -> str:
    """What DP rank `dp_rank` of a server is called; None when the server has only one."""
    return server_id if dp_rank is None else f"{server_id}/dp{dp_rank}"


def server_id(name: str) -> str:
    """The id (`DUALPATH_ENGINE_ID`) of the server that an engine belongs to."""
    return _DP_RANK.sub("", name)


def check_server_id(server_id: str) -> None:
    """Raises ValueError when the id could be taken for a part of another server."""
    if "/" in server_id:
        raise ValueError(
            f"DUALPATH_ENGINE_ID is {server_id!r}: a slash parts a server from its DP ranks, choose a name "
            "without one"
        )
