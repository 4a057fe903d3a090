"""The rate of Mooncake alone between two processes, which run `evals/load/raw_read.py`."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, NamedTuple

from dualpath_sgl.evals.common.errors import EvalError

TIMEOUT_S = 120.0


class Place(NamedTuple):
    """Where one of the two processes runs."""

    address: str
    enter: Callable[[list[str]], list[str]] = list
    """The command that runs a command there; by default this host as it is."""


@contextmanager
def raw_reads(
    server: Place,
    reader: Place,
    size_bytes: int,
    *,
    block_bytes: int | None = None,
    pinned: bool = False,
) -> Iterator[Callable[[], float]]:
    """A function that reads `size_bytes` and returns bytes per second, whenever it is called.

    One block each, or blocks of `block_bytes`; `pinned` registers both sides' memory with CUDA, as
    SGLang does with host pools.  Raises EvalError when either process fails.
    """
    module = [sys.executable, "-m", "dualpath_sgl.evals.load.raw_read"]
    size = [f"--bytes={size_bytes}", *(["--pinned"] if pinned else [])]
    with _process(server.enter([*module, "serve", f"--host={server.address}", *size])) as serving:
        # Mooncake also writes to standard output; the line begins with the address.
        found = next((line for line in serving.lines if line.startswith(f"{server.address}:")), None)
        if found is None:
            raise EvalError(f"raw read: the server on {server.address} did not start")
        session, memory = found.split()
        blocks = f"--block-bytes={block_bytes or size_bytes}"
        read = [*module, "read", f"--host={reader.address}", *size, blocks]
        with _process(reader.enter([*read, f"--session={session}", f"--address={memory}"])) as reading:

            def rate() -> float:
                overdue = threading.Timer(TIMEOUT_S, reading.process.kill)
                overdue.start()
                try:
                    with suppress(BrokenPipeError):
                        print(file=reading.commands, flush=True)
                    seconds = next((line for line in reading.lines if _is_number(line.strip())), None)
                finally:
                    overdue.cancel()
                if seconds is None:
                    raise EvalError(f"read from {session} failed with status {reading.process.wait()}")
                return size_bytes / float(seconds)

            yield rate


def raw_rates(server: Place, reader: Place, size_bytes: int, repetitions: int, **how) -> list[float]:
    """`repetitions` of `raw_reads` one after the other; `how` are its options."""
    with raw_reads(server, reader, size_bytes, **how) as rate:
        return [rate() for _ in range(repetitions)]


class _Running(NamedTuple):
    process: subprocess.Popen[str]
    commands: IO[str]
    lines: IO[str]


@contextmanager
def _process(command: list[str]) -> Iterator[_Running]:
    """It ends when its standard input does, which is when the block does."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        try:
            yield _Running(process, process.stdin, process.stdout)
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
