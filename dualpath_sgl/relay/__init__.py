"""The relay: a process that reads stored objects by key and lets prefill engines pull their bytes.

It runs wherever a storage link idles: beside a decode engine, or on a host of its own.  It knows store
keys and sizes, nothing of tokens, requests or models, and imports neither SGLang nor torch.

    prefill engine -> Fetch      "read these objects"           wire.py: what both sides say, read it first
                                 waits for its turn             fair_queue.py
                                 begins                         fetches.py
                                 gets room in the ring          memory.py, slots.py, ring.py
                                 is read                        readers.py, store.py
    relay -> Ready               "they lie here"                leases.py
    prefill engine -> Release    "I have pulled them"
    relay -> Released            "they lay there all that time"

server.py     the loop that owns all of it
settings.py   `DUALPATH_RELAY_*`
metrics.py    Prometheus
../control/   its heartbeats to the scheduler (relay_channel.py)
__main__.py   `python -m dualpath_sgl.relay`
client/       the prefill engine's side
resident/     decode engines answer, too, for what lies in their host memory
"""
