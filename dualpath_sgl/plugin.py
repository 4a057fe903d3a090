"""SGLang general plugin (entry point `sglang.srt.plugins`): registers DualPath's backend, checks and hooks."""

from __future__ import annotations

activated = False
"""Whether `activate` ran to its end in this process (the launcher checks)."""


def activate() -> None:
    global activated
    from dualpath_sgl.start.config import settings

    if settings().enabled:
        from dualpath_sgl import hooks, intake, relay_hooks
        from dualpath_sgl.metrics import hooks as metric_hooks
        from dualpath_sgl.relay.client.register import register
        from dualpath_sgl.start import facts
        from scheduler_svc.wire.protocol import Mode

        intake.register()
        register()
        metric_hooks.register()
        facts.register_checks()
        hooks.register(decode_side=settings().asked_mode is not Mode.RELAY)
        if settings().asked_mode is not Mode.DECODE_SIDE:
            relay_hooks.register()
    activated = True
