"""Hand-made OTLP JSON: one trace of two services, one of whose spans has lost its parent."""

TRACE = "0af7651916cd43dd8448eb211c80319c"
ROOT, CHILD, ORPHAN, LOST = "00f067aa0ba902b7", "b7ad6b7169203331", "c1c1c1c1c1c1c1c1", "dddddddddddddddd"


def otlp(service: str, *spans: dict) -> dict:
    attributes = [
        {"key": "service.name", "value": {"stringValue": service}},
        {"key": "host", "value": {"stringValue": "h"}},
    ]
    return {
        "resourceSpans": [{"resource": {"attributes": attributes}, "scopeSpans": [{"spans": list(spans)}]}]
    }


def span(span_id: str, name: str, start_us: int, end_us: int, **more) -> dict:
    return {
        "traceId": TRACE,
        "spanId": span_id,
        "name": name,
        "startTimeUnixNano": str(start_us * 1000),
        "endTimeUnixNano": str(end_us * 1000),
    } | more


REQUESTS = [
    otlp(
        "prefill-0",
        span(
            CHILD,
            "store to prefill",
            1_000_010,
            1_000_060,
            parentSpanId=ROOT,
            attributes=[
                {"key": "bytes", "value": {"intValue": "4096"}},
                {"key": "gbps", "value": {"doubleValue": 1.5}},
                {"key": "ok", "value": {"boolValue": True}},
                {"key": "pages", "value": {"arrayValue": {"values": [{"intValue": "1"}, {"intValue": "2"}]}}},
            ],
            events=[
                {
                    "timeUnixNano": "1000020000",
                    "name": "batch",
                    "attributes": [{"key": "n", "value": {"intValue": "7"}}],
                }
            ],
            status={"code": 2, "message": "short read"},
        ),
    ),
    otlp(
        "client",
        span(ROOT, "dualpath.request", 1_000_000, 1_000_100, kind=3),
        span(ORPHAN, "kv_send", 1_000_050, 1_000_055, parentSpanId=LOST),
    ),
]
