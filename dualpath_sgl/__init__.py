"""DualPath inside SGLang: a second path for stored KV, through the decode engine.

A forwarded request meets, in this order:

    intake.py               both: what is taken from clients; several samples become several requests
    hooks.py                every method of SGLang at which DualPath gets a word: start here
    request_state.py        both: the states of a request, and where it may go from each
    prefill.py              PE: reports L_P and K, gives a load's pages to the lanes once it has plan and memory
    decode.py               DE: reports L_D, starts its share of the storage read, holds admission
    room_reports.py         both: Report and Done to the scheduler
    control/channel.py      both: the socket to the scheduler, on which the plan comes back
    lanes/store_lane.py     both: storage -> own host pool
    lanes/page_load.py      both: pages land in any order, SGLang learns of the contiguous prefix
    lanes/page_server.py    DE: offers pinned pages to the PE, with leases
    lanes/peer_protocol.py  what page server and peer lane tell each other
    lanes/peer_lane.py      PE: DE's host pool -> own host pool
    restore.py              DE: promised pages stay until they are back on the device

In relay mode there is no such way: relay_hooks.py only looks at requests, relay_engine.py tells the scheduler of
them and learns which relays may help.

Beside it: plugin.py (SGLang's door), storage.py (the storage backend; it starts runtime.py, which builds and
wires what one engine rank is made of), and the folders

    start/         settings, and what is refused before an engine serves
    control/       the channel to the scheduler, and what heartbeats say
    lanes/         everything that moves pages
    pools/         what the bytes of a page are: layout, names, host tree
    threads/       what every thread here needs
    spans/         traces
    metrics/       what an engine rank counts of itself, on SGLang's metrics port
    limits/        measuring aids: imagined storage links
    experimental/  off unless asked for
    cpu_profile/   SGLang on a CPU
    router/        the placing router, a process of its own
    relay/         a second path for every kind of KV, without hooks: a process of its own, and its client
    cli/           the command `dualpath`
    terminal/      what commands print: columns, units, pipes

`launch`, `evals`, `patches` and `requirements` are links to the folders of the repository, so that one package
is installed.
docs/design.md tells which thread runs what.
"""

__version__ = "0.1.0"
"""The one place that says it."""
