"""The load benchmark: how fast stored KV reaches the prefill engine, on shaped links.

command.py    `dualpath bench-load`
bench.py      which clusters, which loads, in which order
cluster.py    one cluster on shaped links
client.py     prompts sent and timed
summary.py    figures, targets and limits: `summary.json`
plot.py       the picture
gain.py       the README's picture, of several runs
raw_rates.py  Mooncake alone, the limit
raw_read.py   one process of that
"""
