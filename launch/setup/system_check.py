"""Finds missing system libraries before they turn up as an import error: `python -m dualpath_sgl.launch.setup.system_check`.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """Something of the operating system: a shared library, or what SGLang builds extensions with."""

    soname: str
    """`lib*.so.N`, a header `*.h`, or a command."""
    debian_package: str
    needed_by: str


LIBRARIES = (
    Library("libibverbs.so.1", "libibverbs1", "Mooncake's transfer engine links it, also when it uses TCP"),
    Library("libnuma.so.1", "libnuma1", "Mooncake places buffers on NUMA nodes with it"),
    Library("libcurl.so.4", "libcurl4", "Mooncake's store client links it"),
    Library("libstdc++.so.6", "libstdc++6", "torch, Mooncake and the router are C++"),
    Library("c++", "g++", "SGLang compiles its page hash at the first request"),
    Library("ninja", "ninja-build", "SGLang compiles its page hash with it"),
    Library("setpriv", "util-linux", "a cluster's processes end with the supervisor that started them"),
    Library("openssl/sha.h", "libssl-dev", "SGLang's page hash includes it"),
)


def missing_libraries(libraries: tuple[Library, ...] = LIBRARIES) -> list[Library]:
    """Those that the dynamic loader, the compiler or the shell does not find."""
    return [library for library in libraries if not _found(library.soname)]


def explain(missing: list[Library]) -> str:
    """Which, why, and the command that installs them."""
    lines = [f"missing system package: {library.soname}: {library.needed_by}" for library in missing]
    packages = " ".join(library.debian_package for library in missing)
    sudo = "" if os.geteuid() == 0 else "sudo "
    return "\n".join([*lines, f"install: {sudo}apt-get update && {sudo}apt-get install -y {packages}"])


def install(missing: list[Library]) -> None:
    """Install them with apt-get; only for root, who needs no password and no question."""
    packages = [library.debian_package for library in missing]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", *command], check=True, env=environment, stdin=subprocess.DEVNULL)


def main(arguments: list[str]) -> int:
    missing = missing_libraries()
    if missing:
        print(explain(missing), file=sys.stderr, flush=True)
        if "--install" not in arguments or os.geteuid() != 0 or shutil.which("apt-get") is None:
            return 1
        try:
            install(missing)
        except subprocess.CalledProcessError as error:
            print(f"{' '.join(error.cmd)} failed with status {error.returncode}", file=sys.stderr)
            return 1
        missing = missing_libraries()
        if missing:
            print(f"still missing after the installation:\n{explain(missing)}", file=sys.stderr)
            return 1
    print("system libraries: all found")
    return 0


def _found(name: str) -> bool:
    if name.endswith(".h"):
        return _includes(name)
    return _loads(name) if ".so" in name else shutil.which(name) is not None


def _includes(header: str) -> bool:
    compiler = shutil.which("c++")
    if compiler is None:
        return False
    probe = subprocess.run(
        [compiler, "-E", "-x", "c++", "-"], input=f"#include <{header}>".encode(), capture_output=True
    )
    return probe.returncode == 0


def _loads(soname: str) -> bool:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
