"""The relay as a process: keys, draining on SIGTERM, metrics, a relay of another release."""

from __future__ import annotations

import signal
import time
import urllib.request

import pytest
from relay_world import SLOW, Loading

from dualpath_sgl.evals.relay.world import eventually
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.relay.wire import Hello
from scheduler_svc.wire.keys import generate

REFUSED_S = 1.0
"""A stranger gets silence; who is admitted is answered far sooner."""


@pytest.fixture
def keys(tmp_path):
    directory = tmp_path / "keys"
    generate(directory, ["relay-a", "prefill-0"])
    return directory


def secured(scene, keys):
    return scene.relay("relay-a", key_file=keys / "peers/relay-a.key_secret", peer_keys=keys / "peers")


def test_a_prefill_engine_with_its_key_is_helped(scene, keys):
    relay = secured(scene, keys)
    own = PeerKeys(keys / "peers/prefill-0.key_secret", keys / "peers")
    prefill = scene.prefill(relay, rate=SLOW, secure=own.towards)
    objects = scene.objects()
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == [] and prefill.counts.relay_bytes > 0


@pytest.mark.parametrize("who", ["no key", "a key that is not authorized", "the key of another relay"])
def test_anybody_else_is_not(scene, keys, tmp_path, who):
    relay = secured(scene, keys)
    secure = None
    if who != "no key":
        strange = tmp_path / "strange"
        generate(strange, ["relay-a", "prefill-0"])
        known = strange if who == "the key of another relay" else keys
        mine = keys if who == "the key of another relay" else strange
        secure = PeerKeys(mine / "peers/prefill-0.key_secret", known / "peers").towards
    prefill = scene.prefill_of([relay.helper], secure=secure)
    time.sleep(REFUSED_S)
    objects = scene.objects()
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == []
    assert prefill.loader.lanes_up() == [] and relay.reads() == []


def test_a_relay_whose_key_is_not_known_is_not_asked(scene, keys):
    own = PeerKeys(keys / "peers/prefill-0.key_secret", keys / "peers")
    relay = scene.relay("relay-without-a-key")
    prefill = scene.prefill_of([relay.helper], secure=own.towards)
    objects = scene.objects()
    assert prefill.load(objects) == objects.sizes
    assert prefill.own_keys == objects.keys


def test_a_relay_of_another_release_is_not_asked(scene):
    relay = scene.relay()
    prefill = scene.prefill_of([relay.helper], hello=Hello(engine="p", version=9, oldest_version=9))
    eventually(lambda: "rejected p" in relay.log(), "the relay says why")
    objects = scene.objects()
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == [] and relay.reads() == []


def test_sigterm_lets_loads_go_on_and_the_relay_end(scene):
    relay = scene.relay(rate=SLOW)
    prefill = scene.prefill(relay, rate=SLOW)
    objects = scene.objects()
    loading = Loading(lambda: prefill.load(objects))
    eventually(lambda: prefill.counts.relay_bytes, "the relay brings a part")
    relay.send(signal.SIGTERM)
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []
    assert relay.process.wait(20) == 0


def test_metrics_can_be_scraped(scene):
    port = FreePorts("127.0.0.1").take()
    relay = scene.relay(metrics_port=port)
    prefill = scene.prefill(relay, rate=SLOW)
    objects = scene.objects()
    prefill.load(objects)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    assert values["dualpath_relay_read_bytes_total"] == sum(got for _, got in relay.reads()) > 0
    assert values['dualpath_relay_objects_total{result="whole"}'] == len(relay.reads())


def test_a_port_that_is_taken_is_named(scene):
    relay = scene.relay()
    with pytest.raises(RuntimeError, match=f"cannot bind port {relay.port} of 127.0.0.1"):
        scene.relay(port=relay.port)
