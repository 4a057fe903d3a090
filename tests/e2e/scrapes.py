"""What a process of a cluster answers to Prometheus."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterable

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

WAIT_S = 60.0


def samples(url: str, name: str) -> list[Sample]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return [sample for family in families for sample in family.samples if sample.name == name]


def total(urls: Iterable[str], name: str, **labels: str) -> float:
    """Sum over all series that have these labels; fails when there is none."""
    found = [
        sample.value
        for url in urls
        for sample in samples(url, name)
        if labels.items() <= sample.labels.items()
    ]
    assert found, f"no {name} {labels}"
    return sum(found)


def wait_for(value: Callable[[], float], wanted: float) -> None:
    """Until it is just that: an engine counts a request when it has sent its KV, which nobody is told."""
    deadline_s = time.monotonic() + WAIT_S
    while (seen := value()) != wanted:
        assert time.monotonic() < deadline_s, f"{seen} instead of {wanted}"
        time.sleep(0.1)
