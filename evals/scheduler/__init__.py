"""How much one scheduler bears.

bench.py  the command
load.py   engines and a router in one process, over real sockets
"""
