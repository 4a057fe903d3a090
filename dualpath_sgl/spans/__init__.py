"""Traces of the load paths and of what SGLang does around them.

tracing.py  `storage.read` and `forward`, below SGLang's own request span
stages.py   `load_back`, `prefill`, `kv_send` and `persist`
"""
