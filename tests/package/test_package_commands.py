"""What the installed copy can do: beside its declared dependencies only, and with the CPU profile."""

import json
import re
from pathlib import Path

import pytest
from installed_copy import PROJECT, Environment

SPAN = {
    "traceID": "3f2a" + "0" * 28,
    "spanID": "00000000000000aa",
    "operationName": "request",
    "references": [],
    "startTime": 1_700_000_000_000_000,
    "duration": 1500,
    "tags": [],
    "logs": [],
    "processID": "p1",
}
TRACES = {
    "data": [
        {
            "traceID": SPAN["traceID"],
            "spans": [SPAN],
            "processes": {"p1": {"serviceName": "prefill-0", "tags": []}},
        }
    ]
}
MODULES = (
    "dualpath_sgl.cli.__main__, dualpath_sgl.evals.cli, dualpath_sgl.evals.sim.studies.command, "
    "dualpath_sgl.launch.checks.doctor, scheduler_svc.__main__"
)


def said_by(environment: Environment, code: str, **variables: str) -> str:
    done = environment.run("python", "-c", code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_is_imported_from_the_source_tree(bare):
    code = (
        f"import json, sys, {MODULES}; files = [getattr(m, '__file__', None) for m in sys.modules.values()]"
    )
    files = json.loads(said_by(bare, f"{code}; print(json.dumps([*filter(None, files), *sys.path]))"))
    assert [file for file in files if Path(file).is_relative_to(PROJECT)] == []
    assert str(bare.site_packages / "dualpath_sgl" / "launch" / "cli.py") in files


@pytest.mark.parametrize("name", ["launch", "evals", "patches", "requirements", "tests"])
def test_the_repository_s_folders_are_no_packages_of_their_own(bare, name):
    done = bare.run("python", "-c", f"import {name}")
    assert f"No module named '{name}'" in done.stderr


def test_the_declared_dependencies_are_of_the_versions_that_are_asked_for(bare):
    done = bare.pip("check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["", "up", "eval", "sim", "setup"])
def test_every_command_explains_itself(bare, command):
    done = bare.run("dualpath", *filter(None, [command]), "--help")
    assert done.returncode == 0 and "Usage: dualpath" in done.stdout, done.stderr


def test_doctor_says_what_is_missing_and_a_command_that_is_there(bare):
    done = bare.run("dualpath", "doctor", "--json")
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["findings"]
    told = [f"{finding['text']} {finding['remedy']}" for finding in findings if finding["level"] == "refused"]
    assert any("sglang is not installed" in text for text in told)
    assert any("builds of Mooncake: none" in text for text in told)
    for text in told:
        (command, profile), *_ = re.findall(r"dualpath (\w+) (\w+)", text)
        assert profile in bare.run("dualpath", command, "--help").stdout


@pytest.mark.parametrize("command", [["patch", "check"], ["patch", "apply"], ["demo"]])
def test_without_sglang_what_needs_it_says_so_in_one_line(bare, command):
    done = bare.run("dualpath", *command)
    assert done.returncode != 0
    assert done.stderr.startswith("error: sglang is not installed") and "dualpath setup" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_keys_are_made(bare):
    done = bare.run("dualpath", "keys", "generate", "keys", "--peer", "prefill-0")
    assert done.returncode == 0, done.stderr
    assert (bare.work / "keys" / "peers" / "prefill-0.key_secret").exists()


def test_a_cluster_is_simulated(bare):
    sizes = ["--model=ds-27b", "--row=32k", "--agents=4", "--prefill-nodes=1", "--decode-nodes=1"]
    done = bare.run("dualpath", "sim", "run", *sizes)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_a_trace_is_shown(bare):
    (bare.work / "traces.json").write_text(json.dumps(TRACES))
    listed = bare.run("dualpath", "trace", "show", "--list", "--file", "traces.json")
    assert listed.returncode == 0, listed.stderr
    shown = bare.run("dualpath", "trace", "show", "3f2a", "--file", "traces.json")
    assert shown.returncode == 0 and "prefill-0" in shown.stdout, shown.stderr


def test_the_trace_that_comes_along_is_cut_into_a_smaller_one(bare):
    code = (
        "from dualpath_sgl.evals.agents.trace import SHIPPED; print(*sorted(SHIPPED.rglob('trace_*.json')))"
    )
    first, *_ = said_by(bare, code).split()
    done = bare.run("dualpath", "eval", "trace-subset", first, "--out", "cut", "--requests", "2")
    assert done.returncode == 0, done.stderr
    (cut,) = (bare.work / "cut").iterdir()
    assert len(json.loads(cut.read_text())["requests"]) == 2


@pytest.mark.parametrize("cache", ["", "relative", "/somewhere/else"])
def test_tiny_models_go_to_the_user_s_cache(bare, cache):
    code = "from dualpath_sgl.launch.setup.tiny_model import cache_directory; print(cache_directory())"
    of_user = cache if cache.startswith("/") else f"{bare.root}/.cache"
    assert said_by(bare, code, XDG_CACHE_HOME=cache) == f"{of_user}/dualpath/models"


def test_the_set_up_s_commands_are_there(bare):
    code = (
        "from dualpath_sgl.launch.setup.install import Profile, commands; import json;"
        "print(json.dumps([command for profile in Profile for command in commands(profile)]))"
    )
    commands = json.loads(said_by(bare, code))
    files = [argument for command in commands for argument in command if argument.endswith(".txt")]
    assert len(files) == 3 and all(Path(file).is_file() for file in files)
    for module in {command[2] for command in commands} - {"pip"}:
        said_by(bare, f"import importlib.util; assert importlib.util.find_spec({module!r})")


def test_the_stand_ins_of_the_cpu_profile_are_the_installed_ones(complete):
    done = complete.run("python", "-m", "dualpath_sgl.cpu_profile.install")
    assert done.returncode == 0, done.stderr
    found = said_by(complete, "import importlib.util as u; print(u.find_spec('sgl_kernel').origin)")
    assert Path(found).is_relative_to(complete.site_packages / "dualpath_sgl" / "cpu_profile")


def test_sglang_is_given_the_plugins_of_the_installed_copy(complete):
    code = (
        "from importlib.metadata import entry_points;"
        "print(*sorted(f'{e.name} {e.load().__code__.co_filename}' for e in"
        " entry_points(group='sglang.srt.plugins')))"
    )
    names = said_by(complete, code).split()
    assert names[::2] == ["dualpath", "dualpath_cpu"]
    assert all(Path(file).is_relative_to(complete.site_packages) for file in names[1::2])
