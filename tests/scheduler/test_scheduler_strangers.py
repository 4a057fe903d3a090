"""A key is one engine's name: who may say what, as the directory of keys is now."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import zmq
from scheduler_vocabulary import cluster, decode_report, done, heartbeat, prefill_report
from test_scheduler_server import WAIT_S, Running

from scheduler_svc.wire.authenticator import PeerAuthenticator
from scheduler_svc.wire.authorized_keys import AuthorizedKeys, refusal
from scheduler_svc.wire.client import SchedulerClient, SchedulerError
from scheduler_svc.wire.keys import HANDSHAKE_MS, KeyFileError, generate, load_public, secure_client
from scheduler_svc.wire.protocol import Error, ErrorCode, Ping, Place, StatusRequest, encode

PLACE = Place(request_id="r", prompt_tokens=100)


@pytest.fixture
def keys(tmp_path) -> Path:
    """The vocabulary's engines p0 and d0, and a router."""
    generate(tmp_path / "keys", ["p0", "d0", "router"])
    return tmp_path / "keys"


class Secured(Running):
    """A scheduler that knows p0 and d0 and asks of each message whose key it came with."""

    def __init__(self, keys: Path, stack: ExitStack) -> None:
        self.keys = keys
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        self.admitting = stack.enter_context(PeerAuthenticator(keys / "peers", context))
        super().__init__(
            cluster(),
            context=context,
            curve_server_key_file=keys / "scheduler.key_secret",
            authorized_keys=self.admitting.keys,
        )
        stack.callback(self.stop)

    @contextmanager
    def peer(self, name: str) -> Iterator[SchedulerClient]:
        files = self.keys / "peers" / f"{name}.key_secret", self.keys / "scheduler.key"
        context = zmq.Context()
        with SchedulerClient(self.address, context, files) as client:
            yield client
        context.term()


def endpoint_of(peer: SchedulerClient, engine_id: str) -> str | None:
    """Page server of an engine, as the scheduler tells any admitted peer."""
    ranks = [rank.engine for rank in peer.status(WAIT_S).engines]
    return {rank.engine_id: rank.page_endpoint for rank in ranks}[engine_id]


@pytest.fixture
def secured(keys) -> Iterator[Secured]:
    with ExitStack() as stack:
        yield Secured(keys, stack)


def refused(peer: SchedulerClient, message) -> Error:
    peer.send(message)
    answer = peer.receive(WAIT_S)
    assert isinstance(answer, Error) and answer.code is ErrorCode.FORBIDDEN, answer
    return answer


def until(condition, what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


@pytest.mark.case("curve_peer_speaks_for_another")
def test_an_engine_cannot_move_another_engines_page_server(secured):
    with secured.peer("p0") as other, secured.peer("d0") as owner:
        before = endpoint_of(other, "d0")
        answer = refused(other, heartbeat("d0", page_endpoint="tcp://127.0.0.1:6666"))
        assert "d0" in answer.message and "speaks for p0" in answer.message
        assert endpoint_of(other, "d0") == before
        owner.send(heartbeat("d0", page_endpoint="tcp://127.0.0.1:1111"))
        assert endpoint_of(owner, "d0") == "tcp://127.0.0.1:1111"


@pytest.mark.case("curve_peer_speaks_for_another")
def test_an_engine_can_neither_report_nor_end_a_load_for_another(secured):
    with secured.peer("p0") as other:
        refused(other, decode_report(1, 0))
        refused(other, done(1, "d0"))
    assert secured.state.rooms.open_count == 0
    assert secured.metric("dualpath_scheduler_errors_total", code="forbidden") == 2


@pytest.mark.case("curve_peer_speaks_for_another")
def test_plans_go_to_the_engine_whose_key_asked_for_them(secured):
    with secured.peer("p0") as prefill, secured.peer("d0") as decode:
        refused(prefill, decode_report(1, 0))
        prefill.send(prefill_report(1, 0, 10))
        decode.send(decode_report(1, 0))
        assert prefill.receive(WAIT_S) == decode.receive(WAIT_S)


def test_a_router_is_placed_and_told_the_status_but_is_no_engine(secured):
    with secured.peer("router") as router:
        assert router.place(PLACE, WAIT_S).decode.engine_id == "d0"
        assert len(router.status(WAIT_S).engines) == 2
        refused(router, heartbeat("d0"))


def test_a_socket_identity_lends_nobody_the_key_that_it_came_with_before(secured):
    for name in ("p0", "router", "p0"):
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, b"the same")
        socket.setsockopt(zmq.LINGER, 0)
        secure_client(socket, secured.keys / f"peers/{name}.key_secret", secured.keys / "scheduler.key")
        socket.connect(secured.address)
        # The scheduler may know the last connection of this name still: until then it has room for no other.
        until(lambda socket=socket: _answers(socket, Ping()), "it is served")
        answer = _answers(socket, prefill_report(1, 0, 10), Ping())
        assert (b"forbidden" in answer) is (name == "router"), (name, answer)
        context.destroy(linger=0)


def _answers(socket: zmq.Socket, *messages) -> bytes:
    """What comes first; empty within a second."""
    for message in messages:
        socket.send(encode(message))
    return socket.recv() if socket.poll(1000) else b""


