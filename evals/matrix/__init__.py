"""`dualpath eval matrix`: modes x topologies x traces x loads, one result file a cell.

command.py      the command
experiment.py   what the YAML file says
cells.py        the cells it means
modes.py        the cluster of a mode
workloads.py    the agents of a cell, and when they come
runner.py       runs what is not finished
target.py       a cluster of its own, or a deployment that runs already
sampling.py     counters in time
probing.py      the highest rate that keeps a service level
results.py      what a cell found
environment.py  on what it ran
experiments/*.yaml: shipped experiment files
"""
