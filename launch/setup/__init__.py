"""What a machine needs first.

system_check.py  system libraries
pins.py          which packages were tested together
install.py       `dualpath setup`: these, and what follows
patching.py      the patches: applied, checked, reverted
tiny_model.py    seeded models that run on a CPU
"""
