"""Shaped networks on one machine: a storage link and a compute link per engine, each a real one.

    storage network   store node ── bridge ── storage link of each engine (shaped)
    compute network   host end   ── bridge ── compute link of each engine (shaped)

Every engine lives in a network namespace of its own, the store node with its master in another.
Router, scheduler and collector stay on the host, at the host's end of the compute bridge.

    plan.py      names, addresses and commands; pure
    network.py   builds, measures, re-shapes and removes; root only
"""
