"""The scheduler as a real process: start, stop, kill, restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq
from otlp_collector import attributes, collector
from scheduler_vocabulary import PAGE_BYTES, decode_report, done, heartbeat, lane, prefill_report

from dualpath_sgl.launch.processes.ports import FreePorts
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.keys import generate
from scheduler_svc.wire.protocol import Error, ErrorCode, Plan

WAIT_S = 60.0
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def scheduler(*options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A scheduler process and its address; killed at the end unless it ended itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scheduler_svc", *options], stdout=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(WAIT_S, process.kill)
    watchdog.start()
    try:
        ready = process.stdout.readline()
        assert ready.startswith("scheduler ready at tcp://127.0.0.1:"), ready
        yield process, ready.split()[-1]
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def receive_all(peers: list[SchedulerClient]) -> list:
    return [peer.receive(WAIT_S) for peer in peers]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_after_one_ready_line(signal_number):
    with scheduler("--bind", "tcp://127.0.0.1:0") as (process, _):
        process.send_signal(signal_number)
        assert process.wait(WAIT_S) == 0
        assert process.stdout.read() == ""


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)  # closes what a failed test left open, which would block the exit


def test_a_killed_scheduler_relearns_its_engines_from_heartbeats(context):
    with scheduler("--bind", "tcp://127.0.0.1:0", "--policy", "decode") as (process, address):
        prefill, decode = SchedulerClient(address, context), SchedulerClient(address, context)
        prefill.send(heartbeat("p0"))
        decode.send(heartbeat("d0"))
        while len(prefill.status(WAIT_S).engines) < 2:
            pass
        prefill.send(prefill_report(1, 0, 10))
        decode.send(decode_report(1, 0))
        assert [type(plan) for plan in receive_all([prefill, decode])] == [Plan, Plan]
        process.kill()
        process.wait()

    with scheduler("--bind", address, "--policy", "decode") as (_, again):
        assert again == address
        # The peers' sockets reconnect by themselves; nothing else of the old process is left.
        assert prefill.status(WAIT_S).engines == ()
        prefill.send(prefill_report(2, 0, 10))
        refusal = prefill.receive(WAIT_S)
        assert isinstance(refusal, Error) and refusal.code is ErrorCode.UNKNOWN_ENGINE

        prefill.send(heartbeat("p0"))
        decode.send(heartbeat("d0"))
        while len(prefill.status(WAIT_S).engines) < 2:
            pass
        # A load that began before the kill is still counted.
        decode.send(done(1, "d0", lane("store", 0, 10)))
        read = {entry.engine.engine_id: entry.store_read_bytes for entry in decode.status(WAIT_S).engines}
        assert read == {"p0": 0, "d0": 10 * PAGE_BYTES}
        prefill.send(prefill_report(2, 0, 10))
        decode.send(decode_report(2, 0))
        plans = receive_all([prefill, decode])
        assert plans[0] == plans[1] and plans[0].room == 2


def test_its_spans_reach_an_otlp_endpoint():
    with collector() as endpoint:
        options = ("--bind", "tcp://127.0.0.1:0", "--otlp-endpoint", endpoint.address, "--metrics-port", "0")
        with scheduler(*options) as (process, address), SchedulerClient(address) as peer:
            for message in (
                heartbeat("p0"),
                heartbeat("d0"),
                prefill_report(1, 0, 10, traceparent=CALLER),
                decode_report(1, 0),
            ):
                peer.send(message)
            assert isinstance(peer.receive(WAIT_S), Plan)
            process.terminate()
            assert process.wait(WAIT_S) == 0
        service, span = endpoint.next_span()
    assert (service, span.name) == ("dualpath-scheduler", f"plan {attributes(span)['dualpath.path']}")
    assert span.trace_id.hex() == CALLER.split("-")[1]
    assert attributes(span)["dualpath.policy"] == "split"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--policy", "nope"],
            ["'nope' is unknown", "prefill", "decode", "round_robin", "shorter_queue", "split"],
        ),
        (["--placement", "nope"], ["'nope' is unknown", "affinity", "paper", "round_robin", "random"]),
        (["--bind", "tcp://0.0.0.0:0"], ["--insecure-bind", "--curve-server-key-file"]),
        (["--authorized-keys-dir", "nowhere"], ["give both"]),
        (["--metrics-host", "127.0.0.1"], ["--metrics-host", "give --metrics-port too"]),
        (["--metrics-host", "192.0.2.1", "--metrics-port", "0"], ["192.0.2.1:0", "another --metrics-host"]),
        (["--curve-server-key-file", "x", "--authorized-keys-dir", "nowhere"], ["holds no .key file"]),
    ],
)
def test_a_bad_option_ends_it_with_the_remedy(options, words):
    command = [sys.executable, "-m", "scheduler_svc", *options]
    wide = os.environ | {"COLUMNS": "1000"}  # so that no sentence is broken
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=wide)
    assert ended.returncode == 2 and ended.stdout == ""
    for word in words:
        assert word in ended.stderr


def test_a_second_scheduler_process_on_one_address_ends_with_the_remedy():
    with scheduler("--bind", "tcp://127.0.0.1:0") as (_, address):
        command = [sys.executable, "-m", "scheduler_svc", "--bind", address]
        wide = os.environ | {"COLUMNS": "1000"}
        second = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=wide)
        assert second.returncode == 2 and "is another scheduler running there?" in second.stderr
        with SchedulerClient(address) as peer:
            assert peer.status(WAIT_S).engines == ()


def test_curve_from_end_to_end_with_key_files(tmp_path):
    generate(tmp_path, ["engine"])
    options = (
        "--bind=tcp://127.0.0.1:0",
        f"--curve-server-key-file={tmp_path / 'scheduler.key_secret'}",
        f"--authorized-keys-dir={tmp_path / 'peers'}",
    )
    with scheduler(*options) as (process, address):
        files = (tmp_path / "peers/engine.key_secret", tmp_path / "scheduler.key")
        with SchedulerClient(address, curve_key_files=files) as peer:
            assert peer.status(WAIT_S).engines == ()
        process.terminate()
        assert process.wait(WAIT_S) == 0


def test_it_loads_nothing_of_sglang_torch_or_the_other_parts():
    code = (
        "import importlib, pkgutil, sys, scheduler_svc\n"
        "for module in pkgutil.iter_modules(scheduler_svc.__path__):\n"
        "    importlib.import_module(f'scheduler_svc.{module.name}')\n"
        "assert 'scheduler_svc.server' in sys.modules\n"
        "strangers = {'sglang', 'torch', 'mooncake', 'dualpath_sgl', 'launch', 'evals'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {strangers}' if strangers else 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)
    assert ended.returncode == 0, ended.stderr


def test_a_scheduler_that_stands_by_takes_over_when_the_first_one_is_killed(context):
    address = f"tcp://127.0.0.1:{FreePorts('127.0.0.1').take()}"
    with scheduler("--bind", address) as (first, _):
        second = subprocess.Popen(
            [sys.executable, "-m", "scheduler_svc", "--bind", address, "--standby"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert "standing by: 127.0.0.1 port" in second.stderr.readline()
            assert SchedulerClient(address, context).status(WAIT_S).engines == ()
            first.kill()
            assert second.stdout.readline() == f"scheduler ready at {address}\n"
            peers = [SchedulerClient(address, context) for _ in range(2)]
            for peer, name in zip(peers, ("p0", "d0"), strict=True):
                peer.send(heartbeat(name))
                assert name in {one.engine.engine_id for one in peer.status(WAIT_S).engines}
            peers[0].send(prefill_report(5, 0, 10))
            peers[1].send(decode_report(5, 0))
            assert [type(plan) for plan in receive_all(peers)] == [Plan, Plan]
        finally:
            second.kill()
            second.communicate()


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:0", "ipc:///x", "tcp://127.0.0.1:70000"])
def test_an_address_that_will_never_be_free_is_not_waited_for(bind):
    ended = subprocess.run(
        [sys.executable, "-m", "scheduler_svc", "--bind", bind, "--standby"],
        capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert ended.returncode == 2 and "--bind" in ended.stderr


def test_a_secured_scheduler_can_be_scraped_at_an_address_of_its_own(tmp_path):
    generate(tmp_path, ["p0"])
    port = FreePorts("127.0.0.2").take()
    options = ["--bind", "tcp://127.0.0.1:0", "--metrics-host", "127.0.0.2", "--metrics-port", str(port)]
    options += ["--curve-server-key-file", str(tmp_path / "scheduler.key_secret")]
    options += ["--authorized-keys-dir", str(tmp_path / "peers")]
    with scheduler(*options):
        for path, words in (("/metrics", "dualpath_rooms_open 0.0"), ("/healthz", "ok")):
            with urllib.request.urlopen(f"http://127.0.0.2:{port}{path}", timeout=WAIT_S) as answer:
                assert words in answer.read().decode()
