"""`dualpath setup`: each step is said, and the first one that fails ends it by name."""

import sys

import pytest
from typer.testing import CliRunner

from dualpath_sgl.cli.__main__ import app
from dualpath_sgl.launch.setup import install
from dualpath_sgl.launch.setup.pins import Profile
from dualpath_sgl.launch.setup.system_check import Library


def step(status: int) -> list[str]:
    return [sys.executable, "-c", f"raise SystemExit({status})"]


def test_the_first_failing_step_is_the_last_one(monkeypatch):
    monkeypatch.setattr(install, "commands", lambda profile: [step(0), step(3), step(0)])
    said = []
    with pytest.raises(install.SetupError, match=r"failed: .*SystemExit\(3\)"):
        install.install(Profile.CPU, said.append)
    assert len(said) == 2


def test_nothing_is_installed_while_a_system_library_is_missing(monkeypatch):
    absent = Library("libabsent.so.1", "libabsent1", "nobody")
    monkeypatch.setattr(install, "missing_libraries", lambda: [absent])
    with pytest.raises(install.SetupError, match=r"apt-get install -y libabsent1"):
        install.install(Profile.CPU, pytest.fail)


def test_only_hashed_files_are_installed():
    for profile in Profile:
        for command in install.commands(profile):
            assert ("--require-hashes" in command) == ("pip" in command)


def test_an_unknown_profile_is_refused_with_the_known_ones():
    asked = CliRunner().invoke(app, ["setup", "tpu"])
    assert asked.exit_code == 2 and "'cpu', 'cuda'" in asked.output
