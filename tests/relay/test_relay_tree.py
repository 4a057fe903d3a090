"""SGLang's tree, controller and threads load prompts of several kinds through relays, by both names of the backend."""

from __future__ import annotations

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_tree import Tree

from dualpath_sgl import plugin
from dualpath_sgl.evals.relay.world import HOST, eventually
from scheduler_svc.wire.protocol import Mode

DYNAMIC = {
    "backend_name": "relay",
    "module_path": "dualpath_sgl.storage",
    "class_name": "DualPathStorage",
    "interface_v1": 1,
}


@pytest.mark.parametrize(
    ("kind", "page_tokens", "tokens", "backend", "mode"),
    [
        ("full", 16, 2560, "mooncake", "relay"),
        ("full", 16, 2048, "dynamic", "relay"),
        ("mamba", 64, 2048, "mooncake", "auto"),
        ("swa", 16, 2048, "mooncake", "auto"),
    ],
)
def test_sglang_loads_a_prompt_through_relays(
    own_fresh_process, scene, monkeypatch, kind, page_tokens, tokens, backend, mode
):
    for name, value in {
        "MASTER": scene.store.master,
        "PROTOCOL": "tcp",
        "TE_META_DATA_SERVER": "P2PHANDSHAKE",
        "GLOBAL_SEGMENT_SIZE": "0",
        "LOCAL_HOSTNAME": HOST,
    }.items():
        monkeypatch.setenv(f"MOONCAKE_{name}", value)
    relays = scene.relay(), scene.relay()
    options = {
        "relays": [f"{relay.name}={relay.endpoint}" for relay in relays],
        "least_call_bytes": 0,
        "bounce_bytes": 16 * 2**20,
    }
    for name, value in {"ENABLED": "1", "ENGINE_ID": "prefill-0", "MODE": mode}.items():
        monkeypatch.setenv(f"DUALPATH_{name}", value)
    plugin.activate()
    HookRegistry.apply_hooks()
    tree = Tree(kind, page_tokens, backend, {"relay": options, **(DYNAMIC if backend == "dynamic" else {})})
    assert tree.backend.dualpath_mode is Mode.RELAY
    loader = tree.backend.loader
    eventually(lambda: len(loader.lanes_up()) == 2, "both relays may be asked")
    prompt = list(range(1000, 1000 + tokens))
    tree.store_holds(prompt)
    tree.relays_come_first()
    assert tree.prefetch(prompt) == tokens
    assert tree.wrong() == []
    assert loader.counts.relay_bytes > 0
    read = sum(map(len, tree.read))
    assert loader.counts.own_objects + sum(lane.objects for lane in loader.counts.relays.values()) == read
