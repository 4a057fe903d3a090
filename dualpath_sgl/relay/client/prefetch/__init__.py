"""SGLang's prefetch makes the backend's calls: several of them under way at a time, each known by its request.

hooks.py   the methods of SGLang at which this is done, and what becomes of each
ahead.py   the next call begins before the present one is over
call.py    which call the present thread makes: a backend is told keys and addresses, and nothing more
"""
