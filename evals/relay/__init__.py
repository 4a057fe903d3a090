"""Relays measured: shares of the links' limit.

bench.py     `python -m dualpath_sgl.evals.relay.bench`
prefetch.py  SGLang's own prefetch thread over a loader
world.py     a store with objects in it, relays as processes, a prefill engine's loader (the tests use it, too)
"""
