"""The trace collector with a real OTLP exporter on the other end."""

import json
import signal
import subprocess
import sys

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from dualpath_sgl.evals.spans import jaeger

EXIT_TIMEOUT_S = 60


@pytest.fixture
def start_collector(tmp_path):
    started = []

    def start(name: str, *arguments: str):
        out = tmp_path / f"{name}.jsonl"
        command = [
            sys.executable,
            "-m",
            "dualpath_sgl.launch.processes.collector",
            "--port",
            "0",
            "--out",
            str(out),
            *arguments,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        ready = process.stdout.readline()
        assert ready.startswith("collector ready on 127.0.0.1:"), process.stderr.read()
        return process, out, ready.split(",")[0].removeprefix("collector ready on ")

    yield start
    for process in started:
        process.kill()
        process.wait()


def export_two_spans(address: str) -> tuple[str, str, str]:
    """Ids in hex: trace, parent, child."""
    provider = TracerProvider(resource=Resource.create({"service.name": "tester"}))
    provider.add_span_processor(
        SimpleSpanProcessor(OTLPSpanExporter(endpoint=f"http://{address}", insecure=True))
    )
    tracer = provider.get_tracer("t")
    with tracer.start_as_current_span("parent") as parent:
        with tracer.start_as_current_span("child", attributes={"bytes": 2**40}) as child:
            pass
    provider.shutdown()
    context = parent.get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}", f"{child.get_span_context().span_id:016x}"


def stop(process: subprocess.Popen) -> str:
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=EXIT_TIMEOUT_S)
    assert process.returncode == 0
    return err


def spans(out) -> dict[str, dict]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = [
        span
        for line in lines
        for resource in line["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]
    return {span["name"]: span for span in found}


def test_exported_spans_are_in_the_file_as_otlp_json_with_hex_ids(start_collector):
    process, out, address = start_collector("first")
    trace_id, parent_id, child_id = export_two_spans(address)
    stop(process)
    found = spans(out)
    assert found["parent"]["traceId"] == found["child"]["traceId"] == trace_id
    assert found["parent"]["spanId"] == found["child"]["parentSpanId"] == parent_id
    assert found["child"]["spanId"] == child_id
    assert found["child"]["kind"] == 1 and found["child"]["attributes"][0]["value"] == {
        "intValue": str(2**40)
    }


def test_what_was_collected_converts_to_one_jaeger_trace(start_collector, tmp_path):
    process, out, address = start_collector("first")
    trace_id, *_ = export_two_spans(address)
    stop(process)
    assert jaeger.convert([out], tmp_path / "traces.json") == 1
    (trace,) = json.loads((tmp_path / "traces.json").read_text())["data"]
    assert trace["traceID"] == trace_id and [len(span["references"]) for span in trace["spans"]] == [0, 1]


def test_requests_are_forwarded_to_another_endpoint(start_collector):
    second, second_out, second_address = start_collector("second")
    first, first_out, first_address = start_collector("first", "--forward", second_address)
    export_two_spans(first_address)
    assert stop(first) == ""
    stop(second)
    assert spans(first_out) == spans(second_out) != {}


def test_an_endpoint_that_is_away_costs_one_log_line_and_no_span(start_collector):
    process, out, address = start_collector("first", "--forward", "127.0.0.1:1")
    export_two_spans(address)
    assert stop(process).count("127.0.0.1:1: cannot be reached") == 1
    assert set(spans(out)) == {"parent", "child"}


def test_a_taken_port_is_refused_with_the_remedy(start_collector, tmp_path):
    _, _, address = start_collector("first")
    port = address.split(":")[1]
    command = [
        sys.executable,
        "-m",
        "dualpath_sgl.launch.processes.collector",
        "--port",
        port,
        "--out",
        str(tmp_path / "x"),
    ]
    second = subprocess.run(command, capture_output=True, text=True, timeout=EXIT_TIMEOUT_S)
    assert second.returncode == 1 and f"port {port}" in second.stderr and "--port" in second.stderr
