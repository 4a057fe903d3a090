"""What travels between the scheduler and its peers, and who may send it.

protocol.py         every message: fields, bounds, versions
client.py           a small synchronous client
addresses.py        what peers call themselves
engine_names.py     names of engines and of their DP ranks
reach.py            who can reach an address
liveness.py         how soon a dead peer is noticed
connections.py      peers that send without an end are cut
descriptors.py      how many connections a process may have
keys.py             CURVE keys on disk
authorized_keys.py  in whose name each key may speak
authenticator.py    admits their holders
"""
