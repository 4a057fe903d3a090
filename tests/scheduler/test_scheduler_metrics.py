from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from scheduler_vocabulary import cluster, decode_report, done, heartbeat, lane, prefill_report

from scheduler_svc.metrics import Metrics
from scheduler_svc.telemetry.tally import CounterTally, HistogramTally
from scheduler_svc.telemetry.tracing import exported_trace
from scheduler_svc.wire.protocol import Place, Workload

BOUNDS = (0.0, 0.5, 2.0, 3.0)


def samples(registry: CollectorRegistry) -> dict:
    """What a scrape sees, without the creation times only `prometheus_client`'s own have."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(BOUNDS) | st.floats(0, 5)), max_size=30))
def test_a_histogram_is_scraped_as_prometheus_clients_own(observations):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = HistogramTally(ours, "h", "text", BOUNDS, ["x"])
    histogram = Histogram("h", "text", ["x"], buckets=BOUNDS, registry=theirs)
    for label, value in observations:
        tally.observe(value, label)
        histogram.labels(label).observe(value)
    assert samples(ours) == pytest.approx(samples(theirs))


def test_a_counter_adds_up_per_labels():
    registry = CollectorRegistry()
    counter = CounterTally(registry, "c", "text", ["x"])
    for amount, label in ((1, "a"), (2, "b"), (3, "a")):
        counter.add(amount, label)
    assert samples(registry) == {("c_total", (("x", "a"),)): 4, ("c_total", (("x", "b"),)): 2}


@pytest.mark.parametrize("flags, is_told", [("01", True), ("03", True), ("00", False)])
def test_a_bucket_names_the_last_exported_trace_in_it(flags, is_told):
    traceparent = f"00-{'a' * 32}-{'b' * 16}-{flags}"
    registry = CollectorRegistry()
    tally = HistogramTally(registry, "h", "text", BOUNDS, ["x"])
    tally.observe(1.0, "v", trace_id=exported_trace(traceparent))
    tally.observe(4.0, "v", trace_id=exported_trace(None))
    (family,) = openmetrics_families(openmetrics.generate_latest(registry).decode())
    told = {sample.labels["le"]: sample.exemplar.labels for sample in family.samples if sample.exemplar}
    assert told == ({"2.0": {"trace_id": "a" * 32}} if is_told else {})


def test_series_that_are_known_exist_before_the_first_event():
    registry = CollectorRegistry()
    CounterTally(registry, "c", "text", ["x"], [("a",)])
    CounterTally(registry, "d", "text")
    HistogramTally(registry, "h", "text", (1.0,), ["x"], [("a",)])
    found = samples(registry)
    assert found["c_total", (("x", "a"),)] == found["d_total", ()] == found["h_count", (("x", "a"),)] == 0


def test_decisions_predictions_and_their_errors_are_counted():
    load = Workload(read_rate_bytes_per_s=1e6)
    state = cluster("decode", heartbeat("p0", load=load), heartbeat("d0", load=load), placement="affinity")
    metrics = Metrics()

    def handle(message):
        result = state.handle(message, 0.0)
        for event in result.events:
            metrics(event)
        return result.reply

    for _ in range(2):
        room = handle(Place(request_id="r", session_id="s", prompt_tokens=1000)).room
    handle(prefill_report(room, 0, 10))
    handle(decode_report(room, 0))
    handle(done(room, "d0", replace(lane("store", 0, 10), queue_s=0.1, busy_s=0.2)))

    def value(name, **labels):
        return metrics.registry.get_sample_value(f"dualpath_{name}", labels)

    assert value("placements_total", prefill_class="short_queue", decode_rule="fewest_sequences") == 2
    assert value("session_placements_total", role="prefill") == 1
    assert value("session_placements_total", role="decode") == 1
    assert value("placement_wait_seconds_count", role="prefill") == 2
    assert value("plans_total", path="decode") == 1
    assert value("store_read_bytes_total", engine="d0") == 10_000
    assert value("store_read_seconds_sum", role="decode") == pytest.approx(0.3)
    assert value("store_read_error_seconds_sum", role="decode", direction="late") == pytest.approx(0.3 - 0.01)
    assert value("duplicate_store_pages_total") == 0
