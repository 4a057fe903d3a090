"""The command line, as a person calls it."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil


def dualpath(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dualpath_sgl.cli", *arguments], capture_output=True, text=True
    )


def run_directory(path: Path, started_s: float) -> str:
    process = {"pid": os.getpid(), "started_s": started_s, "log": "x.log"}
    state = {"name": "t", "mode": "basic", "url": "http://router", "scheduler": None, "engines": {}}
    (path / "cluster.json").write_text(json.dumps(state | {"processes": {"router": process}}))
    return str(path)


def description(path: Path) -> str:
    file = path / "cluster.yaml"
    file.write_text("name: t\ndevice: cpu\nmode: basic\n")
    return str(file)


def test_up_explains_a_bad_description_and_starts_nothing(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("name: t\ndevice: tpu\n")
    result = dualpath("up", "-c", str(file), "--run-dir", str(tmp_path / "run"))
    assert result.returncode == 1
    assert "device: got 'tpu'; input should be 'cpu' or 'cuda'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_up_refuses_a_run_directory_in_use(tmp_path):
    run_dir = run_directory(tmp_path, psutil.Process().create_time())
    result = dualpath("up", "-c", description(tmp_path), "--run-dir", run_dir)
    assert result.returncode == 1
    assert "a cluster runs there" in result.stderr


def test_status_without_a_cluster_says_how_to_start_one(tmp_path):
    result = dualpath("status", "--run-dir", str(tmp_path))
    assert result.returncode == 1
    assert "no cluster runs there; start one: dualpath up" in result.stderr


def test_status_tells_a_running_process_from_a_stranger_with_its_number(tmp_path):
    running = dualpath("status", "--run-dir", run_directory(tmp_path, psutil.Process().create_time()))
    assert (running.returncode, "running" in running.stdout) == (0, True)
    stranger = dualpath("status", "--run-dir", run_directory(tmp_path, 1.0))
    assert (stranger.returncode, "ended" in stranger.stdout) == (1, True)


def test_status_as_json_says_the_same_with_the_same_exit_status(tmp_path):
    for started_s, state, status in ((psutil.Process().create_time(), "running", 0), (1.0, "ended", 1)):
        result = dualpath("status", "--json", "--run-dir", run_directory(tmp_path, started_s))
        document = json.loads(result.stdout)
        assert (result.returncode, document["processes"]["router"]["state"]) == (status, state)
        assert (document["mode"], document["scheduler"]) == ("basic", None)


def test_status_explains_a_run_directory_that_is_something_else(tmp_path):
    (tmp_path / "cluster.json").write_text('{"name": "t"}')
    result = dualpath("status", "--run-dir", str(tmp_path))
    assert result.returncode == 1
    for part in ("--run-dir", "cluster.json", "mode", "remove it"):
        assert part in result.stderr


def test_patches_are_told_as_json_too():
    result = dualpath("patch", "check", "--json")
    document = json.loads(result.stdout)
    assert document["applied"] == (result.returncode == 0)
    states = {package["package"]: package["state"] for package in document["packages"]}
    assert set(states) >= {"sglang", "sglang-router"}


def completed(line: str) -> list[str]:
    """What the shell offers for the last word."""
    words = shlex.split(line)
    at = len(words) if line.endswith(" ") else len(words) - 1
    environment = {"_DUALPATH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(at)}
    program = Path(sys.executable).with_name("dualpath")
    return subprocess.run(
        [program], env=os.environ | environment, capture_output=True, text=True
    ).stdout.split()


def test_the_shell_completes_commands_and_options_those_loaded_when_called_too():
    assert {"up", "status", "demo", "trace", "eval", "sim"} <= set(completed("dualpath "))
    assert completed("dualpath tra") == ["trace"]
    assert completed("dualpath trace ") == ["show"]
    assert {"--list", "--json", "--verbose"} <= set(completed("dualpath trace show --"))
    assert "--trace" in completed("dualpath eval run --")
    assert "--run-dir" in completed("dualpath status --")


def test_the_script_for_a_shell_can_be_had():
    result = dualpath("--show-completion", "bash")
    assert result.returncode == 0 and "COMP_WORDS" in result.stdout


def test_an_unknown_package_is_refused_by_the_patch_command():
    result = dualpath("patch", "check", "--package", "absent")
    assert result.returncode == 1
    assert "no patches for 'absent'" in result.stderr


def test_the_version_is_told_with_those_of_sglang_and_mooncake():
    result = dualpath("--version")
    assert result.returncode == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names[0] == "dualpath-sgl" and {"sglang", "sglang-router"} <= set(names)
    assert any(name.startswith("mooncake-transfer-engine") for name in names)
