"""Every command that a page shows is run here, or says that it is not; each is real to the last option."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from doc_pages import PAGES, PROJECT, Command, blocks, name, prose, request, shell_commands
from typer.main import get_command

from dualpath_sgl.cli import configuration_page
from dualpath_sgl.cli.__main__ import app
from dualpath_sgl.router.paths import GENERATES
from dualpath_sgl.start.config import Settings
from scheduler_svc.__main__ import serve
from scheduler_svc.http_place import PLACE_PATH

COMMANDS = [command for page in PAGES for command in shell_commands(page)]
LANGUAGES = {"sh", "text", "yaml", "nft"}
LIMIT_S = 120
MAY_FIND_PROBLEMS = {"doctor"}
"""Its exit status is about this machine."""
FOLDERS = ("launch", "evals", "patches", "docs", "requirements", "tests")


def its_name(command: Command) -> str:
    return f"{name(command.page)}: {' '.join(command.words)[:60]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_fenced_block_says_what_it_is(page: Path):
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("command", COMMANDS, ids=its_name)
def test_every_command_in_a_block_is_real(command: Command):
    check(list(command.words), command.is_run)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_in_a_sentence_is_real(page: Path):
    for shown in re.findall(r"`((?:dualpath|make|python -m) [^`]+)`", prose(page)):
        for words in shown.split("&&"):
            check(words.split(), is_run=False)


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.is_run], ids=its_name)
def test_every_command_that_does_not_say_otherwise_runs(command: Command, tmp_path: Path):
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(PROJECT / folder)
    here = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{here}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        command.words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    allowed = {0, 1} if command.words[1] in MAY_FIND_PROBLEMS else {0}
    assert done.returncode in allowed and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_yaml_block_can_be_read(page: Path):
    for block in blocks(page):
        if block.language == "yaml":
            assert all(isinstance(one, dict) for one in yaml.safe_load_all(block.text))


def test_what_is_not_there_is_noticed():
    for words in (
        ["dualpath", "up", "--no-such"],
        ["dualpath", "upp"],
        ["make", "no-such"],
        ["python", "-m", "scheduler_svc", "--no-such"],
        ["dualpath", "up", "-c", "launch/clusters/no-such.yaml"],
        ["export", "DUALPATH_NO_SUCH=1"],
        ["curl", "http://127.0.0.1:PORT/no-such", "-d", "{}"],
        ["no-such-program"],
    ):
        with pytest.raises((AssertionError, KeyError)):
            check(words, is_run=True)


def check(words: list[str], is_run: bool) -> None:
    """Raises AssertionError or KeyError for a command, option or file that does not exist.

    Programs that are none of ours may only be shown as not run.
    """
    program, rest = Path(words[0]).name, words[1:]
    for word in rest:
        assert not word.startswith(tuple(f"{folder}/" for folder in FOLDERS)) or (PROJECT / word).exists(), (
            word
        )
    match program:
        case "dualpath":
            check_dualpath(rest)
        case "make":
            targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.M)
            assert {word for word in rest if "=" not in word} <= set(targets)
        case "python" if rest[0] == "-m":
            assert options(rest[2:]) <= options_of(rest[1]) | {"--help"}
        case "pip":
            pins = [
                PROJECT / "requirements" / Path(after).name for word, after in pairwise(rest) if word == "-r"
            ]
            assert all(file.exists() for file in pins)
        case "pytest":
            assert options(rest) <= {"--storm-seeds", "-m", "-q"}
        case "export":
            known = {f"DUALPATH_{field.upper()}" for field in Settings.model_fields}
            assert {word.partition("=")[0] for word in rest} <= known
        case "curl":
            asked = request(tuple(words))
            json.loads(asked.body)
            assert asked.path in {*GENERATES, PLACE_PATH}
        case _:
            assert not is_run, f"{program}: nothing says whether it runs"


def check_dualpath(words: list[str]) -> None:
    command, known = get_command(app), configuration_page.commands()
    while known and words and not words[0].startswith("-"):
        command, words = known[words[0]], words[1:]
        known = getattr(command, "commands", None)
    offered = {name for one in command.params for name in option_names(one)}
    assert options(words) <= offered | {"--help"}, f"{options(words) - offered}"


def options(words: list[str]) -> set[str]:
    """Those before a lone `--`."""
    before = words[: words.index("--")] if "--" in words else words
    return {word.partition("=")[0] for word in before if re.match(r"--?[a-z]", word)}


def option_names(parameter: Any) -> tuple[str, ...]:
    return (*parameter.opts, *parameter.secondary_opts)


@cache
def options_of(module: str) -> set[str]:
    """What `python -m module` understands."""
    if module in ("dualpath_sgl.launch.engine", "sglang.launch_server"):
        from sglang.srt.server_args import ServerArgs

        return _of_parser(ServerArgs.add_cli_args)
    if module == "sglang_router.launch_router":
        from sglang_router.router_args import RouterArgs

        return _of_parser(lambda parser: RouterArgs.add_cli_args(parser, use_router_prefix=False)) | {
            "--host"
        }
    if module == "sglang.bench_serving":
        told = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
        return set(re.findall(r"--[a-z-]+", told.stdout))
    if hasattr(importlib.import_module(module), "__path__"):
        module = f"{module}.__main__"
    program = typer.Typer(add_completion=False)
    program.command()(serve if module == "scheduler_svc.__main__" else importlib.import_module(module).main)
    return {name for one in get_command(program).params for name in option_names(one)}


def _of_parser(add_options: Any) -> set[str]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return set(parser._option_string_actions)
