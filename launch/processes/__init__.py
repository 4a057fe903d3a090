"""The parts of a cluster as processes.

commands.py     command line and environment of each
environment.py  what they inherit, and what not
ports.py        free ports
process.py      one child: own process group, own log, never left behind
run_dir.py      the run directory: one supervisor at a time
relays.py       the relays of a cluster
store_node.py   the part that owns the memory of the store
collector.py    the part that receives spans
otlp_copy.py    sends a copy of them elsewhere
"""
