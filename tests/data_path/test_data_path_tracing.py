"""The spans of lanes, as an exporter gets them."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dualpath_sgl.lanes.page_load import LaneWork
from dualpath_sgl.spans.tracing import record_lane


def exported(work: LaneWork):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    record_lane(provider.get_tracer("test"), work, None, {})
    return exporter.get_finished_spans()


@pytest.mark.parametrize(
    ("lane", "name", "blocks"), [("peer", "forward", {"dualpath.blocks": 2}), ("store", "storage.read", {})]
)
def test_a_lane_tells_in_how_many_calls_it_moved_its_bytes_and_a_forward_in_how_many_blocks(
    lane, name, blocks
):
    work = LaneWork(lane, first_page=7)
    work.begin()
    work.moved(2, 200)
    work.moved(0, 0)
    work.moved(1, 100)
    work.blocks += blocks.get("dualpath.blocks", 0)
    (span,) = exported(work)
    assert span.name == name
    wanted = {"dualpath.bytes": 300, "dualpath.transfers": 2, "dualpath.pages.first": 7, **blocks}
    assert {key: span.attributes.get(key) for key in wanted} == wanted
    assert ("dualpath.blocks" in span.attributes) == bool(blocks)


def test_a_lane_that_never_began_has_no_span():
    assert exported(LaneWork("peer", first_page=0)) == ()
