"""The files in deploy/ that Prometheus, Alertmanager and Grafana read."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

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
