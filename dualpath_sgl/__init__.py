"""DualPath inside SGLang: a second path for stored KV, through the decode engine.

A request meets, in this order:

    hooks.py              every method of SGLang at which DualPath gets a word: start here
    prefill.py            PE: binds request and room, reports L_P and K, receives the plan
    decode.py             DE: reports L_D, starts its share of the storage read, holds admission
    lanes/store_lane.py   both: storage -> own host pool
    lanes/page_server.py  DE: offers pinned pages to the PE, with leases
    lanes/peer_lane.py    PE: DE's host pool -> own host pool
    lanes/page_load.py    both: pages land in any order, SGLang learns of the contiguous prefix
    closing.py            both: says Done to the scheduler, exports spans
    restore.py            DE: promised pages stay until they are back on the device

Beside it: plugin.py (SGLang's door), storage.py (the storage backend; it starts runtime.py: what one engine
rank owns), and the folders

    start/         settings, and what is refused before an engine serves
    control/       the channel to the scheduler
    lanes/         everything that moves pages
    pools/         what the bytes of a page are: layout, names, host tree
    threads/       what every thread here needs
    spans/         traces
    limits/        measuring aids: imagined storage links
    experimental/  off unless asked for
    cpu_profile/   SGLang on a CPU
    router/        the placing router, a process of its own
    cli/           the command `dualpath`
    terminal/      what commands print: columns, units, pipes

`launch`, `evals` and `patches` are links to the folders of the repository, so that one package is installed.
"""

__version__ = "0.1.0"
"""The one place that says it."""
