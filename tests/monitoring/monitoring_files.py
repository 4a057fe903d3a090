"""The files in deploy/ that Prometheus, Alertmanager and Grafana read, and what they read about."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry

from dualpath_sgl.metrics.rank import RankMetrics
from dualpath_sgl.relay.metrics import Metrics as RelayMetrics
from dualpath_sgl.router.metrics import RouterMetrics
from scheduler_svc.metrics import Metrics
from scheduler_svc.wire.protocol import RankInfo, Role

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))


def rules() -> dict[str, dict]:
    """By alert."""
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def panels() -> dict[str, list[str]]:
    """Expressions of each panel, by dashboard and title."""
    boards = {path.stem: json.loads(path.read_text()) for path in DASHBOARDS}
    return {
        f"{name}: {panel['title']}": [target["expr"] for target in panel["targets"]]
        for name, board in boards.items()
        for panel in board["panels"]
    }


def registries(scheduler: Metrics) -> dict[str, CollectorRegistry]:
    """Of a part of every kind, beside this scheduler; nothing has happened to any."""
    engine = CollectorRegistry()
    RankMetrics(
        RankInfo(
            engine_id="e", role=Role.PREFILL, url="http://h:1", fingerprint="f", page_size=1, page_bytes=1
        ),
        engine,
    )
    return {
        "engine": engine,
        "scheduler": scheduler.registry,
        "relay": RelayMetrics().registry,
        "router": RouterMetrics()._registry,
    }
