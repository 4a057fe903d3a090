"""What the operator said.

settings.py   time limits, retries and limits, from `sglang_router`'s own arguments
options.py    which of its options hold here
admission.py  which engines may get requests
"""
