"""Agents: sessions of many turns over a growing context.

trace.py         recorded sessions, read from files
table2.py        synthetic ones with the paper's statistics
workload.py      what is replayed of them, scaled to the model
conversation.py  prompts that continue with what was really answered
replay.py        agents that wait for each answer
subset.py        a small trace out of a large one
sessions.py      stories of a few sessions, for tests and GPU runs
"""
