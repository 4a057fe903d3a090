"""Mooncake alone between two real processes."""

import pytest

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load.raw_rates import Place, raw_rates

HERE = Place("127.0.0.1")


@pytest.mark.parametrize("block_bytes", [None, 1 << 18])
def test_every_repetition_gives_a_rate(block_bytes):
    rates = raw_rates(HERE, HERE, 1 << 20, 3, block_bytes=block_bytes)
    assert len(rates) == 3
    assert min(rates) > 0


def test_processes_are_started_where_they_are_told(tmp_path):
    entered = tmp_path / "entered"

    def enter(argv: list[str]) -> list[str]:
        return ["sh", "-c", f'echo "$4" >> {entered}; exec "$@"', "sh", *argv]

    there = Place("127.0.0.1", enter)
    raw_rates(there, there, 1 << 16, 1)
    assert entered.read_text().split() == ["serve", "read"]


def test_a_server_that_does_not_start_is_an_error_that_names_its_address():
    with pytest.raises(EvalError, match="192.0.2.1 did not start"):
        raw_rates(Place("192.0.2.1", lambda argv: ["false"]), HERE, 1 << 16, 1)


def test_a_reader_that_fails_is_an_error_that_names_its_status():
    with pytest.raises(EvalError, match="status 3"):
        raw_rates(HERE, Place("127.0.0.1", lambda argv: ["sh", "-c", "exit 3"]), 1 << 16, 1)
