"""The engines behind the router.

engines.py        what is known of each
health.py         how that stays true
errors.py         what a client is told when they cannot answer
body.py           what a client sent
headers.py        which headers go through to them, and back
cluster_calls.py  what concerns all of them: models, caches, server info
"""
