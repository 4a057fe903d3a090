"""A decode engine's tree as a process: it computes prompts and serves them until it is ended."""

from __future__ import annotations

import sys

from decode_tree import DecodeTree, prompt

if __name__ == "__main__":
    master, pages, *seeds = sys.argv[1:]
    tree = DecodeTree(master)
    for seed in seeds:
        tree.compute(prompt(int(pages), int(seed)))
        tree.settles()
    print(f"serves {tree.backend.objects} at {tree.backend.fetch_endpoint}", flush=True)
    sys.stdin.read()
