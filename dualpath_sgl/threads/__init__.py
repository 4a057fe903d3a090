"""What every thread of DualPath needs.

faults.py    an exception costs one step, is named and counted
mailbox.py   a queue into a thread that sleeps in a ZeroMQ poll
priority.py  lanes give way to SGLang's scheduler loop
"""