@pytest.mark.parametrize(
    ("engine_id", "own"),
    [("d0", True), ("d0/dp1", True), ("d0/dp17", True), ("d0/dp", False), ("d0/x", False), ("d01", False),
     ("d", False), ("d0-0", False), ("p0/d0", False), ("p0/dp0", False), ("/d0", False), ("D0", False)],
)  # fmt: skip
def test_an_engines_key_speaks_for_its_dp_ranks_and_for_no_longer_name(engine_id, own):
    beat = heartbeat(engine_id, url="http://h:1", page_endpoint="tcp://h:2")
    for message in (beat, decode_report(1, 0, by=engine_id), done(1, engine_id)):
        assert (refusal(frozenset({"d0"}), message) is None) is own


@pytest.mark.parametrize("message", [PLACE, StatusRequest(), Ping()])
def test_what_names_no_engine_any_admitted_peer_may_say(message):
    assert refusal(frozenset({"anybody"}), message) is None


def test_one_key_under_several_names_speaks_for_all_of_them(tmp_path):
    keys = tmp_path / "keys"
    generate(keys, ["host-1"], ["p0", "d0"])
    generate(keys, ["p1"])
    with ExitStack() as stack:
        secured = Secured(keys, stack)
        with secured.peer("host-1") as host:
            for engine_id in ("p0", "d0"):
                host.send(heartbeat(engine_id, page_endpoint="tcp://127.0.0.1:7"))
                assert endpoint_of(host, engine_id) == "tcp://127.0.0.1:7"
            assert "speaks for d0, host-1, p0" in refused(host, heartbeat("p1")).message


def test_a_shared_key_needs_exactly_one_owner(tmp_path):
    with pytest.raises(KeyFileError, match="give --peer once"):
        generate(tmp_path, ["a", "b"], ["p0"])
    generate(tmp_path, ["p0"])
    with pytest.raises(KeyFileError, match="'p0' has keys"):
        generate(tmp_path, ["host-1"], ["p0"])
    assert not (tmp_path / "peers/host-1.key").exists()


def test_a_key_that_is_taken_away_ends_what_its_holder_may_say_also_over_a_standing_connection(secured):
    with secured.peer("p0") as peer:
        assert peer.status(WAIT_S)
        (secured.keys / "peers/p0.key").unlink()
        until(lambda: not _is_served(peer), "the standing connection is refused")
        assert "no longer in the directory" in refused(peer, heartbeat("p0")).message
    with secured.peer("p0") as again, pytest.raises(TimeoutError):
        again.status(0.5)
    with secured.peer("d0") as other:
        assert other.status(WAIT_S)


def _is_served(peer: SchedulerClient) -> bool:
    try:
        peer.status(WAIT_S)
    except SchedulerError:
        return False
    return True


def test_a_key_that_is_put_there_admits_its_holder_though_it_was_refused_before(secured):
    public = secured.keys / "peers/p0.key"
    aside = public.rename(secured.keys / "p0.key")
    until(lambda: not secured.admitting.keys.names(load_public(aside)), "it is taken away")
    with secured.peer("p0") as peer:
        with pytest.raises(TimeoutError):
            peer.status(0.5)
        shutil.copy(aside, public)
        assert peer.status(WAIT_S)


def test_a_changed_file_admits_the_new_key_and_not_the_old_one(keys, tmp_path):
    generate(tmp_path / "new", ["p0"])
    known = AuthorizedKeys(keys / "peers")
    old, new = load_public(keys / "peers/p0.key"), load_public(tmp_path / "new/peers/p0.key")
    shutil.copy(tmp_path / "new/peers/p0.key", keys / "peers/p0.key")
    known.read()
    assert (known.names(old), known.names(new)) == (frozenset(), {"p0"})


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"public-key", b'public-key = "short"', b'public-key = "' + b"\xff" * 40 + b'"',
     bytes(9)],
)  # fmt: skip
def test_a_broken_file_is_logged_once_and_admits_only_nobody(keys, caplog, content):
    known = AuthorizedKeys(keys / "peers")
    (keys / "peers/broken.key").write_bytes(content)
    (keys / "peers/folder.key").mkdir()
    (keys / "peers/dangling.key").symlink_to(keys / "nowhere")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            known.read()
    for name in ("broken", "folder", "dangling"):
        assert sum(f"{name}.key" in line for line in caplog.messages) == 1, caplog.messages
    assert known.names(load_public(keys / "peers/p0.key")) == {"p0"}


def test_a_directory_that_goes_away_admits_nobody_until_it_is_back(keys):
    known = AuthorizedKeys(keys / "peers")
    key = load_public(keys / "peers/p0.key")
    aside = (keys / "peers").rename(keys / "aside")
    known.read()
    assert not known.names(key)
    aside.rename(keys / "peers")
    known.read()
    assert known.names(key) == {"p0"}


def test_refused_connections_are_counted_and_named_in_the_log(keys, tmp_path, caplog):
    generate(tmp_path / "others", ["p0"])
    count = 0

    def note() -> None:
        nonlocal count
        count += 1

    with ExitStack() as stack, caplog.at_level(logging.WARNING):
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        stack.enter_context(PeerAuthenticator(keys / "peers", context, note))
        made = Running(cluster(), context=context, curve_server_key_file=keys / "scheduler.key_secret")
        stack.callback(made.stop)
        files = tmp_path / "others/peers/p0.key_secret", keys / "scheduler.key"
        with SchedulerClient(made.address, zmq.Context(), files) as stranger, pytest.raises(TimeoutError):
            stranger.status(1.5 * HANDSHAKE_MS / 1000)
    lines = [line for line in caplog.messages if line.startswith("refused a connection from 127.0.0.1")]
    assert count and lines
    assert load_public(tmp_path / "others/peers/p0.key").decode() in lines[0]
