"""Arguments that cannot work are refused with the remedy, and never ignored where that is unsafe."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_router.launch_router import parse_router_args

from dualpath_sgl.router.app import serve
from dualpath_sgl.router.settings.settings import RouterSettings

GOOD = [
    "--mini-lb", "--pd-disaggregation", "--dualpath-scheduler=tcp://127.0.0.1:5557",
    "--prefill", "http://127.0.0.1:1", "9000", "--decode", "http://127.0.0.1:2",
]  # fmt: skip


def settings(*arguments: str) -> RouterSettings:
    return RouterSettings.from_args(parse_router_args(list(arguments)))


def test_sglang_routers_own_arguments_mean_what_they_mean_there():
    found = settings(
        *GOOD, "--request-timeout-secs=7", "--health-check-interval-secs=9", "--health-failure-threshold=4",
        "--retry-max-retries=2", "--enable-trace", "--otlp-traces-endpoint=there:4317",
    )  # fmt: skip
    assert (found.request_timeout_s, found.max_retries) == (7, 2)
    assert (found.health.interval_s, found.health.failures) == (9, 4)
    assert found.otlp_endpoint == "http://there:4317"
    assert found.prefill_urls == (("http://127.0.0.1:1", 9000),)
    assert found.decode_urls == ("http://127.0.0.1:2",)
    assert settings(*GOOD).otlp_endpoint is None
    assert settings(*GOOD, "--disable-retries").max_retries == 0


def test_both_key_files_are_taken():
    found = settings(*GOOD, "--dualpath-key-file=a", "--dualpath-scheduler-key-file=b")
    assert found.key_files == (Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([word for word in GOOD if word != "--mini-lb"], "needs --mini-lb"),
        ([word for word in GOOD if word != "--pd-disaggregation"], "needs --pd-disaggregation"),
        (GOOD[:3], "at least one --prefill and one --decode"),
        ([*GOOD, "--dualpath-scheduler=localhost:5557"], "such as tcp://127.0.0.1:5557"),
        ([*GOOD, "--dualpath-key-file=a"], "give both --dualpath-key-file and"),
        ([*GOOD, "--tls-cert-path=a"], "--tls-cert-path does not work with --dualpath-scheduler"),
        ([*GOOD, "--api-key=a"], "--api-key does not work with --dualpath-scheduler"),
        ([*GOOD, "--service-discovery"], "learned from the scheduler"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(arguments, words):
    with pytest.raises(ValueError, match=words):
        settings(*arguments)


def test_a_key_file_that_is_none_ends_the_router_with_the_remedy():
    keys = ("--dualpath-key-file=/nowhere/a", "--dualpath-scheduler-key-file=/nowhere/b")
    with pytest.raises(SystemExit, match="copy the .key file of its owner there"):
        serve(parse_router_args([*GOOD, *keys]))
