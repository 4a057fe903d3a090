"""What the scheduler knows.

engines.py      each rank as its last heartbeat described it, plus what is planned
relays.py       each relay as its last heartbeat described it
rooms.py        what both sides said about one request, and the plan they got
intervals.py    page ranges: which were read by whom
placed_work.py  work that heartbeats do not show yet
kept_pages.py   how much of a session an engine really still has
token_rate.py   how fast an engine retires prompt tokens
"""
