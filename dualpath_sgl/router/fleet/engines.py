"""The engines this router knows: those it was started with, and those the scheduler has named since."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

from yarl import URL

from dualpath_sgl.router.settings.admission import Admission, EngineUrl
from scheduler_svc.wire.protocol import Role

logger = logging.getLogger(__name__)

MAX_REFUSED = 100
"""Refused engines that are told apart, so that nobody fills the log with invented ones."""


class Engine:
    """One SGLang server as this router sees it.

    Up until a connection is refused or health checks fail; down until health checks succeed again.
    """

    def __init__(self, role: Role, url: str, bootstrap_port: int | None, *, listed: bool) -> None:
        """`url`: as `EngineUrl` writes it."""
        self.role = role
        self.url = url
        self.bootstrap_port = bootstrap_port
        """A PE has one; None leaves it to SGLang's default."""
        self.listed = listed
        """Named on the command line: never forgotten."""
        self.registered = False
        """The scheduler has named it, so it runs DualPath."""
        self.in_flight = 0
        """Requests of this router."""
        self.chosen_at = 0
        """When it was chosen last, in choices."""
        self.problem = ""
        """Why it is down."""
        self.down = asyncio.Event()
        self.unwell = asyncio.Event()
        """Checks failed often enough in a row that what is in flight there is given up."""
        self._failed = 0
        self._passed = 0

    @property
    def is_up(self) -> bool:
        return not self.down.is_set()

    def refused(self, problem: str) -> None:
        """It took no connection: down at once, but what it has taken before may still end well."""
        self.problem = problem
        self._passed = 0
        self.down.set()

    def check_failed(self, problem: str, limit: int) -> bool:
        """`limit`: failures in a row that mean down.  Returns whether that is news."""
        self._passed = 0
        self._failed += 1
        if self._failed < limit or self.unwell.is_set():
            return False
        self.problem = problem
        self.down.set()
        self.unwell.set()
        return True

    def check_passed(self, limit: int) -> bool:
        """`limit`: successes in a row that mean up.  Returns whether that is news."""
        self._failed = 0
        self._passed += 1
        if self.is_up or self._passed < limit:
            return False
        self.down.clear()
        self.unwell.clear()
        return True


def address(engine: Engine, path: str, query: str) -> URL:
    """One of its endpoints; `query` goes on exactly as a client wrote it."""
    return URL(engine.url + path + (f"?{query}" if query else ""), encoded=True)


class EngineDirectory:
    """Engines by role and URL."""

    def __init__(
        self,
        prefills: Iterable[tuple[str, int | None]],
        decodes: Iterable[str],
        admission: Admission,
        on_joined: Callable[[EngineDirectory, Engine], None],
    ) -> None:
        """URLs as `EngineUrl` writes them.  `on_joined` is told of every engine, these included."""
        self._admission = admission
        self._on_joined = on_joined
        self._engines: dict[Role, dict[str, Engine]] = {role: {} for role in Role}
        self._choices = 0
        self.refused: Counter[tuple[Role, str]] = Counter()
        """How often the scheduler named an engine that is not admitted, by role and URL."""
        for url, port in prefills:
            self._add(Engine(Role.PREFILL, url, port, listed=True))
        for url in decodes:
            self._add(Engine(Role.DECODE, url, None, listed=True))

    def __iter__(self) -> Iterator[Engine]:
        return (engine for role in Role for engine in self._engines[role].values())

    def of(self, role: Role) -> list[Engine]:
        return list(self._engines[role].values())

    def named(self, role: Role, url: str, bootstrap_port: int | None) -> Engine | None:
        """The engine the scheduler named; one not known yet has joined at run time.

        None when the router's options do not admit it: it is not contacted at all.
        """
        try:
            address = EngineUrl.parse(url)
        except ValueError as error:
            self._refuse(role, url, str(error))
            return None
        engine = self._engines[role].get(str(address))
        if engine is None:
            if not self._admission.admits(address):
                self._refuse(
                    role, url, f"if it is yours, list it or give --dualpath-engine-url-prefix {address}"
                )
                return None
            engine = Engine(role, str(address), bootstrap_port, listed=False)
            self._add(engine)
        elif bootstrap_port is not None:
            engine.bootstrap_port = bootstrap_port
        engine.registered = True
        return engine

    def choose(self, role: Role, avoid: Collection[Engine] = ()) -> Engine | None:
        """The engine that is up with the fewest requests in flight, then the one not chosen for longest."""
        able = [engine for engine in self._engines[role].values() if engine.is_up and engine not in avoid]
        if not able:
            return None
        chosen = min(able, key=lambda engine: (engine.in_flight, engine.chosen_at))
        self._choices += 1
        chosen.chosen_at = self._choices
        return chosen

    def forget(self, engine: Engine) -> None:
        del self._engines[engine.role][engine.url]

    def _refuse(self, role: Role, url: str, remedy: str) -> None:
        if (role, url) not in self.refused:
            if len(self.refused) == MAX_REFUSED:
                return
            logger.warning(
                "the scheduler names %s engine %r, which this router does not admit: it gets no request; %s",
                role, url, remedy,
            )  # fmt: skip
        self.refused[role, url] += 1

    def _add(self, engine: Engine) -> None:
        self._engines[engine.role][engine.url] = engine
        self._on_joined(self, engine)
