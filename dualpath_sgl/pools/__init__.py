"""What the bytes of a page are, where they lie, and whether all of them are free again.

layout.py         the fingerprint that two engines, and an engine and the store, must share
key_tag.py        the same facts in front of every key in the store
weights.py        which weights pages were computed with, and what happens when they change
prompt_hash.py    both engines of a room must mean the same prompt
host_tree.py      what of a prompt lies in this rank's host pool
device_memory.py  how much KV the device could still take
integrity.py      an idle engine holds nothing
"""
