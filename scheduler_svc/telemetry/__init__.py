"""What can be seen from outside; engines and router use it too.

tracing.py     OpenTelemetry: exporters, trace context
span_names.py  how spans are called
tally.py       counters and histograms for Prometheus
build.py       which release runs, as a metric
faults.py      exceptions: named, counted, and over
log_limit.py   a log that a flood of messages cannot fill
"""
