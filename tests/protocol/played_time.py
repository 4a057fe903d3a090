"""Time that passes when a world says so, for all of the code under search."""

from __future__ import annotations

START_S = 1000.0


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.reset()

    def reset(self) -> None:
        self.now_s = START_S

    @property
    def moved(self) -> bool:
        return self.now_s != START_S

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return int(self.now_s * 1e9)

    def sleep(self, _seconds: float) -> None:
        pass


CLOCK = Clock()


class Letters:
    """Stands in for a Mailbox: nobody sleeps, so nobody need be woken."""

    fd = -1

    def __init__(self) -> None:
        self.items: list[object] = []

    def put(self, item: object) -> None:
        self.items.append(item)

    def drain(self) -> list[object]:
        items, self.items = self.items, []
        return items

    @property
    def empty(self) -> bool:
        return not self.items

    def close(self) -> None:
        pass
