"""`dualpath setup cpu` and `dualpath setup cuda`: everything beside this package, as it was tested.

In an installed copy what `make setup` is in a source checkout.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable

from dualpath_sgl.launch.setup.pins import CPU, CUDA, TORCH_CPU, Profile
from dualpath_sgl.launch.setup.system_check import explain, missing_libraries

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where torch's CPU build lies.  The hashes decide which files are taken, whatever index has them."""


class SetupError(Exception):
    """The message names what is missing or the command that failed."""


def commands(profile: Profile) -> list[list[str]]:
    """Each in a process of its own: the first ones may replace packages that this process has imported."""
    pip = ["pip", "install", "--no-deps", "--require-hashes"]
    if profile is Profile.CUDA:
        modules = [[*pip, "-r", str(CUDA)]]
    else:
        modules = [
            [*pip, "--extra-index-url", TORCH_INDEX, "-r", str(TORCH_CPU)],
            [*pip, "-r", str(CPU)],
            ["dualpath_sgl.cpu_profile.install"],
        ]
    modules.append(["dualpath_sgl.cli", "patch", "apply"])
    return [[sys.executable, "-m", *module] for module in modules]


def install(profile: Profile, say: Callable[[str], None]) -> None:
    """Run the commands, each said before.  Raises SetupError; what was done until then stays."""
    missing = missing_libraries()
    if missing:
        raise SetupError(explain(missing))
    for command in commands(profile):
        say(shlex.join(command))
        if subprocess.run(command).returncode != 0:
            raise SetupError(f"failed: {shlex.join(command)}")
