"""The simulated cluster.

cluster.py     one life of a request, from agent to last token
setup.py       what is simulated
scheduling.py  the real scheduler in it
workload.py    turns and what each costs
engines.py     what policies read of an engine
prefill.py     prefill engines
decode.py      decode engines
storage.py     storage links
relays.py      loads that relays help with
hardware.py    nodes and GPUs
models.py      bytes and FLOPs of the models
loop.py        simulated time
"""
