"""An engine that the router's own options do not admit gets nothing, whatever the scheduler says."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from router_world import World

from dualpath_sgl.router.fleet.engines import MAX_REFUSED, EngineDirectory
from dualpath_sgl.router.settings.admission import Admission, EngineUrl, UrlPrefix
from scheduler_svc.wire.protocol import RankInfo, Role

HEALTH_CHECK_S = 1.0
"""Of the placing router."""


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ("http://10.0.0.1:30000", "http://10.0.0.1:30000/"),
        ("http://Engine-0.Local:80", "HTTP://engine-0.local"),
        ("https://engine", "https://engine:443"),
        ("http://[FD00:0::7]:30000", "http://[fd00::7]:30000"),
        ("http://gateway/engines/a", "http://gateway:80/engines/a/"),
    ],
)
def test_equal_addresses_are_equal_however_they_are_written(written, same):
    assert EngineUrl.parse(written) == EngineUrl.parse(same)
    assert EngineUrl.parse(str(EngineUrl.parse(written))) == EngineUrl.parse(written)


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1:30000/admin?x=",
        "http://10.0.0.1:30000#",
        "http://10.0.0.1@evil:30000",
        "http://user:word@10.0.0.1:30000",
        "ftp://10.0.0.1:30000",
        "file:///etc/passwd",
        "//10.0.0.1:30000",
        "10.0.0.1:30000",
        "http://",
        "http://[",
        "http://[::1",
        "http://[not::an::address]:1",
        "http://10.0.0.1:",
        "http://10.0.0.1:0",
        "http://10.0.0.1:65536",
        "http://10.0.0.1:30000.evil",
        "http://10.0.0.1:３０００",  # noqa: RUF001  (full-width digits)
        "http://10.0.0.1:30000\r\nX: y",
        "http://10.0.0.1:30000\n",
        " http://10.0.0.1:30000",
        "http://10.0.0.1\\@evil",
        "http://10.0.0.1:30000/a/../b",
        "http://10.0.0.1:30000/..",
        "http://10.0.0.1:30000/a//b",
        "http://10.0.0.1:30000/%2e%2e/b",
        "http://10.0.0.1%2eevil",
        "http://10。0。0。1:30000",
        "",
    ],
)
def test_what_is_no_plain_address_is_refused(url):
    with pytest.raises(ValueError):
        EngineUrl.parse(url)
    with pytest.raises(ValueError):
        UrlPrefix.parse(url)


@pytest.mark.parametrize(
    ("prefix", "admitted", "others"),
    [
        (
            "http://10.0.0.1:3000",
            ["http://10.0.0.1:3000", "http://10.0.0.1:3000/a"],
            ["http://10.0.0.1:30000", "https://10.0.0.1:3000", "http://10.0.0.7:3000", "http://10.0.0.1"],
        ),
        ("http://host/a", ["http://host/a", "http://host/a/b"], ["http://host", "http://host/ab"]),
        ("http://host", ["http://HOST:80"], ["http://host.evil", "http://host:8080", "http://sub.host"]),
        (
            "http://10.1.0.0/16:30000",
            ["http://10.1.0.0:30000", "http://10.1.255.255:30000/"],
            ["http://10.2.0.1:30000", "http://10.1.0.1:30001", "http://10.1.0.1.x:30000", "http://x:30000"],
        ),
        ("http://[fd00::/64]:1", ["http://[fd00::9]:1"], ["http://[fd01::9]:1", "http://10.0.0.1:1"]),
    ],
)
def test_a_prefix_is_compared_by_its_parts(prefix, admitted, others):
    parsed = UrlPrefix.parse(prefix)
    assert all(parsed.admits(EngineUrl.parse(url)) for url in admitted)
    assert not any(parsed.admits(EngineUrl.parse(url)) for url in others)


@pytest.mark.parametrize("prefix", ["http://10.1.0.1/16:30000", "http://10.1.0.0/99:30000", "http://*:30000"])
def test_a_network_that_is_none_is_refused(prefix):
    with pytest.raises(ValueError):
        UrlPrefix.parse(prefix)


def directory(*prefixes: str) -> tuple[EngineDirectory, list[str]]:
    """With a prefill engine at `http://p:1` and a decode engine at `http://d:1`; and who joined later."""
    joined: list[str] = []
    made = EngineDirectory(
        [("http://p:1", 9)],
        ["http://d:1"],
        Admission(UrlPrefix.parse(prefix) for prefix in prefixes),
        lambda directory, engine: joined.append(engine.url),
    )
    joined.clear()
    return made, joined


def test_listed_engines_are_admitted_exactly_as_they_are():
    found, joined = directory()
    assert found.named(Role.PREFILL, "http://P:1/", None).listed
    for url in ("http://p:1/admin", "http://p:1?x=", "http://p:2", "http://d:1"):
        assert found.named(Role.PREFILL, url, None) is None
    assert not joined
    assert len(found.refused) == 4


def test_an_admitted_engine_joins_once_and_another_one_is_counted():
    found, joined = directory("http://p:2")
    assert found.named(Role.PREFILL, "http://p:2", 9) is found.named(Role.PREFILL, "http://P:2/", 9)
    assert joined == ["http://p:2"]
    for _ in range(3):
        assert found.named(Role.DECODE, "http://x:2", None) is None
    assert found.refused == {(Role.DECODE, "http://x:2"): 3}


def test_invented_engines_do_not_fill_log_or_memory(caplog):
    found, _ = directory()
    for number in range(3 * MAX_REFUSED):
        found.named(Role.PREFILL, f"http://x:1/{number}\nfalse line", None)
    assert len(found.refused) == len(caplog.records) == MAX_REFUSED
    assert not any("\n" in record.getMessage() for record in caplog.records)


class Registered(NamedTuple):
    """What `World` needs of an engine that sends heartbeats."""

    name: str
    engine: RankInfo

    def described(self) -> RankInfo:
        return self.engine


@pytest.fixture
def stranger() -> Iterator[socket.socket]:
    """Somebody's service, at which nobody must knock."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.mark.case("router_follows_registered_url")
