"""Agents: sessions of many turns over a growing context.

trace.py         recorded sessions, read from files (claude-code-weka)
mooncake.py      the same out of Mooncake's FAST25 requests
lmcache.py       sessions of full text (lmcache-agent-trace)
table2.py        synthetic ones with the paper's statistics
workload.py      what is replayed of them, scaled to the model
chat.py          the same of full text, through a chat template
conversation.py  prompts that continue with what was really answered
talk.py          turns as HTTP requests, events as answers
replay.py        agents that wait for each answer
subset.py        a small trace out of a large one
sessions.py      stories of a few sessions, for tests and GPU runs
"""
