"""Who may speak to a cluster: what a cluster file must say, and what each process is given."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dualpath_sgl.cli.__main__ import app
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.launch.config.addresses import Addresses, on_network, on_one_host
from dualpath_sgl.launch.config.cluster import ClusterConfig, ConfigError, load
from dualpath_sgl.launch.config.security import OPERATOR, key_files, relay_environment
from dualpath_sgl.launch.processes.commands import (
    Ports,
    engine_environment,
    engine_specs,
    router_command,
    scheduler_command,
)
from dualpath_sgl.launch.supervision import exposure
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.topology.plan import Rates, make_plan
from dualpath_sgl.start.config import settings
from scheduler_svc.wire.keys import generate, load_public, load_secret
from scheduler_svc.wire.reach import is_private

PORTS = Ports(
    master=1, master_metrics=2, scheduler=3, scheduler_metrics=7, collector=4, router=5, router_metrics=6
)
LOOPBACK = ("127.0.0.1", "127.0.0.2", "127.8.9.1", "::1", "localhost")
ELSEWHERE = ("192.168.1.5", "10.1.2.3", "fd00::7", "8.8.8.8", "node-1")
WAIT_S = 30.0


def write(tmp_path: Path, **fields) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"name": "test", "device": "cpu", "mode": "decode-side"} | fields))
    return path


def cluster(tmp_path: Path, **fields) -> ClusterConfig:
    return load(write(tmp_path, **fields))


def refusal(tmp_path: Path, **fields) -> str:
    with pytest.raises(ConfigError) as caught:
        cluster(tmp_path, **fields)
    return str(caught.value)


@pytest.fixture
def keys(tmp_path) -> Path:
    generate(tmp_path / "keys", ["prefill-0", "decode-0", "router", "operator"])
    return tmp_path / "keys"


def shaped(config: ClusterConfig) -> Addresses:
    return on_network(make_plan(3, ["prefill-0", "decode-0"], Rates(1, 1)))


# -- the cluster file ----------------------------------------------------------------------------


@pytest.mark.case("launcher_insecure_bind")
@pytest.mark.parametrize("host", LOOPBACK)
def test_on_loopback_nothing_is_asked_for_and_nothing_is_opened(tmp_path, host):
    command = scheduler_command(cluster(tmp_path, host=host), on_one_host(host), PORTS)
    assert not {"--insecure-bind"} & set(command) and not any("curve" in word for word in command)


@pytest.mark.case("launcher_insecure_bind")
@pytest.mark.parametrize("mode", ["decode-side", "basic"])
@pytest.mark.parametrize("host", ELSEWHERE)
def test_a_host_that_others_can_reach_is_refused_until_the_file_says_who_may(tmp_path, host, mode):
    message = refusal(tmp_path, host=host, mode=mode)
    assert f"host is {host!r}" in message
    for remedy in ("security: {keys: DIRECTORY}", "security: {trusted_network: true}", "127.0.0.1"):
        assert remedy in message


@pytest.mark.case("launcher_insecure_bind")
@pytest.mark.parametrize("host", ELSEWHERE)
def test_only_the_explicit_word_opens_the_scheduler(tmp_path, keys, host):
    trusted = cluster(tmp_path, host=host, security={"trusted_network": True})
    assert "--insecure-bind" in scheduler_command(trusted, on_one_host(host), PORTS)
    secured = cluster(tmp_path, host=host, security={"keys": str(keys)})
    assert "--insecure-bind" not in scheduler_command(secured, on_one_host(host), PORTS)


@pytest.mark.parametrize(
    "security", [{}, {"trusted_network": False}, {"keys": "k", "trusted_network": True}, {"keys": None}]
)
def test_a_security_section_says_exactly_one_thing(tmp_path, security):
    assert "security: give either keys" in refusal(tmp_path, security=security)


def test_a_misspelt_word_is_no_word(tmp_path):
    message = refusal(tmp_path, security={"trusted_netwrok": True})
    assert "security.trusted_netwrok: unknown field; did you mean 'trusted_network'?" in message


def test_missing_keys_are_named_with_the_command_that_makes_them(tmp_path, keys):
    fields = dict(security={"keys": str(keys)}, decode={"count": 2}, router={"kind": "placing"})
    message = refusal(tmp_path, **fields)
    command = f"dualpath keys generate {keys} --peer decode-1"
    assert "lacks the keys of decode-1; run " + command in message
    made = CliRunner().invoke(app, command.split()[1:])
    assert made.exit_code == 0, made.output
    assert cluster(tmp_path, **fields).security.keys == keys


def test_without_any_keys_one_command_makes_them_all(tmp_path):
    message = refusal(tmp_path, security={"keys": str(tmp_path / "new")})
    command = message.partition("run dualpath ")[2].split()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert cluster(tmp_path, security={"keys": str(tmp_path / "new")})


# -- what each process is given ------------------------------------------------------------------


def test_relays_have_keys_of_their_own(tmp_path, keys):
    secured = {"security": {"keys": str(keys)}, "mode": "relay"}
    assert "lacks the keys of relay-0" in refusal(tmp_path, **secured)
    generate(keys, ["relay-0"])
    config = cluster(tmp_path, **secured)
    found = relay_environment(config.security, on_one_host("10.1.2.3"), "relay-0")
    assert found == {
        "DUALPATH_RELAY_KEY_FILE": str(keys.resolve() / "peers/relay-0.key_secret"),
        "DUALPATH_RELAY_SCHEDULER_KEY_FILE": str(keys.resolve() / "scheduler.key"),
        "DUALPATH_RELAY_PEER_KEYS": str(keys.resolve() / "peers"),
    }


def engine(config: ClusterConfig, addresses: Addresses, name: str) -> dict[str, str]:
    spec = next(spec for spec in engine_specs(config, lambda: 7) if spec.name == name)
    return engine_environment(config, addresses, spec, PORTS, {})


@pytest.fixture
def accepted(monkeypatch) -> Iterator:
    """The settings that an engine makes of an environment; raises what the engine would."""
    for name in [name for name in os.environ if name.startswith("DUALPATH_")]:
        monkeypatch.delenv(name)

    def read(environment: dict[str, str]):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()
        return settings()

    yield read
    settings.cache_clear()


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_every_engine_gets_its_own_key_and_everybody_elses_public_one(tmp_path, keys, accepted, name):
    config = cluster(tmp_path, host="192.168.1.5", security={"keys": str(keys)})
    found = accepted(engine(config, on_one_host(config.host), name))
    own = load_secret(found.key_file)
    assert own[0] == load_public(keys / "peers" / f"{name}.key")
    assert load_public(found.scheduler_key_file) == load_public(keys / "scheduler.key")
    other = {"prefill-0": "decode-0", "decode-0": "prefill-0"}[name]
    assert PeerKeys(found.key_file, found.peer_keys).towards(other)
    assert not found.trusted_network


def test_on_a_trusted_network_engines_are_told_so(tmp_path, accepted):
    config = cluster(tmp_path, host="192.168.1.5", security={"trusted_network": True})
    found = accepted(engine(config, on_one_host(config.host), "decode-0"))
    assert found.trusted_network and found.key_file is None


def test_on_loopback_engines_are_told_nothing(tmp_path, accepted):
    found = accepted(engine(cluster(tmp_path), on_one_host("127.0.0.1"), "decode-0"))
    assert not found.trusted_network and found.key_file is None


def test_a_shaped_network_of_this_machine_needs_no_word_but_takes_keys(tmp_path, keys, accepted):
    network = {"storage_rate": "80mbit"}
    plain = cluster(tmp_path, network=network)
    assert "--insecure-bind" in scheduler_command(plain, shaped(plain), PORTS)
    assert accepted(engine(plain, shaped(plain), "decode-0")).trusted_network
    secured = cluster(tmp_path, network=network, security={"keys": str(keys)})
    assert "--insecure-bind" not in scheduler_command(secured, shaped(secured), PORTS)
    assert not any("TRUSTED" in name for name in engine(secured, shaped(secured), "decode-0"))


def test_the_scheduler_and_a_placing_router_get_theirs(tmp_path, keys):
    config = cluster(tmp_path, security={"keys": str(keys)}, router={"kind": "placing"})
    here = on_one_host(config.host)
    made = scheduler_command(config, here, PORTS)
    assert f"--curve-server-key-file={keys}/scheduler.key_secret" in made
    assert f"--authorized-keys-dir={keys}/peers" in made
    router = router_command(config, here, PORTS, engine_specs(config, lambda: 7))
    assert f"--dualpath-key-file={keys}/peers/router.key_secret" in router
    assert f"--dualpath-scheduler-key-file={keys}/scheduler.key" in router


# -- tools ---------------------------------------------------------------------------------------


@contextmanager
def secured_scheduler(keys: Path) -> Iterator[str]:
    command = [
        sys.executable, "-m", "scheduler_svc", "--bind=tcp://127.0.0.1:0",
        f"--curve-server-key-file={keys / 'scheduler.key_secret'}", f"--authorized-keys-dir={keys / 'peers'}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(WAIT_S, process.kill)
    watchdog.start()
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def status(*arguments: str, **environment: str):
    return CliRunner().invoke(app, ["status", *arguments], env=environment)


def test_status_takes_keys_as_options_or_from_the_environment(keys):
    files = keys / "peers/operator.key_secret", keys / "scheduler.key"
    with secured_scheduler(keys) as address:
        given = "--key-file", str(files[0]), "--scheduler-key-file", str(files[1])
        asked = status("--scheduler", address, *given)
        assert asked.exit_code == 0 and "rooms open 0" in asked.output
        names = ("DUALPATH_KEY_FILE", "DUALPATH_SCHEDULER_KEY_FILE")
        asked = status("--scheduler", address, **dict(zip(names, map(str, files), strict=True)))
        assert asked.exit_code == 0, asked.output
        without = status("--scheduler", address)
        assert without.exit_code == 1 and "--key-file" in without.output
    half = status("--scheduler", address, "--key-file", str(files[0]))
    assert half.exit_code == 1 and "give both" in half.output


def test_status_of_a_run_directory_finds_the_keys_by_itself(tmp_path, keys, monkeypatch):
    running = Cluster(cluster(tmp_path, security={"keys": str(keys)}), tmp_path / "run")
    with secured_scheduler(keys) as address:
        monkeypatch.setattr(Cluster, "scheduler_address", address)
        with running.ask_scheduler() as client:
            assert client.status(WAIT_S).engines == ()
        running.run_dir.mkdir()
        running.processes["scheduler"] = _This()
        monkeypatch.setattr(Cluster, "engines", [])
        running._write_state()
        asked = status("--run-dir", str(running.run_dir))
    assert asked.exit_code == 0 and "rooms open 0" in asked.output, asked.output


class _This:
    """This process, as the launcher knows a child."""

    name, pid, log_path = "scheduler", os.getpid(), Path("x.log")


def test_there_are_no_keys_to_find_without_a_security_section(tmp_path):
    assert key_files(cluster(tmp_path).security, OPERATOR) is None


# -- the machine's own addresses -----------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.31.0.1", "192.168.0.1", "169.254.3.4", "::1", "fd00::1", "fe80::1%eth0",
     "::ffff:10.0.0.1"],
)  # fmt: skip
def test_private_addresses_are_told_from_public_ones(address):
    assert is_private(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "172.32.0.1", "100.64.0.1", "2001:db8::1", "::ffff:8.8.8.8"])
def test_public_addresses_are_told_from_private_ones(address):
    assert not is_private(address)


def test_a_machine_with_a_public_address_is_warned_of_mooncakes_ports():
    said = exposure.warning(["203.0.113.7"])
    assert "203.0.113.7" in said and "Mooncake" in said and "docs/security.md" in said
    assert exposure.warning([]) is None
    assert not any(is_private(address) for address in exposure.public_addresses())