def test_a_stranger_that_registered_gets_no_prompt_no_key_and_no_health_check(world: World, stranger):
    router = world.placing_router()
    world.wait_until_placed(router)
    url = f"http://127.0.0.1:{stranger.getsockname()[1]}"
    world.registered = [
        Registered(f"stranger-{name}", RankInfo(**{**as_dict(world.engines[name].described()), **changed}))
        for name in ("p0", "d0")
        for changed in [{"engine_id": f"stranger-{name}", "url": url}]
    ]
    world.restart_scheduler()
    world.wait_for_engines()
    wait_until_named(world, router, url)
    answers = [router.ask(headers={"Authorization": "Bearer sk-user", "Cookie": "a=b"}) for _ in range(3)]
    assert [answer.status for answer in answers] == [200] * 3
    assert {world.placed_by(answer) for answer in answers} == {"router"}
    for path in ("/v1/models", "/server_info"):
        router.get(path)
    time.sleep(2 * HEALTH_CHECK_S)
    with pytest.raises(BlockingIOError):
        stranger.accept()
    shown = router.get("/readiness").json
    assert url not in {engine["url"] for engine in shown["engines"]}
    assert {(one["role"], one["url"]) for one in shown["not_admitted"]} >= {("prefill", url), ("decode", url)}
    assert b'dualpath_router_engines_not_admitted_total{role="decode"}' in router.get("/metrics").content
    assert router.process.log_path.read_text().count(f"the scheduler names decode engine '{url}'") == 1


def as_dict(engine: RankInfo) -> dict:
    return {name: getattr(engine, name) for name in engine.__struct_fields__}


def wait_until_named(world: World, router, url: str) -> None:
    deadline_s = time.monotonic() + 30
    while url not in {one["url"] for one in router.get("/readiness").json["not_admitted"]}:
        assert router.ask().status == 200
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_proxy_of_the_environment_is_not_asked_for_engines(world):
    assert world.strict_router().ask().status == 200
