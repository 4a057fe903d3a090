"""Proves kinds of models and features of engines: every token of a cluster beside those of one plain server.

cases.py       what one proof starts: a model, flags of engines, ranks
on_cpu.py      the proofs on a CPU, models of a few layers
on_cuda.py     those on GPUs, real head sizes
checkpoint.py  a model directory for any architecture, with seeded weights
drafts.py      draft models for speculative decoding
outside/       what such models bring from outside SGLang
proof.py       runs one: sessions on the server, then on the cluster, out of the store
record.py      results/models/summary.json
__main__.py    the command
"""
