"""Memory of the engine that bytes of relays come into.

bounce.py        they are pulled into this, and stay in it until they are confirmed
transports.py    with which transfer engine, one for each relay
destinations.py  memory that they may be copied into then
"""
