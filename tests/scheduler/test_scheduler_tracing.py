from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry import trace
from otlp_collector import attributes, collector
from scheduler_vocabulary import cluster, decode_report, heartbeat, prefill_report

from scheduler_svc.decision_spans import DecisionSpans
from scheduler_svc.events import ReadEnded
from scheduler_svc.telemetry.tracing import context_from, init_tracing, shutdown, traceparent_of
from scheduler_svc.wire.protocol import Place, Role

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def stop_tracers():
    yield
    shutdown()


def test_a_plan_becomes_a_span_below_the_callers():
    with collector() as endpoint:
        observe = DecisionSpans(init_tracing("dualpath-scheduler", endpoint.address))
        state = cluster("decode")
        state.handle(prefill_report(2**63 - 1, 2, 10, traceparent=CALLER), 1.0)
        result = state.handle(decode_report(2**63 - 1, 4), 1.25)
        for event in result.events:
            observe(event)
        shutdown()
        service, span = endpoint.next_span()
    assert (service, span.name) == ("dualpath-scheduler", "plan decode")
    assert span.trace_id.hex() == CALLER.split("-")[1]
    assert span.parent_span_id.hex() == CALLER.split("-")[2]
    assert abs(span.end_time_unix_nano - span.start_time_unix_nano - 250_000_000) < 1000
    assert attributes(span) == {
        "dualpath.room": str(2**63 - 1),
        "dualpath.path": "decode",
        "dualpath.split.pages": 10,
        "dualpath.hit.pages": 10,
        "dualpath.prefill.local_pages": 2,
        "dualpath.decode.local_pages": 4,
        "dualpath.prefill.engine": "p0",
        "dualpath.decode.engine": "d0",
        "dualpath.policy": "decode",
        "dualpath.reason": "always the decode side",
        "dualpath.prefill.queue_bytes": 0,
        "dualpath.decode.queue_bytes": 0,
        "dualpath.prefill.rate_bytes_per_s": 0.0,
        "dualpath.decode.rate_bytes_per_s": 0.0,
    }


def test_a_placement_becomes_a_span_of_its_own():
    with collector() as endpoint:
        observe = DecisionSpans(init_tracing("dualpath-scheduler", endpoint.address))
        state = cluster("decode", heartbeat("p0"), heartbeat("d0"), placement="affinity")
        place = Place(request_id="r", session_id="s", prompt_tokens=5, traceparent=CALLER)
        state.handle(place, 0.0)
        result = state.handle(place, 0.0)
        for event in result.events:
            observe(event)
        _, span = endpoint.next_span()
    assert span.name == "place" and span.parent_span_id.hex() == CALLER.split("-")[2]
    assert attributes(span) == {
        "dualpath.room": str(result.reply.room),
        "dualpath.request_id": "r",
        "dualpath.session": "s",
        "dualpath.prefill.engine": "p0",
        "dualpath.decode.engine": "d0",
        "dualpath.placement": "affinity",
        "dualpath.prefill.engines": 1,
        "dualpath.prefill.class": "short_queue",
        "dualpath.prefill.expected_wait_s": 0.0,
        "dualpath.prefill.saved_bytes": 0,
        "dualpath.decode.engines": 1,
        "dualpath.decode.groups": 1,
        "dualpath.decode.group_engines": 1,
        "dualpath.decode.rule": "fewest_sequences",
        "dualpath.decode.limit_tokens": 1.05 * 10,
        "dualpath.decode.expected_wait_s": 0.0,
        "dualpath.decode.saved_bytes": 0,
    }


def test_what_became_of_a_plan_is_a_span_with_the_error_of_its_prediction():
    with collector() as endpoint:
        observe = DecisionSpans(init_tracing("dualpath-scheduler", endpoint.address))
        observe(ReadEnded(7, Role.DECODE, "d0", CALLER, expected_s=0.5, actual_s=0.75))
        _, span = endpoint.next_span()
    assert span.name == "plan.outcome" and span.parent_span_id.hex() == CALLER.split("-")[2]
    assert attributes(span) == {
        "dualpath.room": "7",
        "dualpath.side": "decode",
        "dualpath.engine": "d0",
        "dualpath.expected_s": 0.5,
        "dualpath.actual_s": 0.75,
        "dualpath.error_s": 0.25,
    }


def test_context_propagates_without_an_endpoint():
    tracer = init_tracing("quiet", None)
    span = tracer.start_span("request", context=context_from(CALLER))
    handed_on = traceparent_of(span)
    assert handed_on.split("-")[1] == CALLER.split("-")[1]
    child = tracer.start_span("child", context=context_from(handed_on))
    assert child.parent.span_id == span.get_span_context().span_id


@pytest.mark.parametrize(
    "bad", [None, "", "nonsense", "00-00000000000000000000000000000000-b7ad6b7169203331-01"]
)
def test_a_missing_or_malformed_parent_starts_a_new_trace(bad):
    span = init_tracing("quiet", None).start_span("request", context=context_from(bad))
    assert span.parent is None and traceparent_of(span) is not None


def test_an_invalid_span_has_no_traceparent():
    assert traceparent_of(trace.INVALID_SPAN) is None


def test_the_global_provider_is_left_to_sglang():
    code = (
        "from opentelemetry import trace\n"
        "from scheduler_svc.telemetry.tracing import init_tracing\n"
        "before = trace.get_tracer_provider()\n"
        "init_tracing('x', None)\n"
        "assert trace.get_tracer_provider() is before\n"
        "assert type(before).__name__ == 'ProxyTracerProvider'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_absent_collector_does_not_keep_shutdown_from_returning():
    init_tracing("lonely", "http://127.0.0.1:9").start_span("lost").end()
    shutdown()
