"""Every state that a protocol can get into, breadth first, with the real objects of both sides.

A world owns those objects, and plays for them what lies between: network, store, clock, SGLang.  What can happen
in it are its actions, by name.  A state is known again by its `fingerprint`; it is reached by playing its actions
from the start, since objects with locks and callbacks cannot be copied.  So nothing here is a model of the
code that could drift from it.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import msgspec
import torch

PLAIN = (int, float, str, bytes, bool, type(None))


class World(Protocol):
    unseen: frozenset[str]
    """Fields that decide nothing: counters, logs."""
    opaque: tuple[type, ...]
    """Types whose objects have no state of their own."""

    def actions(self) -> Iterable[str]:
        """What can happen now, in a fixed order."""

    def do(self, action: str) -> None:
        """Let it happen.  Raises what the code raises."""

    def roots(self) -> object:
        """Everything that decides what can happen later."""

    def check(self) -> None:
        """AssertionError where an invariant does not hold."""

    def settle(self) -> None:
        """Let everything go on, with no further fault, until nothing happens any more; then AssertionError where
        anything is left.  The world is of no use afterwards."""


class Broken(AssertionError):
    """The shortest way to a state in which an invariant does not hold."""


@dataclass
class Explored:
    states: int
    steps: int
    depth: int


def explore(new: Callable[[], World], most_states: int = 10**9, settles: bool = True) -> Explored:
    """Check every state, and that all of them come to rest.  Raises Broken; AssertionError when there are more states
    than that."""
    seen = {fingerprint(new())}
    level: list[tuple[str, ...]] = [()]
    steps = depth = 0
    while level:
        following: list[tuple[str, ...]] = []
        for path in level:
            world = _played(new, path)
            actions = list(world.actions())
            for number, action in enumerate(actions):
                steps += 1
                if number:  # the first one happens where the actions were asked for
                    world = _played(new, path)
                way = (*path, action)
                _guard(way, lambda world=world, action=action: world.do(action))
                _guard(way, world.check)
                state = fingerprint(world)
                if state in seen:
                    continue
                seen.add(state)
                following.append(way)
                if settles:
                    _guard((*way, "and nothing else goes wrong"), world.settle)
                assert len(seen) <= most_states, f"more than {most_states} states"
        level = following
        depth += bool(level)
    return Explored(len(seen), steps, depth)


def _played(new: Callable[[], World], path: Iterable[str]) -> World:
    world = new()
    for action in path:
        world.do(action)
    return world


def _guard(way: tuple[str, ...], step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {error}\n  after " + "\n        ".join(way)) from error


def fingerprint(world: World) -> int:
    """Equal for states in which the same can happen."""
    numbers: dict[int, int] = {}
    unseen, opaque = world.unseen, world.opaque

    def walk(value: object) -> Hashable:
        kind = type(value)
        if kind in PLAIN:
            return value
        if isinstance(value, (msgspec.Struct, Enum, range)):
            return value  # frozen ones, all of them
        if isinstance(value, torch.Tensor):
            return tuple(value.tolist())
        if kind is bytearray:
            return bytes(value)
        if isinstance(value, (list, tuple, deque)):
            return (kind.__name__, *map(walk, value))
        if isinstance(value, (set, frozenset)):
            return (kind.__name__, frozenset(map(walk, value)))
        if isinstance(value, dict):
            return (kind.__name__, tuple((walk(key), walk(item)) for key, item in value.items()))
        if isinstance(value, functools.partial):
            return ("partial", walk(value.func), walk(value.args), walk(value.keywords))
        if isinstance(value, types.FunctionType):
            cells = value.__closure__ or ()
            return (value.__qualname__, tuple(walk(cell.cell_contents) for cell in cells))
        if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            return (value.__name__, walk(value.__self__))
        if isinstance(value, (type, types.ModuleType)):
            return value.__name__
        number = numbers.setdefault(id(value), len(numbers))
        if number < len(numbers) - 1 or isinstance(value, opaque):
            return (kind.__name__, number)
        names = (
            (*getattr(kind, "__slots__", ()), *vars(value)) if hasattr(value, "__dict__") else kind.__slots__
        )
        return (
            kind.__name__,
            tuple((name, walk(getattr(value, name))) for name in names if name not in unseen),
        )

    return hash(walk(world.roots()))
