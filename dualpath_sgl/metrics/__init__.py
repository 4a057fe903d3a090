"""What an engine rank counts of itself: `dualpath_rank_*` beside `sglang:*` on the engine's own metrics port.

SGLang's engines run several processes, which write their samples into one directory; the HTTP server of the engine
adds them up (`PROMETHEUS_MULTIPROC_DIR`).  These go the same way, so they are seen while the scheduler is away.
Nothing is counted where SGLang runs without `--enable-metrics`.

rank.py     the metrics of one rank, and what feeds them
prompts.py  where the pages of a prompt came from, which two threads and SGLang know in parts
helpers.py  what relays and decode engines brought in mode relay
sampler.py  a thread that writes gauges once a second
hooks.py    where a prefill engine's prompts pass SGLang
"""
