"""Settings that hold for every test, and the tests that get a process of their own."""

import pytest
from hypothesis import HealthCheck, settings
from own_process import Plugin

# Times are never asserted: a shared core must not fail a property.
settings.register_profile("dualpath", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dualpath")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin())


@pytest.fixture
def own_process() -> None:
    """The test that asks for it, itself or through another fixture, runs in a process forked for it alone."""


@pytest.fixture
def own_fresh_process() -> None:
    """The same, and SGLang is in that process as it was installed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--storm-seeds", type=int, default=2, help="storms on SGLang's tree, each from a seed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "storm_seed" in metafunc.fixturenames:
        metafunc.parametrize("storm_seed", range(metafunc.config.getoption("--storm-seeds")))
