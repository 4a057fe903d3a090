"""The Python router with placement by the scheduler.

`python -m sglang_router.launch_router --mini-lb --dualpath-scheduler ...` hands over to `app.serve`
(patches/sglang-router-0.3.2).  A request visits:

    app.py        HTTP server
    paths.py      which address is answered by what
    route.py      one client request from its first byte to its last: attempts, streaming, errors
    limit.py      how many at once
    request.py    what its body says: session, prompt size, streaming
    refusals.py   what in it SGLang would not answer
    pairing.py    which pair of engines: the scheduler's choice, or the router's own
    placement.py  the question to the scheduler (ZeroMQ), with a time limit and a circuit
    exchange.py   one attempt: both halves at once, and the end of one when the other fails
    half.py       one engine's half: POST, answer

Beside it: reply.py (the client's side), metrics.py, spans.py, and the folders answers/ (what engines' answers
say, and errors), fleet/ (the engines) and settings/ (what the operator said).
"""
