"""Counters in time: what a look that fails costs, and engines that are not there from the start.

The deployment is a stand-in: a real one's counters do not fail when asked to.
"""

import threading

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.compare.measure import Counters
from dualpath_sgl.evals.compare.summary import EngineRead
from dualpath_sgl.evals.matrix.environment import of_this_machine
from dualpath_sgl.evals.matrix.sampling import Sampler


class Counting:
    def __init__(self, looks: list) -> None:
        self._looks = iter(looks)
        self.is_seen = threading.Event()

    def link_bytes(self) -> dict[str, int]:
        return {}

    def counters(self) -> Counters:
        look = next(self._looks, None)
        if look is None:
            self.is_seen.set()
            raise EvalError("gone")
        if isinstance(look, Exception):
            raise look
        engines = {
            name: EngineRead(role="decode", store_read_bytes=count, forwarded_bytes=0)
            for name, count in look.items()
        }
        return Counters(engines, {"split": sum(look.values())}, {}, 0)


def test_all_lists_are_as_long_as_the_looks_that_succeeded():
    target = Counting([{"a": 1}, OSError("busy"), {"a": 2, "b": 5}, EvalError("no metrics"), {"b": 9}])
    with Sampler(target, every_s=0.01) as sampler:
        assert target.is_seen.wait(30)
    samples = sampler.samples
    assert len(samples.at_s) == 3 and samples.at_s == sorted(samples.at_s)
    assert samples.read_bytes == {"a": [1, 2, 2], "b": [0, 5, 9]}
    assert samples.paths == {"split": [1, 7, 9]} and samples.link_bytes == {}


def test_the_environment_names_versions_and_the_machine():
    found = of_this_machine()
    assert {"dualpath-sgl", "sglang", "torch"} <= found.versions.keys()
    assert found.cores >= 1 and found.memory_bytes > 2**30 and found.command
