"""The same agents against a single server and against each mode of a cluster.

run.py      one evaluation
summary.py  what it found: `summary.json`
report.py   the same for people: `report.md`
measure.py  counters of a running cluster
demo.py     `dualpath demo`
picture.py  two modes beside their limits, as a PNG
balance.py  how evenly engines read the store
"""
