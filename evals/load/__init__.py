"""The load benchmark: how fast stored KV reaches the prefill engine, on shaped links.

command.py    `dualpath bench-load`
room.py       memory and cores, asked first
plan.py       which clusters, which cells, in which order
bench.py      measures them
cluster.py    one cluster on shaped links
client.py     prompts sent and timed
outcome/      cells, figures, `summary.json`, tables and the picture
gain.py       the README's picture, of several runs
raw_rates.py  Mooncake alone, the limit
raw_read.py   one process of that
"""
