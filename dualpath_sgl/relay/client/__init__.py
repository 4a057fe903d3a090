"""The prefill engine's side: one list of objects, several lanes that claim from it.

Relays claim from the front of a load's list, the engine's own client of the store from its back; they meet.
Nobody knows a rate.  A lane that dies, hangs or slows down is met sooner, and what it had claimed is claimed
again.

    SGLang -> prefetch/    its prefetch, with two of its calls under way at a time
    store.py               its Mooncake backend with one method replaced (register.py puts it there)
    loader.py              one call of it, from its begin to its end
    claims.py              the list: who claims what, what comes back, what has landed
    lane.py                one relay: ask, pull, confirm, copy (batch.py), if it may be asked (standing.py)
    memory/                where its bytes come into, and with which transfer engine

Beside it: batch_size.py (how much a lane claims), relays.py (who may help), options.py (the backend's configuration), spread.py (which relay reads
what, when ranks share their KV), counts.py, spans.py.

A pull cannot be taken back: bytes of a relay that hung may come seconds later.  They land in bounce memory
that nobody else gets before the transfer is over, never in the engine's.  So a load is over when `load`
returns, whatever relays do.
"""
