"""One of several ranks: loads prompts through SGLang's tree, and says what it got, a line of JSON for each."""

from __future__ import annotations

import json
import os
import random
import sys
import time

import torch
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_tree import Tree

from dualpath_sgl import plugin


def load(task: dict, case: dict) -> dict:
    tree = Tree(
        case["kind"], case["page_tokens"], "mooncake", {"relay": task["options"]}, task["rank"], task["ranks"]
    )
    loader = tree.backend.loader
    while len(loader.lanes_up()) < len(task["options"]["relays"]):
        time.sleep(0.01)
    firsts = [case["first_token"] + 10_000 * number for number in range(case["prompts"])]
    prompts = [list(range(first, first + case["tokens"])) for first in firsts]
    for prompt in prompts:
        tree.store_holds(prompt)
    tree.relays_come_first()
    if task["rank"] == 1:
        dawdle(loader)
        if case["loses_page"] is not None:
            # On this rank alone nothing comes from some page on.
            lose_from(loader, tree.hashes(prompts[0])[case["loses_page"]])
    torch.distributed.barrier()
    handles = [tree.begin(prompt, f"request-{number}") for number, prompt in enumerate(prompts)]
    tree.ends(*handles)
    torch.distributed.barrier()
    return {
        "loaded": [tree.tree.prefetch_loaded_tokens_by_reqid.get(handle) for handle in handles],
        "wrong": len(tree.wrong()),
        "relay_bytes": loader.counts.relay_bytes,
    }


def dawdle(loader) -> None:
    """Calls of this rank take longer, now the present one and now the one ahead."""
    load, rng = loader.load, random.Random(7)

    def load_later(*places):
        time.sleep(rng.choice([0, 0.05, 0.2]))
        return load(*places)

    loader.load = load_later


def lose_from(loader, page_hash: str) -> None:
    whole = loader.load

    def load_short(keys, *places):
        got = whole(keys, *places)
        lost = next((index for index, key in enumerate(keys) if page_hash in key), len(keys))
        return [count if index < lost else -1 for index, count in enumerate(got)]

    loader.load = load_short


task = json.loads(sys.argv[1])
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{task['port']}", rank=task["rank"], world_size=task["ranks"]
)
plugin.activate()
HookRegistry.apply_hooks()
for case in task["cases"]:
    print(json.dumps(load(task, case)), flush=True)
os._exit(0)
