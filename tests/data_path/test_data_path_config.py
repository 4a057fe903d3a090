"""Settings of an engine and the off switch of the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualpath_sgl import intake, relay_hooks
from dualpath_sgl.hooks import HOOKS, NAMING
from dualpath_sgl.relay.client.prefetch import hooks as prefetch
from dualpath_sgl.start.config import Settings, settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DUALPATH_")]:
        monkeypatch.delenv(name)
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DUALPATH_ENABLED", "perhaps"),
        ("DUALPATH_MODE", "dualpath"),
        ("DUALPATH_LEASE_S", "soon"),
        ("DUALPATH_LEASE_S", "0"),
        ("DUALPATH_LEASE_S", "nan"),
        ("DUALPATH_PLAN_TIMEOUT_S", "-1"),
        ("DUALPATH_PEER_TIMEOUT_S", "1s"),
        ("DUALPATH_SUBSCRIBE_TIMEOUT_S", ""),
        ("DUALPATH_ATTENTION_QUOTA_MS", "0"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_and_value(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError) as refusal:
        settings()
    text = str(refusal.value)
    assert variable.removeprefix("DUALPATH_").lower() in text.lower() and repr(value) in text


def test_the_refusal_names_the_environment_variable(monkeypatch):
    monkeypatch.setenv("DUALPATH_LEASE_S", "soon")
    with pytest.raises(ValueError, match="DUALPATH_LEASE_S"):
        settings()


def test_a_lease_without_end_is_refused(monkeypatch):
    monkeypatch.setenv("DUALPATH_LEASE_S", "inf")
    with pytest.raises(ValueError):
        settings()


def test_a_transport_that_mooncake_does_not_have_is_refused(monkeypatch):
    """Mooncake itself starts without a word, and every read fails."""
    monkeypatch.setenv("DUALPATH_PROTOCOL", "smoke-signals")
    with pytest.raises(ValueError):
        settings()


def test_an_enabled_engine_needs_a_name(monkeypatch):
    monkeypatch.setenv("DUALPATH_ENABLED", "1")
    with pytest.raises(ValueError, match="DUALPATH_ENGINE_ID"):
        settings()
    monkeypatch.setenv("DUALPATH_ENGINE_ID", "prefill-0")
    assert settings().enabled and settings().engine_id == "prefill-0"


def test_dualpath_is_off_unless_switched_on():
    assert not settings().enabled


def test_every_variable_is_read(monkeypatch):
    values = {
        "enabled": True, "mode": "relay", "engine_id": "decode-3", "scheduler": "tcp://10.0.0.1:5557",
        "key_file": Path("/keys/decode-3.key_secret"), "scheduler_key_file": Path("/keys/scheduler.key"),
        "peer_keys": Path("/keys/peers"), "trusted_network": True, "host": "10.0.0.2",
        "protocol": "rdma", "device": "mlx5_1", "page_port": 7000, "otlp_endpoint": "http://10.0.0.3:4317",
        "plan_timeout_s": 0.5, "peer_timeout_s": 1.5, "lease_s": 2.5, "subscribe_timeout_s": 3.5,
            "attention_quota_ms": 300.0,
    }  # fmt: skip
    assert values.keys() == Settings.model_fields.keys(), "a new setting needs a line here"
    for name, value in values.items():
        monkeypatch.setenv(f"DUALPATH_{name.upper()}", str(value))
    assert settings().model_dump() == values


PROBE = """
from importlib.metadata import entry_points
from sglang.srt.plugins.hook_registry import HookRegistry
(plugin,) = entry_points(group="sglang.srt.plugins", name="dualpath")
plugin.load()()
print("REGISTERED", *sorted(HookRegistry._hooks))
"""


def registered(**environment: str) -> list[str]:
    """Targets hooked by our plugin, run in a process of its own as SGLang runs it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DUALPATH_")}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        env=inherited | {"SGLANG_USE_CPU_ENGINE": "1"} | environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("REGISTERED")]
    assert lines, process.stderr
    return lines[0].split()[1:]


def test_without_the_switch_no_hook_is_registered():
    assert registered() == []


def test_with_the_switch_every_hook_is_registered_and_no_other():
    targets = sorted({target for target, _, _ in (*HOOKS, *prefetch.HOOKS, *intake.HOOKS)})
    assert registered(DUALPATH_ENABLED="1", DUALPATH_ENGINE_ID="prefill-0") == targets


def test_in_mode_relay_those_of_decode_side_loads_are_not_registered():
    targets = sorted(
        {target for target, _, _ in (*NAMING, *prefetch.HOOKS, *relay_hooks.HOOKS, *intake.HOOKS)}
    )
    found = registered(DUALPATH_ENABLED="1", DUALPATH_ENGINE_ID="prefill-0", DUALPATH_MODE="relay")
    assert found == targets


@pytest.mark.parametrize(
    ("listens_on", "expected"),
    [
        ("10.0.0.7", "http://10.0.0.7:30000"),
        ("0.0.0.0", "http://192.168.0.1:30000"),
        ("::", "http://192.168.0.1:30000"),
        ("fd00::7", "http://[fd00::7]:30000"),
    ],
)
def test_routers_are_told_an_address_they_can_reach(listens_on, expected):
    assert Settings(host="192.168.0.1").http_url(listens_on, 30000) == expected
