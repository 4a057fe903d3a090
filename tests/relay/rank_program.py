"""One of several ranks: loads prompts through SGLang's tree, and says what it got, a line of JSON for each."""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from sglang_tree import Tree

from dualpath_sgl import plugin


def load(task: dict, case: dict) -> dict:
    tree = Tree(
        case["kind"], case["page_tokens"], "mooncake", {"relay": task["options"]}, task["rank"], task["ranks"]
    )
    loader = tree.backend.loader
    while len(loader.lanes_up()) < len(task["options"]["relays"]):
        time.sleep(0.01)
    prompt = list(range(case["first_token"], case["first_token"] + case["tokens"]))
    tree.store_holds(prompt)
    tree.relays_come_first()
    if case["loses_page"] is not None and task["rank"] == 1:
        # On this rank alone nothing comes from some page on.
        lose_from(loader, tree.hashes(prompt)[case["loses_page"]])
    torch.distributed.barrier()
    loaded = tree.prefetch(prompt)
    torch.distributed.barrier()
    return {"loaded": loaded, "wrong": len(tree.wrong()), "relay_bytes": loader.counts.relay_bytes}


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
for case in task["cases"]:
    print(json.dumps(load(task, case)), flush=True)
os._exit(0)
