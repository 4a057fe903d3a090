"""How much one placing router bears.

bench.py    the command
engines.py  HTTP servers in the place of engines
"""
