"""`dualpath top`: what a running cluster does right now, in numbers that move.

command.py  the command and its options
live.py     looks again and again, and shows it
reading.py  one look: the scheduler's status and every engine's metrics
figures.py  two looks -> rates, mixes and sums; pure
view.py     figures as lines for a terminal
"""
