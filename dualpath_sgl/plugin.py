"""SGLang general plugin (entry point `sglang.srt.plugins`): registers DualPath's hooks."""

from __future__ import annotations

activated = False
"""Whether `activate` ran to its end in this process (the launcher checks)."""


def activate() -> None:
    global activated
    from dualpath_sgl.config import settings

    if settings().enabled:
        from dualpath_sgl import engine_facts, hooks
        from dualpath_sgl.forward import bound_mooncakes_patience

        bound_mooncakes_patience()
        engine_facts.register_checks()
        hooks.register(traced=settings().otlp_endpoint is not None)
    activated = True
