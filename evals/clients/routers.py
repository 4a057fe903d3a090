"""Both routers in front of one cluster: SGLang's Rust router is its own, the placing one stands beside it."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from dualpath_sgl.launch.config.cluster import Router, RouterKind
from dualpath_sgl.launch.processes import commands
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.processes.process import ManagedProcess
from dualpath_sgl.launch.supervision.cluster import Cluster

READY_WITHIN_S = 60.0


@contextmanager
def placing_router(cluster: Cluster) -> Iterator[str]:
    """Its URL, once it would serve a request.  `cluster`: one whose own router is the Rust router."""
    config = cluster.config.model_copy(update={"router": Router(kind=RouterKind.PLACING)})
    port = FreePorts(config.host).take()
    argv = cluster.processes["router"].argv
    listed = argv[argv.index("--prefill") : argv.index(f"--host={config.host}")]
    flags = commands.placing_flags(config, cluster.addresses, cluster.ports)
    router = ManagedProcess(
        "placing-router",
        [*argv[: argv.index("--prefill")], *listed, f"--host={config.host}", f"--port={port}", *flags],
        os.environ,
        cluster.run_dir / "logs" / "placing-router.log",
    )
    router.start()
    url = f"http://{config.host}:{port}"
    try:
        deadline_s = time.monotonic() + READY_WITHIN_S
        while not _ready(url):
            if not router.running or time.monotonic() > deadline_s:
                raise TimeoutError(f"the placing router does not get ready:\n{router.tail()}")
            time.sleep(0.2)
        yield url
    finally:
        router.terminate()
        router.finish(time.monotonic() + 10)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readiness", timeout=READY_WITHIN_S):
            return True
    except OSError:
        return False
