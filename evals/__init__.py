"""Measures DualPath against upstream; each folder is one program.

cli.py      `dualpath eval`
agents/     agent traces and how they are replayed
compare/    `dualpath eval run`, `dualpath demo`, balance of reads: modes side by side on one trace
clients/    `dualpath eval clients`: standard clients through both routers
matrix/     `dualpath eval matrix`: modes, topologies, traces and loads out of one experiment file
report/     its HTML page with plots
load/       `dualpath bench-load`: load paths on shaped links
gpu/        the whole system on real GPUs
scheduler/  how much one scheduler bears
router/     how much one placing router bears
relay/      what part of the links' limit loads through relays reach
models/     kinds of models and features of engines: tokens beside one server's
sim/        `dualpath sim`: clusters that are not at hand
spans/      `dualpath trace`: Jaeger files, waterfalls
common/     errors and files
"""
