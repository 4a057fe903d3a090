"""The whole system on the GPUs at hand.

smoke.py    the command: every token compared, loads timed
loads.py    loads, alone and in bursts
goodput.py  forwards beside Mooncake alone
report.py   tables
grid.py     the command: every mode beside the others, at one rate of storage and one transport
streams.py  requests that decode meanwhile
"""
