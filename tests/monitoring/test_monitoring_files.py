"""Dashboards and alerts speak of metrics that there are; Prometheus's own tools judge the rest (test-slow)."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from monitoring_files import DASHBOARDS, PROMETHEUS, panels, registries, rules
from prometheus_client import generate_latest

from scheduler_svc.metrics import Metrics

EXPRESSIONS = {**{name: [rule["expr"]] for name, rule in rules().items()}, **panels()}


@pytest.fixture(scope="module")
def exported() -> set[str]:
    text = b"".join(map(generate_latest, registries(Metrics()).values())).decode()
    families = dict(re.findall(r"^# TYPE (dualpath_\w+) (\w+)", text, re.M))
    return {
        f"{name}{part}"
        for name, kind in families.items()
        for part in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_expression_names_metrics_that_are_exported(name, exported):
    named = {metric for text in EXPRESSIONS[name] for metric in re.findall(r"\bdualpath_\w+", text)}
    assert named <= exported and (named or name == "DualPathTargetDown")


def test_every_alert_has_a_test_in_which_it_comes_and_one_in_which_it_does_not():
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    checked = [check for test in tests for check in test["alert_rule_test"]]
    for expected in (True, False):
        assert {one["alertname"] for one in checked if bool(one["exp_alerts"]) is expected} == rules().keys()


def test_there_are_dashboards_of_the_whole_and_of_the_parts():
    assert [path.stem for path in DASHBOARDS] == ["engines", "overview"] and len(panels()) > 30


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_s_panels_have_units_and_do_not_overlap(path):
    board = json.loads(path.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
