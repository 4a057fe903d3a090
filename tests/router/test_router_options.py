"""Every option of `sglang_router` is obeyed, or refused by name; also those that do not exist yet."""

from __future__ import annotations

import dataclasses

import pytest
from sglang_router.launch_router import parse_router_args
from sglang_router.router_args import RouterArgs

from dualpath_sgl.router.settings import options
from dualpath_sgl.router.settings.settings import LimitSettings, RouterSettings

NEEDED = [
    "--mini-lb", "--pd-disaggregation", "--dualpath-scheduler=tcp://127.0.0.1:5557",
    "--prefill", "http://127.0.0.1:1", "9000", "--decode", "http://127.0.0.1:2",
]  # fmt: skip
DIFFERENT = {"log_level": "debug", "health_check_endpoint": "/ready", "dualpath_scheduler": "ipc:///tmp/s"}


def settings(*arguments: str) -> RouterSettings:
    return RouterSettings.from_args(parse_router_args([*NEEDED, *arguments]))


def other(value):
    """Some value that is not this one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 7
        case list():
            return [*value, "x"]
        case dict():
            return value | {"x": "y"}
        case _:
            return "x"


@pytest.mark.case("router_ignored_options")
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RouterArgs)])
def test_an_option_that_was_set_is_obeyed_or_refused_by_name(field):
    args = parse_router_args(NEEDED)
    setattr(args, field, other(getattr(args, field)))
    if field in options.OBEYED:
        options.refuse_others(args)
    else:
        with pytest.raises(ValueError, match=f"{options.flag(field)} does not work with --dualpath-sched"):
            options.refuse_others(args)


def test_an_option_of_a_later_version_is_refused_until_somebody_has_seen_to_it():
    @dataclasses.dataclass
    class LaterArgs(RouterArgs):
        shield: int = 0

    given = vars(parse_router_args(NEEDED))
    options.refuse_others(LaterArgs(**given))
    with pytest.raises(ValueError, match="--shield does not work"):
        options.refuse_others(LaterArgs(**given, shield=1))


def test_what_nobody_set_is_not_refused_whoever_built_the_arguments():
    settings()
    settings("--policy=cache_aware", "--prometheus-port=29000", "--queue-size=100")
    built = RouterArgs(
        mini_lb=True,
        pd_disaggregation=True,
        prefill_urls=[("http://p", 1)],
        decode_urls=["http://d"],
        dualpath_scheduler="tcp://127.0.0.1:5557",
    )
    assert RouterSettings.from_args(built).decode_urls == ("http://d:80",)


def test_all_refused_options_are_named_at_once_and_no_secret_is_said():
    with pytest.raises(ValueError) as refused:
        settings("--api-key=hidden", "--cors-allowed-origins", "x", "--policy=random", "--tls-key-path=k")
    said = str(refused.value)
    assert all(name in said for name in ("--api-key", "--cors-allowed-origins", "--policy", "--tls-key-path"))
    assert "hidden" not in said


def test_every_obeyed_option_exists():
    assert {field.name for field in dataclasses.fields(RouterArgs)} >= options.OBEYED


def test_limits_and_log_level_mean_what_they_mean_there():
    found = settings(
        "--max-concurrent-requests=3", "--queue-size=2", "--queue-timeout-secs=5", "--log-level=warn"
    )
    assert found.limit == LimitSettings(at_once=3, waiting=2, wait_s=5)
    assert found.log_level == "WARNING"
    assert settings().limit.at_once is None


def test_prefixes_may_be_repeated():
    found = settings("--dualpath-engine-url-prefix=http://a:1", "--dualpath-engine-url-prefix=http://b:1")
    assert [prefix.host for prefix in found.engine_url_prefixes] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dualpath-engine-url-prefix=10.0.0.1:3"], "--dualpath-engine-url-prefix: '10.0.0.1:3' is no"),
        (["--decode", "http://user@d:1"], "--decode: 'http://user@d:1' is no engine's address"),
        (["--prefill", "grpc://p:1"], "--prefill: 'grpc://p:1' is no engine's address"),
        (["--dualpath-scheduler=tcp://host"], "such as tcp://127.0.0.1:5557"),
        (["--max-concurrent-requests=0"], "--max-concurrent-requests is 0; give at least 1, or -1 for"),
        (["--request-timeout-secs=0"], "--request-timeout-secs is 0; give at least 1"),
        (["--health-check-interval-secs=0"], "--health-check-interval-secs is 0"),
        (["--retry-max-retries=-1"], "--retry-max-retries is -1; give at least 0"),
        (["--port=70000"], "--port is 70000; give at most 65535"),
        (["--host="], "--host is empty"),
        (["--health-check-endpoint=@evil"], "--health-check-endpoint is '@evil'; give a path such as"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_remedy(arguments, words):
    with pytest.raises(ValueError, match=words):
        settings(*arguments)
