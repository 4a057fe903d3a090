"""A pair of engines over HTTP, from a real scheduler process."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from doc_pages import PAGES, request, shell_commands
from scheduler_vocabulary import heartbeat
from test_scheduler_process import WAIT_S, scheduler

from dualpath_sgl.launch.processes.ports import FreePorts
from scheduler_svc.http_place import MOST_BYTES, PLACE_PATH
from scheduler_svc.wire.client import SchedulerClient


class Gateway:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/place"

    def post(self, body: object) -> tuple[int, dict, str | None]:
        """Status, answer, Retry-After."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self._url, data), timeout=WAIT_S) as answer:
                return answer.status, json.load(answer), None
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), error.headers["Retry-After"]


@contextmanager
def serving(*options: str, engines: tuple[str, ...] = ()) -> Iterator[Gateway]:
    port = FreePorts("127.0.0.1").take()
    with scheduler("--bind", "tcp://127.0.0.1:0", "--metrics-port", str(port), *options) as (_, address):
        with SchedulerClient(address) as peer:
            for name in engines:
                peer.send(heartbeat(name))
            assert len(peer.status(WAIT_S).engines) == len(engines)
            yield Gateway(port)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with serving("--place-over-http", engines=("p0", "d0")) as made:
        yield made


def test_a_pair_and_a_room_are_named_to_whoever_asks(gateway):
    status, first, _ = gateway.post({"prompt_tokens": 100, "session_id": "ada"})
    assert status == 200
    assert (first["prefill"]["engine_id"], first["decode"]["engine_id"]) == ("p0", "d0")
    assert first["prefill"]["url"] == "http://127.0.0.1:30000"
    shown = [
        request(line.words) for page in PAGES for line in shell_commands(page) if line.words[0] == "curl"
    ]
    (documented,) = [one.body for one in shown if one.path == PLACE_PATH]
    assert gateway.post(documented.encode())[0] == 200
    _, named, _ = gateway.post({"prompt_tokens": 100, "request_id": "mine"})
    assert named["request_id"] == "mine" and named["room"] != first["room"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "give a JSON object"),
        ([1], "give a JSON object"),
        ({}, "prompt_tokens"),
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"prompt_tokens": 1, "session_id": "x" * 300}, "session_id"),
        (b" " * (MOST_BYTES + 5), f"at most {MOST_BYTES} are read"),
        ({"prompt_tokens": 1, "version": 99, "oldest_version": 99}, "version"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_field_and_remedy(gateway, body, words):
    status, told, _ = gateway.post(body)
    assert status == 400 and words in told["error"]


def test_it_is_posted(gateway):
    assert gateway.post(None)[0] == 405


def test_without_engines_the_gateway_is_told_when_to_come_again():
    with serving("--place-over-http") as gateway:
        status, told, retry_after = gateway.post({"prompt_tokens": 100})
    assert status == 503 and told["error"].startswith("no_engine") and retry_after == "1"


def test_nobody_is_placed_over_http_unless_the_option_says_so():
    with serving() as gateway:
        status, told, _ = gateway.post({"prompt_tokens": 100})
    assert status == 404 and "--place-over-http" in told["error"]
