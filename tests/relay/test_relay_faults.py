"""What goes wrong in the middle of a load: it ends, its bytes are right, and the next one is helped again."""

from __future__ import annotations

import signal
import threading
import time

import psutil
import pytest
from relay_world import MIB, PROMPT, SLOW, Loading

from dualpath_sgl.evals.relay.world import eventually

LONG = PROMPT * 3


def loading_through(scene, prefill, relay, objects) -> Loading:
    """A load of which the relay has brought a part."""
    loading = Loading(lambda: prefill.load(objects))
    eventually(lambda: prefill.counts.relays[relay.name].bytes > 0, "the relay brings a part")
    assert not loading.over
    return loading


def helped(prefill, relay, objects) -> None:
    """A load in which the relay takes part, after whatever there was before."""
    prefill.knows(relay)
    before = prefill.counts.relays[relay.name].bytes
    objects.forget()
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == []
    assert prefill.counts.relays[relay.name].bytes > before


@pytest.mark.parametrize("relays", [1, 2])
def test_a_relay_that_is_killed(scene, relays):
    victim, *others = [scene.relay(rate=SLOW) for _ in range(relays)]
    objects = scene.objects(LONG)
    prefill = scene.prefill(victim, *others, rate=SLOW)
    loading = loading_through(scene, prefill, victim, objects)
    victim.send(signal.SIGKILL)
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []
    eventually(lambda: len(prefill.loader.lanes_up()) == len(others), "it may not be asked any more")


def test_a_relay_that_stops_between_two_pulls_and_goes_on(scene):
    relay = scene.relay(rate=SLOW)
    objects = scene.objects(LONG)
    prefill = scene.prefill(relay, rate=SLOW)
    read = prefill.transport(relay).read

    def stop_before_the_pull(*arguments):
        prefill.transport(relay).read = read
        arrived = read(*arguments)
        relay.send(signal.SIGSTOP)
        return arrived

    prefill.transport(relay).read = stop_before_the_pull
    loading = Loading(lambda: prefill.load(objects))
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []
    assert prefill.counts.relays[relay.name].lost == 1
    assert prefill.counts.relays[relay.name].hung_pulls == 0
    relay.send(signal.SIGCONT)
    helped(prefill, relay, objects)


def test_a_relay_that_hangs_during_a_pull(scene):
    relay = scene.relay(rate=SLOW)
    objects = scene.objects(LONG)
    prefill = scene.prefill(relay, rate=SLOW)
    read = prefill.transport(relay).read

    def stop_in_the_pull(*arguments):
        prefill.transport(relay).read = read
        relay.send(signal.SIGSTOP)
        return read(*arguments)

    prefill.transport(relay).read = stop_in_the_pull
    loading = Loading(lambda: prefill.load(objects))
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []
    eventually(lambda: prefill.loader.kept_back == 1, "the pull is given up")
    assert prefill.counts.relays[relay.name].hung_pulls == 1
    # Another load has the engine's memory now; bytes of the old pull arrive late, and nowhere in it.
    objects.forget()
    relay.send(signal.SIGCONT)
    eventually(lambda: prefill.loader.kept_back == 0, "the pull is over")
    assert len(objects.wrong()) == len(objects.sizes)
    helped(prefill, relay, objects)


def test_a_pull_that_hangs_holds_up_no_other_load(scene):
    victim, other = scene.relay(rate=SLOW), scene.relay(rate=SLOW)
    first, second = scene.objects(LONG), scene.objects()
    prefill = scene.prefill(victim, other, rate=SLOW)
    read = prefill.transport(victim).read

    def stop_in_the_pull(*arguments):
        victim.send(signal.SIGSTOP)
        return read(*arguments)

    prefill.transport(victim).read = stop_in_the_pull
    loading = Loading(lambda: prefill.load(first))
    eventually(lambda: prefill.counts.relays[other.name].bytes, "the load is under way")
    loads = [loading, *(Loading(lambda: prefill.load(second)) for _ in range(2))]
    for load, objects in zip(loads, (first, second, second), strict=True):
        assert load.ends() == objects.sizes
        assert objects.wrong() == []
    eventually(lambda: prefill.loader.kept_back == 1, "the pull is given up")
    assert prefill.counts.relays[other.name].lost == 0
    helped(prefill, other, second)
    assert prefill.loader.kept_back == 1
    victim.send(signal.SIGCONT)


def test_a_relay_that_freezes_at_the_first_contact_holds_up_no_other(scene):
    frozen, other = scene.relay(), scene.relay()
    objects = scene.objects(LONG)
    prefill = scene.prefill(other, rate=SLOW)
    take = prefill.loader._transports.take

    def take_one_that_meets_a_frozen_relay():
        transport = take()
        answers = transport.answers

        def answers_and_freezes(mooncake_address):
            transport.answers = answers
            answered = answers(mooncake_address)
            frozen.send(signal.SIGSTOP)
            return answered

        transport.answers = answers_and_freezes
        return transport

    prefill.loader._transports.take = take_one_that_meets_a_frozen_relay
    prefill.relays.replace([other.helper, frozen.helper])

    def meets() -> bool:
        return any(thread.name.startswith("dualpath-greeting") for thread in threading.enumerate())

    eventually(lambda: meets() and stopped(frozen), "the relay is met and freezes")
    for _ in range(2):
        helped(prefill, other, objects)
        assert meets()  # Mooncake waits for it still
    assert prefill.counts.relays[other.name].lost == 0
    assert [lane.helper.name for lane in prefill.loader.lanes_up()] == [other.name]
    frozen.send(signal.SIGCONT)
    helped(prefill, frozen, objects)


