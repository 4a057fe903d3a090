"""Everything that moves pages into a host pool, and what keeps that safe.

page_load.py      one prefetch operation of SGLang: its pages may land in any order
loads.py          how loads begin; reads outside of any plan
open_loads.py     loads whose memory may still be written to
store_lane.py     storage -> own host pool
peer_lane.py      PE: one DE's host pool -> own host pool
peer_lanes.py     PE: one lane for each DE it has work with
page_server.py    DE: where pinned pages lie, and until when
peer_protocol.py  what those two tell each other: read it first
peer_keys.py      who is admitted between engines
door.py           a socket that others ask (relays, and decode engines that hold pages)
forward.py        one-sided reads with Mooncake, each followed to its end
rank_sync.py      several ranks agree on what has landed (tp_size > 1)
"""
