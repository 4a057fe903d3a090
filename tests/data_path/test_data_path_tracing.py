"""The spans of lanes, as an exporter gets them."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dualpath_sgl.lanes.page_load import LaneClock
from dualpath_sgl.spans.tracing import record_lane


def exported(clock: LaneClock):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    record_lane(provider.get_tracer("test"), clock, None, {})
    return exporter.get_finished_spans()


@pytest.mark.parametrize(
    ("lane", "name", "blocks"), [("peer", "forward", {"dualpath.blocks": 2}), ("store", "storage.read", {})]
)
def test_a_lane_tells_in_how_many_calls_it_moved_its_bytes_and_a_forward_in_how_many_blocks(
    lane, name, blocks
):
    clock = LaneClock(lane, first_page=7)
    clock.begin()
    clock.moved(2, 200)
    clock.moved(0, 0)
    clock.moved(1, 100)
    clock.blocks += blocks.get("dualpath.blocks", 0)
    (span,) = exported(clock)
    assert span.name == name
    wanted = {"dualpath.bytes": 300, "dualpath.transfers": 2, "dualpath.pages.first": 7, **blocks}
    assert {key: span.attributes.get(key) for key in wanted} == wanted
    assert ("dualpath.blocks" in span.attributes) == bool(blocks)


def test_a_lane_that_never_began_has_no_span():
    assert exported(LaneClock("peer", first_page=0)) == ()
