"""DualPath inside SGLang: a second path for stored KV, through the decode engine.

The request path, in the order a request visits it:

    prefill.py      PE: binds request and room, reports L_P and K, receives the plan
    decode.py       DE: reports L_D, starts its share of the storage read, holds admission
    store_lane.py   both: storage -> own host pool
    page_server.py  DE: offers pinned pages to the PE, with leases
    peer_lane.py    PE: DE's host pool -> own host pool
"""
