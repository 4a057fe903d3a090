"""The rate of Mooncake alone between two processes, which run `evals/topology/raw_read.py`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from evals.errors import EvalError

TIMEOUT_S = 120.0


class Place(NamedTuple):
    """Where one of the two processes runs."""

    address: str
    enter: Callable[[list[str]], list[str]] = list
    """The command that runs a command there; by default this host as it is."""


def raw_rates(
    server: Place,
    reader: Place,
    size_bytes: int,
    repetitions: int,
    *,
    block_bytes: int | None = None,
    pinned: bool = False,
) -> list[float]:
    """Bytes per second of reads of `size_bytes` each, after one that warms up.

    One block each, or blocks of `block_bytes`; `pinned` registers both sides' memory with CUDA, as
    SGLang does with host pools.  Raises EvalError when either process fails.
    """
    module = [sys.executable, "-m", "evals.topology.raw_read"]
    size = [f"--bytes={size_bytes}", *(["--pinned"] if pinned else [])]
    serve = [*module, "serve", f"--host={server.address}", *size]
    read = [*module, "read", f"--host={reader.address}", *size, f"--repetitions={repetitions}"]
    read.append(f"--block-bytes={block_bytes or size_bytes}")
    quiet = {"stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(
        server.enter(serve), stdin=subprocess.PIPE, stdout=subprocess.PIPE, **quiet
    ) as serving:
        # Mooncake also writes to standard output; the line begins with the address.
        found = next((line for line in serving.stdout if line.startswith(f"{server.address}:")), None)
        if found is None:
            raise EvalError(f"raw read: the server on {server.address} did not start")
        session, memory = found.split()
        done = subprocess.run(
            reader.enter([*read, f"--session={session}", f"--address={memory}"]),
            stdout=subprocess.PIPE,
            timeout=TIMEOUT_S,
            **quiet,
        )
        serving.stdin.close()
    if done.returncode != 0:
        raise EvalError(f"raw read from {session} failed with status {done.returncode}")
    return [size_bytes / float(line) for line in done.stdout.split() if _is_number(line)]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
