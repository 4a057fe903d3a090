"""The command line, as a person calls it."""

import json
import os
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
