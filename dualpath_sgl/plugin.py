"""SGLang general plugin (entry point `sglang.srt.plugins`): registers DualPath's hooks, or its backend."""

from __future__ import annotations

activated = False
"""Whether `activate` ran to its end in this process (the launcher checks)."""


def activate() -> None:
    global activated
    from dualpath_sgl.start.config import settings

    if settings().enabled:
        from dualpath_sgl import hooks
        from dualpath_sgl.lanes.forward import bound_mooncakes_patience
        from dualpath_sgl.start import facts

        bound_mooncakes_patience()
        facts.register_checks()
        hooks.register(traced=settings().otlp_endpoint is not None)
    if settings().relay:
        from dualpath_sgl import relay_hooks
        from dualpath_sgl.relay.client.register import register

        register()
        relay_hooks.register()
    activated = True
