"""What contributors and continuous integration run is the same, with the same versions."""

import re
import tomllib
from pathlib import Path

import yaml

import dualpath_sgl

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(lines: list[str]) -> dict[str, str]:
    return dict(line.removesuffix(" \\").split("==") for line in lines if "==" in line)


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = [step.get("run", "") for step in workflow["jobs"]["test"]["steps"]]
    ours = re.findall(r"^make .*", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert ours == ["make lint", "make test"]
    assert [command for command in commands if command.startswith("make")] == ours


def test_the_tools_of_make_lint_have_one_version():
    installed = pinned((ROOT / "requirements/lint.txt").read_text().splitlines())
    named = pinned(PROJECT["project"]["optional-dependencies"]["lint"])
    assert named and named.items() <= installed.items()


def test_pre_commit_runs_the_tools_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    tools = [re.findall(r"[\w.]+(?:/[\w.]+)*", hook["entry"])[0].removeprefix(".venv/bin/") for hook in hooks]
    assert [line.split("/bin/")[1].split()[0] for line in recipe.splitlines()] == tools


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {dualpath_sgl.__version__} - " in changelog
