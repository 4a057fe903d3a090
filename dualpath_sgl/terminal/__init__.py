"""What the commands print: for people at any width, for pipes, for scripts.

console.py  where it goes, how wide
units.py    bytes, rates and times with units
columns.py  lines of fixed columns
"""
