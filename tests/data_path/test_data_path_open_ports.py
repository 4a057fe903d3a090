"""Facts that docs/security.md warns of.  When Mooncake changes, the document has to follow."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

SIZE_BYTES = 1 << 20
OURS, FOREIGN = 7, 66
DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"

ENGINE = """
import sys, torch
from dualpath_sgl.lanes.forward import Forwarder
memory = torch.full((int(sys.argv[1]),), int(sys.argv[2]), dtype=torch.uint8)
forwarder = Forwarder("127.0.0.1", "tcp", "", [memory])
print("READY", forwarder.mooncake_address, flush=True)
sys.stdin.readline()
print("HOLDS", *set(memory[:4096].tolist()), flush=True)
"""


class Engine(NamedTuple):
    process: subprocess.Popen
    mooncake_address: str

    def said(self, word: str) -> list[str]:
        return next(line.split()[1:] for line in self.process.stdout if line.startswith(word))


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A process that holds a forwarding engine with DUALPATH_HOST=127.0.0.1."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ENGINE, str(SIZE_BYTES), str(OURS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        ready = Engine(process, "")
        yield ready._replace(mooncake_address=ready.said("READY")[0])
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.case("mooncake_ports_open")
def test_mooncake_listens_on_all_interfaces_and_the_document_says_so(engine):
    connections = psutil.Process(engine.process.pid).net_connections(kind="tcp")
    listening = {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    assert listening and listening <= {"0.0.0.0", "::"}, "Mooncake listens where it is told to: say so"
    text = DOCUMENT.read_text()
    assert re.search(r"\*\*all interfaces, whatever host is given\*\*", text)


@pytest.mark.case("mooncake_ports_open")
def test_a_stranger_reads_and_writes_an_engines_memory_and_the_document_says_so(engine):
    from mooncake.engine import TransferEngine

    stranger = TransferEngine()
    assert stranger.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    mine = torch.zeros(4096, dtype=torch.uint8)
    assert stranger.register_memory(mine.data_ptr(), mine.nbytes) == 0
    address = stranger.get_first_buffer_address(engine.mooncake_address)
    assert stranger.transfer_sync_read(engine.mooncake_address, mine.data_ptr(), address, mine.nbytes) == 0
    assert (mine == OURS).all()
    mine.fill_(FOREIGN)
    assert stranger.transfer_sync_write(engine.mooncake_address, mine.data_ptr(), address, mine.nbytes) == 0
    engine.process.stdin.write("\n")
    engine.process.stdin.flush()
    assert engine.said("HOLDS") == [str(FOREIGN)]
    text = DOCUMENT.read_text()
    assert "reading and writing all memory it registered" in text and "one malformed message ends" in text
