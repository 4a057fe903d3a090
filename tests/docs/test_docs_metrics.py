"""docs/operating.md names every metric, and no page names one that is not there."""

from __future__ import annotations

import re

from doc_pages import PAGES, PROJECT
from prometheus_client import CollectorRegistry, generate_latest

from dualpath_sgl.metrics.rank import RankMetrics
from dualpath_sgl.relay.metrics import Metrics as RelayMetrics
from dualpath_sgl.router.metrics import RouterMetrics
from scheduler_svc.metrics import Metrics
from scheduler_svc.wire.protocol import RankInfo, Role

METRIC = re.compile(r"\bdualpath_(?!sgl\b|cpu\b)\w+(?![\w*])")


def exported() -> set[str]:
    """By scheduler, router and engines."""
    engine = CollectorRegistry()
    RankMetrics(
        RankInfo(
            engine_id="e", role=Role.PREFILL, url="http://h:1", fingerprint="f", page_size=1, page_bytes=1
        ),
        engine,
    )
    return families(b"".join(map(generate_latest, (Metrics().registry, RouterMetrics()._registry, engine))))


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
