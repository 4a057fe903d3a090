"""Processes of a plan: started in its order, each when those before it are ready."""

from __future__ import annotations

from collections.abc import Iterable

from dualpath_sgl.launch.plan.process import Answers, Listens, Process, Says
from dualpath_sgl.launch.supervision.direct_http import answers, listens
from dualpath_sgl.launch.supervision.supervisor import PROBE_TIMEOUT_S, Probe, Supervisor


class PlannedSupervisor(Supervisor):
    stop_order = (("router",), ("prefill-", "decode-"), ("relay-",), ("scheduler", "store"))

    def _launch_plan(self, own: Iterable[Process], elsewhere: Iterable[Process] = ()) -> None:
        """Start `own`, and wait until each is ready; of those `elsewhere` too, what `own` calls at its start.

        What only a log says is not known of a process elsewhere.
        """
        ready: set[str] = set()
        for process in elsewhere:
            if isinstance(process.ready, Says):
                ready.add(process.name)
            else:
                self._probes[process.name] = self._probe(process)
        names: list[str] = []
        for process in own:
            before = [name for name in process.after if name not in ready]
            self._await_ready(before)
            ready.update(before)
            self._launch(
                process.name, list(process.argv), dict(process.env), self._probe(process), process.stop
            )
            names.append(process.name)
        self._write_state()
        self._await_ready([name for name in names if name not in ready])

    def _probe(self, process: Process) -> Probe:
        ready = process.ready
        match ready:
            case Listens():
                return lambda: listens(ready.host, ready.port, PROBE_TIMEOUT_S)
            case Answers():
                return lambda: answers(ready.url, PROBE_TIMEOUT_S)
            case Says():
                return lambda: ready.text in self._process(process.name).tail()
