"""The DualPath global scheduler: a ZeroMQ service that chooses engines and load paths.

A message visits:

    server.py    the only socket: frames in, frames out, who may speak for whom
    waiting_places.py  placements wait until engines' messages are handled
    state.py     `Cluster.handle`: one message in, replies, plans and events out
    ledger/      what is known: engines, relays, rooms, what is promised
    planning.py  from the reports of both sides to a plan
    helping.py   who may help a prefill engine, told when it changes
    policies/    the choice itself, pure: paths, placement, help
    events.py    what happened, for metrics.py and decision_spans.py

Beside it: __main__.py (`python -m scheduler_svc`), http_side.py (/metrics, /healthz) with http_place.py (/place),
wire/ (messages, addresses, keys), telemetry/ (logs, counters, traces; engines and router use it too),
keys_command.py (`dualpath keys`), standby.py (a second scheduler waits for the first one's address).
"""
