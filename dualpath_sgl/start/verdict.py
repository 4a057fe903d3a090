"""Which mode an engine runs in, and why: one function for the engine, `dualpath doctor` and the docs.

Each engine decides for itself, from its model, its flags and its transport.  The scheduler knows both modes
of a request's two engines, and forwards only between engines that load decode-side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dualpath_sgl.start.checks import OBSTACLES, Facts, Problem, problems
from scheduler_svc.wire.protocol import Mode


class Refused(ValueError):
    """An engine that cannot run under DualPath; one sentence for each reason."""


@dataclass(frozen=True)
class Verdict:
    mode: Mode | None
    """None: refused."""
    because: str
    """Of the mode, one sentence."""
    refusals: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def verdict(facts: Facts, asked: Mode | None = None) -> Verdict:
    """`asked`: the only mode that will do; without one, decode-side loads where they can run, else relays."""
    found = problems(facts)
    warnings = tuple(problem for problem in found if not problem.stops)
    stopped = {mode: tuple(problem for problem in found if mode in problem.stops) for mode in Mode}
    mode = asked or _best(stopped)
    if stopped[mode]:
        return Verdict(None, "", stopped[mode], warnings)
    if asked is not None:
        return Verdict(mode, f"DUALPATH_MODE is {asked}", (), warnings)
    obstacles = stopped[Mode.DECODE_SIDE]
    why = "; ".join(f"{each.setting} is {each.value}: {each.why}" for each in obstacles)
    return Verdict(mode, why or "nothing stands against it", (), warnings)


def _best(stopped: dict[Mode, tuple[Problem, ...]]) -> Mode:
    return Mode.RELAY if stopped[Mode.DECODE_SIDE] else Mode.DECODE_SIDE


def require(found: Verdict) -> Mode:
    """The mode.  Raises Refused when there is none."""
    if found.mode is None:
        raise Refused("\n".join(map(str, found.refusals)))
    return found.mode


def table() -> Iterator[tuple[str, str]]:
    """For the docs: what `auto` runs relays for, and why."""
    for obstacle in OBSTACLES:
        yield obstacle.case, obstacle.why
