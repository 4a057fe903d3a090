"""A run directory has one user at a time, and what is written there never shows a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dualpath_sgl.launch.processes.run_dir import Claim, ClusterState, ProcessState, RunDirError, read_state


def dualpath(*arguments: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "dualpath_sgl.cli", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


def state(process: ProcessState) -> ClusterState:
    return ClusterState(
        name="t", mode="basic", url="http://router", scheduler=None, engines={}, processes={"router": process}
    )


def this_process(**fields) -> ProcessState:
    me = psutil.Process()
    return ProcessState(pid=me.pid, started_s=me.create_time(), log="x.log", **fields)


def test_a_directory_in_use_is_refused_with_its_name_and_the_users_number(tmp_path):
    claim = Claim(tmp_path)
    with pytest.raises(RunDirError, match=rf"{tmp_path}: a cluster runs there \(process {os.getpid()}\)"):
        Claim(tmp_path)
    claim.release()
    Claim(tmp_path).release()


def test_the_claim_of_a_killed_process_is_gone_though_its_child_lives_on(tmp_path):
    code = f"""
import subprocess, sys, time
from pathlib import Path
from dualpath_sgl.launch.processes.run_dir import Claim
claim = Claim(Path({str(tmp_path)!r}))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(holder.stdout.readline()))
    try:
        with pytest.raises(RunDirError, match=f"process {holder.pid}"):
            Claim(tmp_path)
        holder.kill()
        holder.wait()
        assert child.is_running()
        Claim(tmp_path).release()
    finally:
        child.kill()


def test_a_directory_whose_processes_outlived_their_supervisor_is_refused_with_their_names(tmp_path):
    state(this_process()).write(tmp_path)
    with pytest.raises(RunDirError, match=rf"router \(process {os.getpid()}\); end them"):
        Claim(tmp_path)
    state(this_process().model_copy(update={"started_s": 1.0})).write(tmp_path)
    Claim(tmp_path).release()


def test_up_refuses_a_directory_in_use_and_leaves_its_files_alone(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("name: t\ndevice: cpu\nmode: basic\n")
    run_dir = tmp_path / "run"
    claim = Claim(run_dir)
    state(this_process()).write(run_dir)
    log = run_dir / "logs" / "master.log"
    log.parent.mkdir()
    log.write_text("the first one's")
    result = dualpath("up", "-c", str(file), "--run-dir", str(run_dir))
    claim.release()
    assert result.returncode == 1
    assert f"a cluster runs there (process {os.getpid()})" in result.stderr
    assert "Traceback" not in result.stderr
    assert read_state(run_dir) == state(this_process())
    assert log.read_text() == "the first one's"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"name": "t"',
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"name": 7, "processes": {}}',
        json.dumps({"name": "t", "mode": "m", "url": "u", "scheduler": None, "engines": {}}).encode(),
        state(this_process()).model_dump_json().replace(str(os.getpid()), "-5").encode(),
        state(this_process()).model_dump_json().replace(str(os.getpid()), str(10**30)).encode(),
    ],
    ids=range(11),
)
def test_a_broken_state_is_one_sentence_to_status(tmp_path, content):
    (tmp_path / "cluster.json").write_bytes(content)
    with pytest.raises(RunDirError, match=r"cluster.json: is not what `dualpath up` writes \("):
        read_state(tmp_path)


def test_status_shows_no_traceback_for_a_broken_state(tmp_path):
    (tmp_path / "cluster.json").write_text("{")
    result = dualpath("status", "--run-dir", str(tmp_path))
    assert result.returncode == 1
    assert "remove it and start the cluster again" in result.stderr and "Traceback" not in result.stderr


def test_status_takes_brackets_in_names_as_they_are(tmp_path):
    state(this_process()).model_copy(update={"name": "[/bold]", "url": "[/]"}).write(tmp_path)
    result = dualpath("status", "--run-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "[/bold]" in result.stdout


def test_status_tells_of_a_part_that_was_started_again(tmp_path):
    state(this_process(restarts=2, last_end="was killed by SIGKILL")).write(tmp_path)
    result = dualpath("status", "--run-dir", str(tmp_path))
    assert result.returncode == 0
    assert "started again 2 times, last: was killed by SIGKILL" in result.stdout


def test_status_tells_of_an_engine_that_runs_but_answers_nobody(tmp_path):
    state(this_process(silent=True)).write(tmp_path)
    result = dualpath("status", "--run-dir", str(tmp_path))
    assert result.returncode == 1
    assert "DOES NOT ANSWER" in result.stdout


def test_a_part_that_waits_for_its_next_start_has_ended(tmp_path):
    state(ProcessState(log=str(Path("x.log")), last_end="ended with status 1")).write(tmp_path)
    result = dualpath("status", "--run-dir", str(tmp_path))
    assert (result.returncode, "ended; started again 0 times" in result.stdout) == (1, True)
