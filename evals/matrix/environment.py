"""On what an experiment ran: versions, machine, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
from pydantic import BaseModel

from dualpath_sgl import __version__

PACKAGES = ("sglang", "sglang-router", "sglang-cpu", "mooncake-transfer-engine", "torch")


class Environment(BaseModel):
    command: str
    versions: dict[str, str]
    commit: str | None
    """Of the source checkout; None for an installed package."""
    python: str
    system: str
    processor: str
    cores: int
    memory_bytes: int
    gpus: list[str]


def of_this_machine() -> Environment:
    found = {package.name: package.version for package in metadata.distributions()}
    wanted = {name: version for name, version in sorted(found.items()) if name.startswith(PACKAGES)}
    return Environment(
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        versions={"dualpath-sgl": __version__, **wanted},
        commit=_output("git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"),
        python=platform.python_version(),
        system=platform.platform(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        gpus=(_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines(),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _output(*command: str) -> str | None:
    """None when there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
