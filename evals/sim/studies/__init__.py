"""What is asked of the simulated cluster.

command.py      `dualpath sim run`, `dualpath sim paper`
bench.py        one experiment after another
paper.py        the paper's experiments
absolute.py     its seconds, rates and sweeps, and what the drawn turns are like
online.py       the highest rate that keeps a service level
sensitivity.py  what happens when an assumption is turned
figures.py      beside the paper's figures
"""
