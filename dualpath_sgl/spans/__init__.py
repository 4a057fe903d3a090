"""Traces of the load paths and of what SGLang does around them.

joining.py       one tree for a request whoever sends it; none for probes
request_span.py  `request PATH`, a whole request with what became of its KV
tracing.py       `load` of each side, with the ways of KV below it
stages.py        `load_back` and `persist`
"""
