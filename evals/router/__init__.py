"""How much one placing router bears, and what it does with more than that.

bench.py     the command for what it bears
overload.py  the command for more
engines.py   HTTP servers in the place of engines
"""
