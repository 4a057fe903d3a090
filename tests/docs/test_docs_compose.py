"""The compose file beside the docs: pinned, on loopback, and where the pages say."""

import re

import yaml
from doc_pages import PROJECT

COMPOSE = PROJECT / "deploy/compose.yaml"


def test_every_service_is_pinned_and_listens_on_loopback_only():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert set(services) == {"jaeger", "prometheus", "grafana"}
    for service in services.values():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["network_mode"] == "host" and "ports" not in service
        told = [*service.get("environment", {}).values(), *service.get("command", [])]
        assert any("127.0.0.1" in str(one) for one in told)
        assert not any("0.0.0.0" in str(one) for one in told)


def test_what_it_mounts_lies_beside_it():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    mounts = [mount.split(":") for service in services.values() for mount in service.get("volumes", [])]
    folders = [mount for mount in mounts if mount[0].startswith(".")]
    assert folders and all(re.match(r"\./(prometheus|grafana)\b", mount[0]) for mount in folders)
    assert all(mount[2] == "ro" for mount in folders)
