"""CURVE: keys on disk, who gets in, and who does not."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import zmq
from scheduler_vocabulary import cluster
from test_scheduler_server import WAIT_S, Running
from typer.testing import CliRunner

from scheduler_svc.keys_command import keys_app
from scheduler_svc.metrics import Metrics
from scheduler_svc.server import BindRefused, Server, check_bind
from scheduler_svc.wire.authenticator import PeerAuthenticator
from scheduler_svc.wire.authorized_keys import AuthorizedKeys
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.keys import KeyFileError, generate, load_public, load_secret

REFUSED_S = 0.5
"""A refused peer gets silence; an admitted one answers far sooner, and `WAIT_S` is given to it."""


@pytest.fixture
def keys(tmp_path) -> Path:
    generate(tmp_path / "keys", ["engine", "router"])
    return tmp_path / "keys"


@pytest.fixture
def secured(keys) -> Iterator[Running]:
    """A scheduler that admits the peers of `keys`."""
    with ExitStack() as stack:
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        stack.enter_context(PeerAuthenticator(keys / "peers", context))
        made = Running(cluster(), context=context, curve_server_key_file=keys / "scheduler.key_secret")
        stack.callback(made.stop)
        yield made


def client(scheduler: Running, *files: Path) -> SchedulerClient:
    return SchedulerClient(scheduler.address, zmq.Context(), files or None)


@pytest.mark.parametrize("peer", ["engine", "router"])
def test_an_authorized_peer_is_served(secured, keys, peer):
    files = (keys / "peers" / f"{peer}.key_secret", keys / "scheduler.key")
    with client(secured, *files) as known:
        assert len(known.status(WAIT_S).engines) == 2


def test_strangers_get_no_answer_and_change_nothing(secured, keys, tmp_path):
    generate(tmp_path / "others", ["engine"])
    wrong_key = (tmp_path / "others/peers/engine.key_secret", keys / "scheduler.key")
    for files in ((), wrong_key):
        with client(secured, *files) as stranger, pytest.raises(TimeoutError):
            stranger.status(REFUSED_S)
    assert secured.state.errors == 0


def test_a_peer_refuses_a_scheduler_that_is_not_the_one_it_knows(secured, keys, tmp_path):
    generate(tmp_path / "others", ["engine"])
    files = (keys / "peers/engine.key_secret", tmp_path / "others/scheduler.key")
    with client(secured, *files) as careful, pytest.raises(TimeoutError):
        careful.status(REFUSED_S)


def test_secret_keys_are_their_owners_only_and_public_ones_anyones(keys):
    for path in keys.rglob("*.key*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o600 if path.suffix == ".key_secret" else 0o644), path


def test_generating_again_keeps_the_schedulers_key_and_refuses_a_name_in_use(keys):
    before = (keys / "scheduler.key_secret").read_bytes()
    assert generate(keys, ["another"]) == [keys / "peers/another.key_secret"]
    assert (keys / "scheduler.key_secret").read_bytes() == before
    with pytest.raises(KeyFileError, match="'engine' has keys in .*; remove them or choose another"):
        generate(keys, ["new", "engine"])
    assert not (keys / "peers/new.key").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_a_peer_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(KeyFileError, match="plain file name"):
        generate(tmp_path, [name])
    assert not list(tmp_path.iterdir())


def test_unusable_key_files_are_named_with_a_remedy(keys, tmp_path):
    with pytest.raises(KeyFileError, match="nowhere.*dualpath keys generate"):
        load_secret(tmp_path / "nowhere")
    with pytest.raises(KeyFileError, match="name the .key_secret file"):
        load_secret(keys / "scheduler.key")
    with pytest.raises(KeyFileError, match="holds no .key file"):
        AuthorizedKeys(tmp_path)
    (tmp_path / "bad.key").write_text("nonsense")
    with pytest.raises(KeyFileError, match="bad.key"):
        load_public(tmp_path / "bad.key")
    (keys / "scheduler.key_secret").chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_secret(keys / "scheduler.key_secret")


@contextmanager
def as_pod(user: int, group: int) -> Iterator[None]:
    """This process with the rights of a user who is not root."""
    groups = os.getgroups()
    os.setgroups([group])
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another group, and becomes another user")
@pytest.mark.parametrize(
    ("owner", "group", "mode", "is_taken"),
    [(0, 2000, 0o440, True), (0, 2000, 0o444, False), (1000, 2000, 0o440, False), (0, 2000, 0o460, True)],
)
def test_a_secret_that_root_lends_to_a_pod_s_group_is_taken_as_kubernetes_mounts_it(
    owner, group, mode, is_taken
):
    with tempfile.TemporaryDirectory() as name:
        mount = Path(name)
        mount.chmod(0o755)
        generate(mount, ["prefill-0"])
        secret = mount / "scheduler.key_secret"
        os.chown(secret, owner, group)
        secret.chmod(mode)
        with as_pod(1000, 2000):
            if is_taken:
                assert len(load_secret(secret)[1]) == 40
            else:
                with pytest.raises(KeyFileError, match="can be read by other users"):
                    load_secret(secret)
        secret.chmod(0o440)
        with pytest.raises(KeyFileError, match="can be read by other users"):
            load_secret(secret)  # root needs no group


def test_the_command_makes_keys_and_says_how_to_use_them(tmp_path):
    made = CliRunner().invoke(keys_app, ["generate", str(tmp_path), "--peer", "a", "--peer", "b"])
    assert made.exit_code == 0, made.output
    assert "--curve-server-key-file" in made.output and "--authorized-keys-dir" in made.output
    assert load_secret(tmp_path / "peers/b.key_secret")[0] == load_public(tmp_path / "peers/b.key")
    again = CliRunner().invoke(keys_app, ["generate", str(tmp_path), "--peer", "a"])
    assert again.exit_code == 2


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5557", "tcp://192.0.2.1:5557"])
def test_curve_allows_an_address_that_others_can_reach(address):
    check_bind(address, secured=True)
    with pytest.raises(BindRefused, match="--curve-server-key-file"):
        check_bind(address)


def test_a_server_with_an_unusable_key_leaves_its_address_free(tmp_path):
    context = zmq.Context()
    with pytest.raises(KeyFileError):
        Server(
            "tcp://127.0.0.1:0", cluster(), Metrics(), curve_server_key_file=tmp_path / "x", context=context
        )
    context.term()  # would block if the socket were still open
