"""A cluster on an IPv6 address: page server and forwarding reach each other there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import zmq

from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_protocol import Ended, Pull, decode_to_lane
from scheduler_svc.wire.protocol import encode

PATIENCE_S = 30.0
OWNER = """
import sys, torch
from dualpath_sgl.lanes.forward import Forwarder
memory = torch.arange(4096, dtype=torch.int32)
forwarder = Forwarder("::1", "tcp", "", [memory])
print(forwarder.mooncake_address, memory.data_ptr(), flush=True)
sys.stdin.read()
"""
READER = """
import sys, torch
from dualpath_sgl.lanes.forward import Forwarder
memory = torch.zeros(4096, dtype=torch.int32)
forwarder = Forwarder("::1", "tcp", "", [memory])
assert forwarder.read(sys.argv[1], [memory.data_ptr()], [int(sys.argv[2])], [4 * 4096])
assert torch.equal(memory, torch.arange(4096, dtype=torch.int32))
"""


def test_a_page_server_answers_at_an_ipv6_address():
    server = PageServer("::1", "session", "fingerprint", lease_s=1.0, subscribe_timeout_s=1.0)
    assert server.endpoint.startswith("tcp://[::1]:")
    server.start()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.connect(server.endpoint)
        server.offer(7, 0)
        socket.send(encode(Pull(room=7, first_page=0, end_page=1, fingerprint="another")))
        assert socket.poll(PATIENCE_S * 1000)
        assert isinstance(decode_to_lane(socket.recv()), Ended)


@pytest.mark.timeout(120)
def test_pages_are_forwarded_between_ipv6_addresses():
    environment = os.environ | {"MC_USE_IPV6": "1", "MC_LOG_LEVEL": "ERROR"}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with owner:
        try:
            mooncake_address, address = owner.stdout.readline().split()
            subprocess.run(
                [sys.executable, "-c", READER, mooncake_address, address], env=environment, check=True
            )
        finally:
            owner.kill()
