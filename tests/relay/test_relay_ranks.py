"""Two ranks of one engine: each loads its own objects through relays, and SGLang makes them agree."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualpath_sgl.evals.relay.world import HOST
from dualpath_sgl.launch.processes.ports import FreePorts

PROGRAM = Path(__file__).with_name("rank_program.py")
LIMIT_S = 120
_first_tokens = itertools.count(1000, 10_000)
"""Prompts of their own: kinds differ in size, and keys do not say so."""


@pytest.mark.parametrize(
    ("kind", "page_tokens", "tokens", "loses_page", "loaded"),
    [
        ("full", 16, 2560, None, 2560),
        ("full", 16, 2560, 140, 140 * 16),  # one rank falls short: both have so much
        ("mamba", 64, 2048, None, 2048),
        ("swa", 16, 2048, None, 2048),
    ],
)
def test_ranks_agree_on_what_relays_have_brought(scene, kind, page_tokens, tokens, loses_page, loaded):
    relays = scene.relay(), scene.relay()
    task = {
        "kind": kind,
        "page_tokens": page_tokens,
        "tokens": tokens,
        "first_token": next(_first_tokens),
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
        "DUALPATH_RELAY": "1",
        "MOONCAKE_MASTER": scene.store.master,
        "MOONCAKE_PROTOCOL": "tcp",
        "MOONCAKE_TE_META_DATA_SERVER": "P2PHANDSHAKE",
        "MOONCAKE_GLOBAL_SEGMENT_SIZE": "0",
        "MOONCAKE_LOCAL_HOSTNAME": HOST,
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(PROGRAM),
                json.dumps({**task, "rank": rank, "loses_page": loses_page if rank == 1 else None}),
            ],
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
            said.append(json.loads(out.splitlines()[-1]))
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [each["loaded"] for each in said] == [loaded, loaded]
    assert [each["wrong"] for each in said] == [0, 0]
    assert all(each["relay_bytes"] for each in said)
