"""Starts one SGLang server with its plugins proven to run: `python -m dualpath_sgl.launch.engine <sglang arguments>`.

SGLang logs a plugin or a hook that fails and goes on without it: an engine would serve, but
without DualPath.  Here each process of the engine (server, schedulers, detokenizer) stops
instead.  Its children are spawned, and a spawned Python process imports the parent's main
module first, so the check below runs in all of them before SGLang's own code.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile

PLUGIN_SWITCHES = {
    "dualpath_sgl.cpu_profile.plugin": "SGLANG_USE_CPU_ENGINE",
    "dualpath_sgl.plugin": "DUALPATH_ENABLED",
}
"""Plugin module (attribute `activated`) -> the environment variable that is `1` when it must run."""


def require_plugins() -> None:
    """Load SGLang's plugins; exit when one that is switched on, or a hook, did not take effect."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    for module, switch in PLUGIN_SWITCHES.items():
        if os.getenv(switch) == "1" and not importlib.import_module(module).activated:
            _refuse(f"{switch}=1, but plugin {module} did not run (its error is logged above, if it has one)")
    missing = set(HookRegistry._hooks) - HookRegistry._patched
    if missing:
        _refuse(f"hooks not applied: {', '.join(sorted(missing))}")


def _refuse(problem: str) -> None:
    # Not an exception: SGLang's parent processes wait for a report that would never come.
    print(
        f"dualpath_sgl.launch.engine: {problem}. What is wrong: dualpath doctor", file=sys.stderr, flush=True
    )
    os._exit(1)


if __name__ == "__main__":
    # SGLang sets this too, but only after the plugins have imported modules of SGLang that import
    # prometheus_client, which looks once: without it /metrics stays empty.
    metrics_directory = tempfile.TemporaryDirectory(prefix="sglang-metrics-")
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics_directory.name)

if __name__ in ("__main__", "__mp_main__"):
    require_plugins()

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from dualpath_sgl.start.verdict import Refused

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    except Refused as refusal:
        sys.exit(f"dualpath_sgl.launch.engine: {refusal}")
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
