"""One of several ranks: loads a prompt through SGLang's tree, and says what it got as a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from sglang_tree import Tree

from dualpath_sgl import plugin

task = json.loads(sys.argv[1])
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{task['port']}", rank=task["rank"], world_size=task["ranks"]
)
plugin.activate()
tree = Tree(
    task["kind"], task["page_tokens"], "mooncake", {"relay": task["options"]}, task["rank"], task["ranks"]
)
loader = tree.backend.loader
while len(loader.lanes_up()) < len(task["options"]["relays"]):
    time.sleep(0.01)
prompt = list(range(task["first_token"], task["first_token"] + task["tokens"]))
tree.store_holds(prompt)
tree.relays_come_first()
if task["loses_page"] is not None:
    # On this rank alone nothing comes from some page on.
    page_hash = tree.hashes(prompt)[task["loses_page"]]
    load = loader.load

    def load_short(keys, *places):
        got = load(keys, *places)
        lost = next((index for index, key in enumerate(keys) if page_hash in key), len(keys))
        return [count if index < lost else -1 for index, count in enumerate(got)]

    loader.load = load_short
torch.distributed.barrier()
loaded = tree.prefetch(prompt)
torch.distributed.barrier()
said = {
    "loaded": loaded,
    "wrong": len(tree.wrong()),
    "relay_bytes": loader.counts.relay_bytes,
    "own_bytes": loader.counts.own_bytes,
}
print(json.dumps(said), flush=True)
os._exit(0)
