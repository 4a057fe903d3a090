"""What a machine needs first.

system_check.py  system libraries
patching.py      the patches: applied, checked, reverted
tiny_model.py    seeded models that run on a CPU
"""
