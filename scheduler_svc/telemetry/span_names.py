"""How DualPath's spans are called: few names, and each way of KV has its own."""

from __future__ import annotations

STORE_TO_PREFILL = "store to prefill"
STORE_TO_DECODE = "store to decode"
DECODE_TO_PREFILL = "decode to prefill"
STORE_READS = (STORE_TO_PREFILL, STORE_TO_DECODE)
"""By DualPath's store lanes."""

RELAY_TO_PREFILL = "relay to prefill"
OWN_TO_PREFILL = "own read to prefill"
RELAY_LOADS = (RELAY_TO_PREFILL, OWN_TO_PREFILL)
"""A read of SGLang's for which relays might help: by whether one did."""
STORE_TO_RELAY = "store to relay"

WAIT = "wait"
"""Behind a way: from when its pages were asked for until the first could move."""
LOAD = "load"
"""A side's part in a room, from its report until it is done; its ways hang below it."""
PLAN_WAIT = "plan wait"
PLAN = "plan"
"""The scheduler's, before the path."""
REQUEST = "request"
"""A whole request as its decode engine sees it, before the path; the root where no client has one."""
ROUTE = "route"
"""The placing router's."""


def is_named(span_name: str, name: str) -> bool:
    """Whether it is `name`, alone or before a path."""
    return span_name == name or (span_name.startswith(name + " ") and not span_name.endswith(" " + WAIT))
