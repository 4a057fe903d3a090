"""docs/operating.md names every metric, and no page names one that is not there."""

from __future__ import annotations

import re

from doc_pages import PAGES, PROJECT
from prometheus_client import generate_latest

from dualpath_sgl.relay.metrics import Metrics as RelayMetrics
from dualpath_sgl.router.metrics import RouterMetrics
from scheduler_svc.metrics import Metrics

METRIC = re.compile(r"\bdualpath_(?!sgl\b|cpu\b)\w+")


def exported() -> set[str]:
    """By scheduler and router."""
    return families(generate_latest(Metrics().registry) + generate_latest(RouterMetrics()._registry))


def exported_by_relays() -> set[str]:
    return families(generate_latest(RelayMetrics().registry))


def families(text: bytes) -> set[str]:
    """Names as Prometheus sees them; a histogram's without its parts."""
    found = re.findall(r"^# TYPE (dualpath_\w+) ", text.decode(), re.M)
    return {family for family in found if not family.endswith("_created")}


def test_the_page_on_operating_names_every_metric():
    assert exported() <= set(METRIC.findall((PROJECT / "docs" / "operating.md").read_text()))


def test_the_page_on_relays_names_all_of_theirs():
    assert exported_by_relays() <= set(METRIC.findall((PROJECT / "docs" / "relay.md").read_text()))


def test_every_metric_that_a_page_names_is_exported():
    known = exported() | exported_by_relays()
    for page in PAGES:
        assert set(METRIC.findall(page.read_text())) <= known, page
