"""When a probe of a capacity search ends, what it says, and what the search makes of it."""

import pytest

from dualpath_sgl.evals.agents.replay import Replay, RequestRecord
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.matrix.experiment import CapacityLoad, ServiceLevel
from dualpath_sgl.evals.matrix.probing import BROKEN, PLAYED_OUT, STEADY, StopRule, search

LEVEL = ServiceLevel(ttft_s=1.0, tpot_s=0.1, window_s=10.0, compared_windows=2, steady=0.05)
LOAD = CapacityLoad(kind="capacity", agents=10, first_agents_per_s=1.0, precision=0.05, most_probes=20)


def record(ended_s: float, ttft_s: float, tpot_s: float | None = 0.01) -> RequestRecord:
    return RequestRecord("s", 0, 10, 2, 0, 0, ended_s - ttft_s, ttft_s, None, tpot_s, ttft_s, "0")


def fed(*records: RequestRecord) -> tuple[StopRule, int]:
    """The rule, and how many requests it wanted."""
    rule = StopRule(LEVEL)
    for seen, each in enumerate(records, 1):
        if rule(each):
            return rule, seen
    return rule, len(records)


def test_a_probe_ends_with_the_first_window_that_breaks_the_level():
    rule, seen = fed(
        record(4, 0.5), record(9, 0.5), record(11, 3), record(19, 3), record(21, 9), record(22, 9)
    )
    assert (rule.why, seen, rule.verdict()) == (BROKEN, 5, (False, 3.0, 0.01))


def test_a_probe_ends_when_a_window_is_as_it_was_some_windows_before():
    ttfts_s = [0.3, 0.5, 0.31, 0.4, 0.312, 0.9]
    rule, seen = fed(*(record(10 * place + 5, ttft_s) for place, ttft_s in enumerate(ttfts_s)))
    assert (rule.why, seen) == (STEADY, 4)
    assert rule.verdict() == (True, 0.31, 0.01)


def test_slow_tokens_break_the_level_too_and_single_tokens_do_not_count():
    rule, _ = fed(record(5, 0.2, 0.5), record(6, 0.2, None), record(12, 0.2))
    assert (rule.why, rule.verdict()) == (BROKEN, (False, 0.2, 0.5))


def test_a_probe_that_is_played_out_in_its_first_window_is_judged_by_that():
    rule, _ = fed(record(1, 0.4), record(2, 0.6))
    assert (rule.why, rule.verdict()[:2]) == (PLAYED_OUT, (True, 0.5))
    assert not fed(record(1, 5))[0].verdict()[0]


def served_at(real_per_s: float, tried: list[float]):
    def run(agents_per_s: float, rule: StopRule) -> Replay:
        tried.append(agents_per_s)
        ended = record(5, 0.5 if agents_per_s <= real_per_s else 2.0)
        rule(ended)
        return Replay([ended], {}, 5.0)

    return run


def test_the_search_finds_the_rate_and_an_interrupted_one_goes_on_where_it_was():
    tried: list[float] = []
    kept = []
    found = search(LOAD, LEVEL, [], served_at(0.37, tried), kept.append)
    assert found == pytest.approx(0.37, rel=0.05) and [probe.agents_per_s for probe in kept] == tried
    again: list[float] = []
    assert search(LOAD, LEVEL, kept[:4], served_at(0.37, again), lambda probe: None) == found
    assert again == tried[4:]


def test_a_search_that_does_not_end_says_what_it_tried():
    load = LOAD.model_copy(update={"most_probes": 3})
    with pytest.raises(EvalError, match=r"3 probes .*1 yes, 2 yes, 4 yes.*first_agents_per_s"):
        search(load, LEVEL, [], served_at(1e9, []), lambda probe: None)
