"""Messages between client and relay: bounded, and checked when they are decoded."""

from __future__ import annotations

import pytest

from dualpath_sgl.relay import wire
from dualpath_sgl.relay.wire import Fetch, Hello, Ready, decode_to_client, decode_to_relay
from scheduler_svc.wire.protocol import encode


def test_the_largest_fetch_fits_into_a_message():
    fetch = Fetch(
        lease=2**63 - 1,
        keys=("k" * (wire.MOST_KEYS_CHARACTERS // wire.MOST_OBJECTS),) * wire.MOST_OBJECTS,
        sizes=(wire.MAX_OBJECT_BYTES,) * wire.MOST_OBJECTS,
        left_bytes=2**53,
    )
    assert decode_to_relay(encode(fetch)) == fetch


def test_the_largest_answer_fits_into_a_message():
    ready = Ready(
        lease=2**63 - 1,
        mooncake_address="s" * 256,
        addresses=(2**63 - 1,) * wire.MOST_OBJECTS,
        got=(wire.MAX_OBJECT_BYTES,) * wire.MOST_OBJECTS,
    )
    assert decode_to_client(encode(ready)) == ready


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"type":"fetch","lease":1,"keys":["a"],"sizes":[]}', "1 keys and 0 sizes"),
        ('{"type":"fetch","lease":1,"keys":[],"sizes":[]}', "keys"),
        ('{"type":"fetch","lease":0,"keys":["a"],"sizes":[1]}', "lease"),
        ('{"type":"fetch","lease":1,"keys":["a"],"sizes":[0]}', "sizes"),
        ('{"type":"fetch","lease":1,"keys":["a\\u0007"],"sizes":[1]}', "control"),
        ('{"type":"fetch","lease":1,"keys":["%s"],"sizes":[1]}' % ("a" * 513), "keys"),
        ('{"type":"hello","engine":""}', "engine"),
        ('{"type":"ready","lease":1}', "type"),
        ("[" * 5000, "message"),
        (" " * (wire.MAX_MESSAGE_BYTES + 1), "exceeds"),
    ],
)
def test_what_no_client_may_send_is_refused_by_name(text, problem):
    with pytest.raises(ValueError, match=problem):
        decode_to_relay(text.encode())


def test_an_answer_with_fewer_addresses_than_results_is_refused():
    with pytest.raises(ValueError, match="1 addresses and 2 results"):
        decode_to_client(b'{"type":"ready","lease":1,"mooncake_address":"s","addresses":[1],"got":[1,2]}')


def test_what_a_newer_peer_says_more_is_ignored():
    assert decode_to_relay(b'{"type":"hello","engine":"p","colour":"blue"}') == Hello(engine="p")
