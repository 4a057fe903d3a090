"""What cells are run against: a cluster of their own, or a deployment that runs already."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.compare import measure
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, kv_bytes_per_token
from dualpath_sgl.launch.processes.run_dir import ClusterState, read_state
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.protocol import Role


class Target(Protocol):
    """Where requests go, and who counts."""

    @property
    def url(self) -> str: ...

    @property
    def collector(self) -> str | None:
        """OTLP/gRPC address for the client's spans."""

    def settled(self) -> measure.Counters:
        """Counters, once every request that was answered is reported."""

    def counters(self) -> measure.Counters:
        """Counters as they are now; empty where `link_bytes` tells as much."""

    def link_bytes(self) -> dict[str, int]:
        """Engine -> bytes that its storage link has brought; empty where links are not shaped."""

    def forget(self) -> None:
        """Empty the engines' pools, as far as that is ours to do."""

    def explain(self) -> None:
        """Raises what a dead part explains better than the request that failed."""


class OwnCluster:
    """A running cluster that this program started."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.url = cluster.url
        self.collector = cluster.collector_url if cluster.config.tracing.enabled else None

    def settled(self) -> measure.Counters:
        return measure.of(self._cluster)

    def counters(self) -> measure.Counters:
        if self._cluster.config.mode in (Mode.BASIC, Mode.BOTH):
            # The links tell the same, and asking an engine for all its metrics costs it more than asking the
            # scheduler does: modes would not be looked at alike.
            is_told = self._cluster.network is not None
            return measure.Counters({}, {}, {}, None) if is_told else measure.of(self._cluster)
        with self._cluster.ask_scheduler() as client:
            return measure.from_scheduler(client.status())

    def link_bytes(self) -> dict[str, int]:
        network = self._cluster.network
        if network is None:
            return {}
        return {
            engine.name: network.link_bytes(engine.name, "storage").received
            for engine in self._cluster.engines
        }

    def forget(self) -> None:
        self._cluster.flush_caches()

    def explain(self) -> None:
        self._cluster.check()


class Attached:
    """A deployment that runs already; its run directory, where it is at hand, says who counts."""

    collector = None

    def __init__(self, url: str, state: ClusterState | None, config: ClusterConfig) -> None:
        self.url = url.rstrip("/")
        self._state = state
        self._config = config

    def settled(self) -> measure.Counters:
        return self.counters()

    def counters(self) -> measure.Counters:
        state = self._state
        if state is None:
            return measure.Counters({}, {}, {}, None)
        if state.scheduler is not None:
            with SchedulerClient(state.scheduler, curve_key_files=state.scheduler_keys) as client:
                return measure.from_scheduler(client.status())
        engines = [(name, _role(name), url) for name, url in state.engines.items()]
        return measure.from_engines(engines, kv_bytes_per_token(self._config))

    def link_bytes(self) -> dict[str, int]:
        return {}

    def forget(self) -> None:
        """Others use it too: every cell has tokens of its own, so it finds nothing of another one."""

    def explain(self) -> None:
        """Nothing is known of its processes."""


def _role(engine: str) -> str:
    return next(role.value for role in Role if engine.startswith(role.value))


def attach(url: str, run_dir: Path | None, config: ClusterConfig) -> Attached:
    """Raises EvalError when `run_dir` tells of another deployment, RunDirError when it cannot be read."""
    state = read_state(run_dir) if run_dir is not None else None
    if run_dir is not None and state is None:
        raise EvalError(f"--run-dir is {run_dir}, which holds no cluster.json; name the one of `dualpath up`")
    if state is not None and state.url.rstrip("/") != url.rstrip("/"):
        raise EvalError(
            f"--url is {url}, but {run_dir} tells of {state.url}; name the one that belongs to it"
        )
    return Attached(url, state, config)
