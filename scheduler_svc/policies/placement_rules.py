"""The paper's placement rules (section 6.1, appendix A.4) as functions of what engines report.

The paper gives its thresholds as times; here they stay times, and each engine's tokens and bytes
are turned into times by its own measured rates:

    alpha   read_q / read rate  <= ALPHA_S     "tokens readable in 3 s"
    beta    tok_e / token rate  >  BETA_S      "tokens one engine processes in 5 s"

An engine whose rate is not known yet is within both: rates are measured under load only, so it
has not had any.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

ALPHA_S = 3.0
BETA_S = 5.0
Z_FACTOR = 1.05


class EngineLoad(Protocol):
    """What the rules read of an engine; `scheduler_svc.ledger.engines.EngineState` is one."""

    @property
    def tokens(self) -> int:
        """tok_e, with what was placed since the last report."""

    @property
    def sequences(self) -> int:
        """seq_e, likewise."""

    @property
    def tokens_per_s(self) -> float:
        """Measured; 0 while unknown."""

    @property
    def read_queue_bytes(self) -> int:
        """read_q in bytes."""

    @property
    def read_rate_bytes_per_s(self) -> float:
        """Measured; 0 while unknown."""

    @property
    def free_device_tokens(self) -> int | None:
        """None when the engine does not say."""


class PrefillClass(IntEnum):
    """Order of preference among PEs (section 6.1)."""

    SHORT_QUEUE = 0
    LONG_QUEUE = 1
    """read_q above alpha."""
    OVERLOADED = 2
    """tok_e above beta.  The paper leaves the request in the scheduler's queue when there is no
    other engine; a router waits for an answer, so here it goes to the least loaded of these."""


_SHORT_QUEUE, _LONG_QUEUE, _OVERLOADED = PrefillClass
PREFILL_CLASS_NAMES = {member: member.name.lower() for member in PrefillClass}


def compute_s(engine: EngineLoad) -> float:
    """Seconds until `engine` has processed what it has; 0 while its rate is unknown."""
    rate = engine.tokens_per_s
    return engine.tokens / rate if rate > 0 else 0.0


def drain_s(engine: EngineLoad) -> float:
    """Seconds until its storage read queue is empty; 0 while its rate is unknown."""
    rate = engine.read_rate_bytes_per_s
    return engine.read_queue_bytes / rate if rate > 0 else 0.0


def expected_wait_s(engine: EngineLoad) -> float:
    """Seconds until it gets to a request placed now: compute and storage queue run side by side."""
    return max(compute_s(engine), drain_s(engine))


def prefill_class(engine: EngineLoad) -> PrefillClass:
    # As compute_s > BETA_S and drain_s > ALPHA_S, without their calls: this is asked of several
    # engines for every placement.
    rate = engine.tokens_per_s
    if rate > 0 and engine.tokens > BETA_S * rate:
        return _OVERLOADED
    rate = engine.read_rate_bytes_per_s
    return _LONG_QUEUE if rate > 0 and engine.read_queue_bytes > ALPHA_S * rate else _SHORT_QUEUE


def prefill_key(engine: EngineLoad) -> tuple[PrefillClass, int]:
    """The PE with the least key is chosen: best class first, then least tok_e (section 6.1)."""
    return prefill_class(engine), engine.tokens


def group_key(engines: Sequence[EngineLoad]) -> float:
    """The DE group with the least key is chosen (section 6.1, DE phase 1: least sum of tok_e).

    The mean instead of the sum: the same for groups of equal size, as the paper's are, and fair
    to the small one otherwise.
    """
    return _tokens(engines) / len(engines)


def balance_limit(prompt_tokens: int, engines: Sequence[EngineLoad]) -> float:
    """Z = 1.05 * (sum of len over R + sum of tok_e) / |E|, in tokens (section 6.1, DE phase 2).

    R, the requests that fit the group's memory, is the one request at hand: requests are placed
    as they come and not in batches.
    """
    return Z_FACTOR * (prompt_tokens + _tokens(engines)) / len(engines)


def _tokens(engines: Sequence[EngineLoad]) -> int:
    return sum([engine.tokens for engine in engines])


class DecodeRule(IntEnum):
    """Which part of phase 2 chose a DE."""

    FEWEST_SEQUENCES = 0
    LEAST_TOKENS = 1
    NONE_FITS = 2
    """No DE has the memory.  The paper stops placing; SGLang's DEs queue requests themselves, so
    here the one with the fewest tokens gets it."""


_FEWEST_SEQUENCES, _LEAST_TOKENS, _NONE_FITS = DecodeRule
DECODE_RULE_NAMES = {member: member.name.lower() for member in DecodeRule}


class DecodeChoice(NamedTuple):
    position: int
    """Among the engines offered."""
    rule: DecodeRule
    limit_tokens: float
    """Z."""


def choose_decode(prompt_tokens: int, engines: Sequence[EngineLoad]) -> DecodeChoice:
    """Section 6.1, DE phase 2, within one non-empty group.

    Of the DEs with enough free device memory: those that stay within Z take the one with the
    fewest sequences, else the one with the fewest tokens is taken.  Equals (the paper names no rule):
    shortest storage read queue, fewest tokens, first.
    """
    limit = balance_limit(prompt_tokens, engines)
    # One pass: rules are numbered by preference, so the least key is the choice.
    best: tuple[DecodeRule, int, int, int, int] | None = None
    for index, engine in enumerate(engines):
        tokens, free, queue = engine.tokens, engine.free_device_tokens, engine.read_queue_bytes
        if free is not None and prompt_tokens > free:
            key = (_NONE_FITS, tokens, queue, 0, index)
        elif tokens + prompt_tokens <= limit:
            key = (_FEWEST_SEQUENCES, engine.sequences, queue, tokens, index)
        else:
            key = (_LEAST_TOKENS, tokens, queue, 0, index)
        if best is None or key < best:
            best = key
    assert best is not None, "the group is empty"
    return DecodeChoice(best[4], best[0], limit)


def pair_rate(prefill: EngineLoad, decode: EngineLoad) -> float:
    """Bytes per second at which a pair reads what it lacks: both links share it (policy `split`).

    An engine that has not read yet is taken to be as fast as the other; 0 while neither has.
    """
    rates = prefill.read_rate_bytes_per_s, decode.read_rate_bytes_per_s
    return 2 * max(rates) if min(rates) <= 0 else sum(rates)


def is_worth_staying(last: EngineLoad, best: EngineLoad, saved_bytes: int, rate_bytes_per_s: float) -> bool:
    """Session affinity: stay with the engine that holds the session's pages while what it saves
    outweighs what it costs (ours, on top of the paper).

        expected_wait_s(last) - expected_wait_s(best)  <=  saved_bytes / rate_bytes_per_s

    A saved page is one that the pair with `best` would have to read, at that rate.  While it is not
    known any saving is worth it.
    """
    if rate_bytes_per_s <= 0:
        return True
    return expected_wait_s(last) - expected_wait_s(best) <= saved_bytes / rate_bytes_per_s
