"""Loads one after another while relays slow down, stop, hang, die and come back: no wrong byte, and nothing is kept."""

from __future__ import annotations

import random
import signal
import threading
import time

from relay_world import MIB, Loading, ObedientRelay, Scene

from dualpath_sgl.evals.relay.world import eventually

RATE = 100e6
STORM_S = 10.0


class Weather(threading.Thread):
    """Does something to one of the relays every now and then, and in the end makes all of them well again."""

    def __init__(self, scene: Scene, relays: list[ObedientRelay], rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.relays = relays
        self._scene, self._rng = scene, rng
        self._clears = threading.Event()
        self.events: list[str] = []

    def run(self) -> None:
        while not self._clears.wait(self._rng.uniform(0.1, 0.8)):
            number = self._rng.randrange(len(self.relays))
            event = self._rng.choice(["slow", "fast", "pause", "hang", "kill", "drain"])
            self.events.append(f"{event} {number}")
            getattr(self, f"_{event}")(number)

    def clear(self) -> None:
        self._clears.set()
        self.join()

    def _slow(self, number: int) -> None:
        self.relays[number].tell(f"rate {self._rng.choice([2e6, 10e6, 40e6])}")

    def _fast(self, number: int) -> None:
        self.relays[number].tell(f"rate {RATE}")

    def _pause(self, number: int) -> None:
        self.relays[number].send(signal.SIGSTOP)
        self._clears.wait(self._rng.choice([0.05, 0.5, 2.0]))
        self.relays[number].send(signal.SIGCONT)

    def _hang(self, number: int) -> None:
        self.relays[number].tell("hang")
        self._clears.wait(self._rng.choice([0.1, 2.5]))
        self.relays[number].tell("go")

    def _kill(self, number: int) -> None:
        self._replace(number, signal.SIGKILL)

    def _drain(self, number: int) -> None:
        self._replace(number, signal.SIGTERM)

    def _replace(self, number: int, how: signal.Signals) -> None:
        old = self.relays[number]
        old.send(how)
        old.process.wait()
        self.relays[number] = self._scene.relay(old.name, rate=RATE, port=old.port, hang_s=0.3, lease_s=1.0)


def test_a_storm(scene, storm_seed):
    rng = random.Random(storm_seed)
    relays = [scene.relay(f"relay-{number}", rate=RATE, hang_s=0.3, lease_s=1.0) for number in range(2)]
    prefills = [
        scene.prefill(*relays, rate=RATE, bounce_bytes=16 * MIB),
        scene.prefill(*relays, rate=RATE, bounce_bytes=64 * MIB, is_shared=lambda key: True),
    ]
    sizes = [[rng.choice([4096, 64 * 1024, 512 * 1024, 3 * MIB]) for _ in range(40)] for _ in prefills]
    objects = [scene.objects(some) for some in sizes]
    weather = Weather(scene, relays, rng)
    weather.start()
    loads = [0, 0]
    until_s = time.monotonic() + STORM_S

    def load_again_and_again(number: int) -> list[int]:
        while time.monotonic() < until_s:
            objects[number].forget()
            assert prefills[number].load(objects[number]) == sizes[number]
            assert objects[number].wrong() == []
            loads[number] += 1
        return []

    for loading in [Loading(lambda number=number: load_again_and_again(number)) for number in range(2)]:
        loading.ends()
    weather.clear()
    assert min(loads) > 0 and weather.events
    for relay in weather.relays:
        relay.tell(f"rate {RATE}")
    for prefill, some in zip(prefills, objects, strict=True):
        eventually(lambda prefill=prefill: not prefill.loader.kept_back, "pulls that hung are over", 60)
        prefill.knows(*weather.relays)
        assert prefill.load(some) == some.sizes
