"""What clients are told.

events.py      a stream's events, and the JSON in any answer
problems.py    errors inside engines' answers
logprobs.py    log-probabilities of both engines, joined
dialects.py    an error in the form that the client of a path reads
middleware.py  what no handler has answered
"""
