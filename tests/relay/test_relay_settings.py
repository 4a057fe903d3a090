"""What a relay and a client refuse at start, in one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dualpath_sgl.relay.client.options import options
from dualpath_sgl.relay.client.relays import Helper, Relays
from dualpath_sgl.relay.settings import MIB, load
from dualpath_sgl.start import config


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"RING_BYTES": "many"}, "DUALPATH_RELAY_RING_BYTES is 'many'"),
        ({"RING_BYTES": str(4 * MIB)}, "holds no two slots"),
        ({"PROTOCOL": "carrier-pigeon"}, "DUALPATH_RELAY_PROTOCOL"),
        ({"HOST": "192.168.7.7"}, "nothing says who may ask"),
        ({"KEY_FILE": "own.key_secret"}, "both key_file and peer_keys"),
        ({"LEASE_S": "0"}, "DUALPATH_RELAY_LEASE_S"),
    ],
)
def test_settings_that_cannot_be_are_named(monkeypatch, variables, problem):
    for name, value in variables.items():
        monkeypatch.setenv(f"DUALPATH_RELAY_{name}", value)
    with pytest.raises(ValueError, match=problem):
        load()


def test_one_fetch_takes_a_quarter_of_the_ring_at_most_and_a_slot_at_least(monkeypatch):
    monkeypatch.setenv("DUALPATH_RELAY_RING_BYTES", str(100 * MIB))
    assert load().most_bytes == 24 * MIB
    monkeypatch.setenv("DUALPATH_RELAY_RING_BYTES", str(8 * MIB))
    assert load().most_bytes == 4 * MIB


@pytest.mark.parametrize(
    ("relay", "problem"),
    [
        ({"relays": ["tcp://127.0.0.1:1"]}, "relay.relays.*NAME=tcp"),
        ({"relays": ["r=http://127.0.0.1:1"]}, "tcp://HOST:PORT"),
        ({"relays": ["r=tcp://127.0.0.1:1", "r=tcp://127.0.0.1:2"]}, "r stands there twice"),
        ({"batch_byte": 1}, "relay.batch_byte"),
        ({"silence_s": 0}, "relay.silence_s"),
    ],
)
def test_options_that_cannot_be_are_named(relay, problem):
    with pytest.raises(ValueError, match=problem):
        options({"relay": relay})


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"KEY_FILE": "own.key_secret"}, "both DUALPATH_KEY_FILE and DUALPATH_SCHEDULER_KEY_FILE"),
        ({"HOST": "192.168.7.7"}, "nothing says who may"),
    ],
)
def test_an_engine_with_half_a_configuration_does_not_start(monkeypatch, variables, problem):
    for name, value in {"ENABLED": "1", "ENGINE_ID": "p", "MODE": "relay", **variables}.items():
        monkeypatch.setenv(f"DUALPATH_{name}", value)
    config.settings.cache_clear()
    with pytest.raises(ValueError, match=problem):
        config.settings()
    config.settings.cache_clear()


def test_without_options_there_are_no_relays():
    assert options({}).helpers == ()


def test_whoever_follows_the_list_gets_every_list():
    relays, seen = Relays([Helper("a", "tcp://127.0.0.1:1")]), []
    relays.follow(lambda helpers: seen.append([helper.name for helper in helpers]))
    relays.replace([])
    relays.replace([Helper("b", "tcp://127.0.0.1:1")])
    assert seen == [["a"], [], ["b"]]


def test_a_relay_needs_neither_sglang_nor_torch():
    program = (
        "import sys, dualpath_sgl.relay.__main__, dualpath_sgl.lanes.forward\n"
        "print([name for name in ('sglang', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_relay_that_cannot_start_says_why_in_one_line(monkeypatch):
    monkeypatch.setenv("DUALPATH_RELAY_NUMA_NODE", "77")
    done = subprocess.run([sys.executable, "-m", "dualpath_sgl.relay"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "relay: there is no NUMA node 77 on this host; see `lscpu`"
