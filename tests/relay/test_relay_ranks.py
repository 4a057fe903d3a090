"""Two ranks of one engine: each loads its own objects through relays, and SGLang makes them agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from dualpath_sgl.evals.relay.world import HOST
from dualpath_sgl.launch.processes.ports import FreePorts

PROGRAM = Path(__file__).with_name("rank_program.py")
LIMIT_S = 120


class Case(NamedTuple):
    kind: str
    page_tokens: int
    tokens: int
    loses_page: int | None
    """Of the second rank, on which nothing comes from there on."""
    loaded: list[int]
    """Tokens of each prompt, on both."""
    first_token: int
    """Prompts of their own: kinds differ in size, and keys do not say so."""
    prompts: int = 1
    """At a time."""


CASES = (
    Case("full", 16, 2560, 140, [140 * 16], 1000),
    Case("full", 4, 1300, None, [1300] * 3, 2000, prompts=3),  # three calls each
    Case("full", 4, 1300, 200, [200 * 4, 1300, 1300], 3000, prompts=3),
    Case("mamba", 64, 2048, None, [2048], 4000),
    Case("swa", 16, 2048, None, [2048], 5000),
)


def test_ranks_agree_on_what_relays_have_brought(scene):
    relays = scene.relay(), scene.relay()
    task = {
        "cases": [case._asdict() for case in CASES],
        "ranks": 2,
        "port": FreePorts(HOST).take(),
        "options": {
            "relays": [f"{relay.name}={relay.endpoint}" for relay in relays],
            "least_call_bytes": 0,
            "bounce_bytes": 16 * 2**20,
        },
    }
    environment = {
        **os.environ,
        "DUALPATH_ENABLED": "1",
        "DUALPATH_MODE": "relay",
        "DUALPATH_ENGINE_ID": "prefill-0",
        "MOONCAKE_MASTER": scene.store.master,
        "MOONCAKE_PROTOCOL": "tcp",
        "MOONCAKE_TE_META_DATA_SERVER": "P2PHANDSHAKE",
        "MOONCAKE_GLOBAL_SEGMENT_SIZE": "0",
        "MOONCAKE_LOCAL_HOSTNAME": HOST,
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps({**task, "rank": rank})],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    try:
        for rank in ranks:
            out, errors = rank.communicate(timeout=LIMIT_S)
            assert rank.returncode == 0, errors[-2000:]
            said.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for of_one in said:
        assert [each["loaded"] for each in of_one] == [case.loaded for case in CASES]
        assert [each["wrong"] for each in of_one] == [0] * len(CASES)
        assert all(each["relay_bytes"] for each in of_one)
