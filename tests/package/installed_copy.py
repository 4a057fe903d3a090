"""Builds this project and installs it into virtual environments of its own, without any network.

Other packages come from the environment that runs the tests; of that one's editable installation of
this project nothing is seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[2]
NAME = "dualpath-sgl"
LINKED = ("evals", "launch", "patches", "requirements")
"""Folders of the repository that are installed inside `dualpath_sgl`."""


def tracked() -> list[str]:
    """Files of the repository, relative to it: tracked ones, and new ones that are not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in set(listed.split("\0")) if name and os.path.lexists(PROJECT / name))


def to_be_installed() -> dict[str, Path]:
    """Path in site-packages -> the repository's file, of everything in the two packages."""
    places = {}
    for name in tracked():
        top = name.partition("/")[0]
        if top in LINKED:
            places[f"dualpath_sgl/{name}"] = PROJECT / name
        elif top in ("dualpath_sgl", "scheduler_svc") and not (PROJECT / name).is_symlink():
            places[name] = PROJECT / name
    return places


def copy_of_tree(target: Path) -> Path:
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, target / name, follow_symlinks=False)
    return target


def build(kind: str, tree: Path, out: Path) -> Path:
    """`kind`: wheel or sdist.  By the build backend itself, as `pip` and `build` call it."""
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel in it, and an empty folder to run commands from."""

    root: Path
    work: Path

    @classmethod
    def create(cls, folder: Path, wheel: Path) -> Environment:
        environment = cls(folder / "env", folder / "work")
        venv.create(environment.root, symlinks=True)
        environment.work.mkdir()
        done = environment.pip("install", "--quiet", "--no-index", "--no-deps", str(wheel))
        assert done.returncode == 0, done.stderr
        return environment

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """By the pip of the environment that runs the tests: one in here takes seconds to unpack."""
        command = [sys.executable, "-m", "pip", "--python", str(self.root / "bin" / "python"), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    @property
    def site_packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.root / "lib" / version / "site-packages"

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`command[0]`: python, or a command that the wheel installs."""
        started = self.start(*command, separate_errors=True, **variables)
        out, errors = started.communicate()
        return subprocess.CompletedProcess(started.args, started.returncode, out, errors)

    def start(self, *command: str, separate_errors: bool = False, **variables: str) -> subprocess.Popen[str]:
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("DUALPATH_", "PYTHON", "XDG_", "VIRTUAL_ENV"))
        }
        return subprocess.Popen(
            [str(self.root / "bin" / command[0]), *command[1:]],
            cwd=self.work,
            env=clean | {"HOME": str(self.root), "COLUMNS": "100"} | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if separate_errors else subprocess.STDOUT,
            text=True,
        )

    def link_declared(self) -> None:
        """What the wheel declares to need, and what that needs, becomes importable."""
        asked = [NAME]
        seen: set[str] = set()
        while asked:
            name = asked.pop()
            if name in seen:
                continue
            seen.add(name)
            if name != NAME:
                self._link(metadata.distribution(name))
            for line in self._requires(name):
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    asked.append(requirement.name.lower())

    def see_everything(self) -> None:
        """All that the tests' environment has: appended, so that the installed copy comes first, and as a mere
        path, so that the editable installation's import hook does not run."""
        (self.site_packages / "tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        for script in Path(sysconfig.get_path("scripts")).iterdir():
            if not (link := self.root / "bin" / script.name).exists():
                link.symlink_to(script)

    def _requires(self, name: str) -> list[str]:
        if name != NAME:
            return metadata.requires(name) or []
        (installed,) = metadata.distributions(name=NAME, path=[str(self.site_packages)])
        return installed.requires or []

    def _link(self, distribution: metadata.Distribution) -> None:
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__", "."}
        for top in tops:
            link = self.site_packages / top
            if not link.exists():
                link.symlink_to(str(distribution.locate_file(top)))