def stopped(relay) -> bool:
    return psutil.Process(relay.process.pid).status() == psutil.STATUS_STOPPED


@pytest.mark.parametrize("rate", [SLOW / 2, SLOW / 20, SLOW / 100])
def test_a_relay_that_slows_down(scene, rate):
    relay = scene.relay(rate=SLOW)
    objects = scene.objects(LONG)
    prefill = scene.prefill(relay, rate=SLOW)
    loading = loading_through(scene, prefill, relay, objects)
    relay.tell(f"rate {rate}")
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []
    assert prefill.counts.own_bytes > prefill.counts.relay_bytes


def test_a_relay_that_is_restarted_on_its_port(scene):
    relay = scene.relay("again", rate=SLOW)
    objects = scene.objects(LONG)
    prefill = scene.prefill(relay, rate=SLOW)
    loading = loading_through(scene, prefill, relay, objects)
    relay.send(signal.SIGKILL)
    relay.process.wait()
    second = scene.relay("again", rate=SLOW, port=relay.port)
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []
    helped(prefill, second, objects)
    assert second.reads()


def test_a_ring_that_others_have_filled(scene):
    relay = scene.relay(ring_bytes=8 * MIB, lease_s=600)
    holder = scene.prefill(relay)
    held = scene.objects([4 * MIB] * 2)
    send = holder.loader._lanes[relay.helper]._send
    holder.loader._lanes[relay.helper]._send = lambda message: (
        None if "Release" in str(type(message)) else send(message)
    )
    assert holder.load(held) == held.sizes  # its leases are never released
    objects = scene.objects()
    prefill = scene.prefill(relay)
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == []


def test_a_relay_whose_store_hangs(scene):
    relay = scene.relay(rate=SLOW, hang_s=0.2)
    objects = scene.objects(LONG)
    prefill = scene.prefill(relay, rate=SLOW)
    loading = loading_through(scene, prefill, relay, objects)
    relay.tell("hang")
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []
    assert prefill.counts.relays[relay.name].refused > 0
    relay.tell("go")
    time.sleep(2.0)  # the client leaves a relay that refused for this reason alone for so long
    helped(prefill, relay, objects)


def test_a_batch_that_does_not_come_is_read_by_the_own_client_at_the_end(scene):
    relay = scene.relay(hang_s=600)
    objects = scene.objects()
    prefill = scene.prefill(relay)
    relay.tell("hang")
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == []
    assert prefill.counts.overdue > 0 and prefill.counts.relay_bytes == 0
    relay.tell("go")
    helped(prefill, relay, objects)


def test_a_pull_that_outlasts_its_lease_does_not_count(scene):
    relay = scene.relay(lease_s=0.05)
    objects = scene.objects()
    prefill = scene.prefill(relay, rate=SLOW)
    read = prefill.transport(relay).read

    def read_slowly(*arguments):
        arrived = read(*arguments)
        time.sleep(0.2)
        return arrived

    prefill.transport(relay).read = read_slowly
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == []
    assert prefill.counts.relays[relay.name].invalid > 0
    assert prefill.counts.relay_bytes == 0


def test_when_the_own_client_fails_the_load_fails_and_nothing_is_written_afterwards(scene):
    relay = scene.relay(rate=SLOW)
    objects = scene.objects(LONG)
    prefill = scene.prefill(relay, rate=SLOW)
    loading = loading_through(scene, prefill, relay, objects)

    def broken(*_arguments):
        raise OSError("the store is gone")

    prefill.loader._own_read = broken
    with pytest.raises(OSError, match="the store is gone"):
        loading.ends()
    objects.forget()
    time.sleep(0.5)
    assert len(objects.wrong()) == len(objects.sizes)


def test_relays_that_shall_read_everything_and_bring_nothing(scene):
    relay = scene.relay()
    objects = scene.objects()
    prefill = scene.prefill(relay, is_shared=lambda key: True)
    lane = prefill.lane(relay)
    lane._ask_for = lambda load, claim: not load.give_back(claim)  # as without bounce memory
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == []
    assert prefill.counts.relay_bytes == 0


def test_relays_that_shall_read_everything_and_are_killed(scene):
    relay = scene.relay(rate=SLOW)
    objects = scene.objects(LONG)
    prefill = scene.prefill(relay, is_shared=lambda key: True)
    loading = loading_through(scene, prefill, relay, objects)
    relay.send(signal.SIGKILL)
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []


def test_a_fault_in_a_lane_costs_its_batches_and_not_the_load(scene):
    relay = scene.relay(rate=SLOW)
    objects = scene.objects(LONG)
    prefill = scene.prefill(relay, rate=SLOW)
    lane = prefill.lane(relay)
    land, failed = lane._land, []

    def fail_once(batch):
        if not failed:
            failed.append(batch)
            raise RuntimeError("a defect")
        land(batch)

    lane._land = fail_once
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == [] and failed
