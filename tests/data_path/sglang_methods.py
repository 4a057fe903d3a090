"""The methods of SGLang that DualPath hooks, overrides or replaces, and digests of their source.

`.venv/bin/python tests/data_path/sglang_methods.py` writes the digests of the installed SGLang to
sglang_methods.json: after docs/upgrade.md's row of each changed method was read again, not before.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from pathlib import Path

DIGESTS = Path(__file__).with_suffix(".json")
GUIDE = Path(__file__).resolve().parents[2] / "docs/upgrade.md"
ROOT = "sglang.srt."

_STORE = "mem_cache.storage.mooncake_store.mooncake_store.MooncakeStore."
_ADDER = "managers.schedule_policy.PrefillAdder."
_HYBRID = "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController."
_REGISTRY = "plugins.hook_registry.HookRegistry."
NOT_HOOKED = {
    _STORE + "_tag_keys": "storage.DualPathStorage overrides it",
    _STORE + "register_mem_pool_host": "storage.DualPathStorage overrides it",
    _STORE + "register_mem_host_pool_v2": "storage.DualPathStorage overrides it",
    _STORE
    + "_get_batch_zero_copy_impl": "limits.limited_store.slow_down replaces it; relay.client.store overrides it",
    _ADDER + "budget_state": "experimental.attention_quota.quota_adder overrides it",
    _ADDER + "add_one_req": "experimental.attention_quota.quota_adder overrides it",
    _ADDER + "add_chunked_req": "experimental.attention_quota.quota_adder overrides it",
    "arg_groups.pd_disaggregation_hook.handle_pd_disaggregation": "start.facts judges flags before it",
    "arg_groups.serving_hook.handle_other_validations": "start.facts judges flags after it",
    _REGISTRY + "apply_hooks": "hooks.assert_applied reads what it leaves",
    _REGISTRY + "_apply_target": "hooks.assert_applied reads what it leaves",
    _HYBRID + "supports_page_envelope_host": "relay.client.prefetch.ahead takes no lease of its own",
    "mem_cache.pool_host.base.HostKVCache.__init__": "cpu_profile.plugin replaces it",
    "managers.scheduler.Scheduler.on_idle": "cpu_profile.plugin replaces it",
}
"""Method -> what of ours depends on it."""


def watched() -> dict[str, str]:
    """Every method, without `sglang.srt.` -> what of ours depends on it."""
    from dualpath_sgl import hooks, intake, relay_hooks
    from dualpath_sgl.metrics import hooks as of_metrics
    from dualpath_sgl.relay.client.prefetch import hooks as of_relays
    from dualpath_sgl.spans import stages

    found: dict[str, list[str]] = {}
    ours = hooks.HOOKS + intake.HOOKS + stages.HOOKS + relay_hooks.HOOKS + of_metrics.HOOKS
    for target, hook, _ in ours + of_relays.HOOKS + of_relays.TRACED:
        module = hook.__module__.removeprefix("dualpath_sgl.")
        found.setdefault(target.removeprefix(ROOT), []).append(f"{module}.{hook.__name__}")
    return {method: f"hooked by {', '.join(names)}" for method, names in found.items()} | NOT_HOOKED


def digests(methods: dict[str, str], package: Path | None = None) -> dict[str, str | None]:
    """Of the installed source; None where there is no such method any more.  Imports nothing of SGLang."""
    if package is None:
        spec = importlib.util.find_spec("sglang")
        assert spec is not None and spec.submodule_search_locations, "SGLang is not installed"
        package = Path(spec.submodule_search_locations[0])
    return {method: _digest(package / "srt", method.split(".")) for method in sorted(methods)}


def _digest(folder: Path, path: list[str]) -> str | None:
    while path and not (file := folder.joinpath(path[0] + ".py")).exists():
        folder, path = folder / path[0], path[1:]
    if not path:
        return None
    node: ast.AST = ast.parse(file.read_text())
    for name in path[1:]:
        inner = [part for part in getattr(node, "body", ()) if getattr(part, "name", None) == name]
        if not inner:
            return None
        node = inner[-1]
    return hashlib.sha256(_normal(node).encode()).hexdigest()[:16]


def _normal(function: ast.AST) -> str:
    """Without comments, docstring and layout."""
    body = getattr(function, "body", [])
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        function.body = body[1:] or [ast.Pass()]
    return ast.unparse(function)


def relied_on() -> dict[str, str]:
    """Rows of the guide's tables: method -> what DualPath takes for granted."""
    rows = [line.strip("| ").split(" | ") for line in GUIDE.read_text().splitlines()]
    return {row[0].strip("`"): row[-1] for row in rows if len(row) == 3 and row[0].startswith("`")}


def changes(now: dict[str, str | None], before: dict[str, str]) -> list[str]:
    """A sentence for every method that is not what it was."""
    uses, reasons = watched(), relied_on()
    return [
        f"sglang.srt.{method} {'is gone' if digest is None else 'has changed'}; {uses[method]}.  It is taken "
        f"for granted: {reasons.get(method, 'see docs/upgrade.md')}"
        for method, digest in now.items()
        if digest != before.get(method)
    ]


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(digests(watched()), indent=1) + "\n")
