"""Discrete-event model of a DualPath cluster that runs the scheduler's own policy objects.

One request, file by file in `model/`:

1. `workload.py`    an agent's next turn: prompt, stored prefix, answer length
2. `scheduling.py`  the scheduler's policies place it and choose its load path
3. `storage.py`     one or two storage links read its pages; in mode relay, all that may help (`relays.py`)
4. `prefill.py`     a group of prefill engines computes it, in steps
5. `decode.py`      a decode engine admits it, copies its KV in, generates; then the agent's next turn

`cluster.py` joins these, `hardware.py` and `models.py` hold every number with its source.  `studies/` asks:
`paper.py` compares with the paper's results, `command.py` is `dualpath sim`.
"""
