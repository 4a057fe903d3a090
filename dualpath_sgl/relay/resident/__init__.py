"""Decode engines that hold objects in host memory answer like relays, without a read from the store.

What a decode engine writes to the store, or has read from it, lies in its host pool under the same keys.
It answers `Fetch` with the addresses there.

On a decode engine:

    noting.py       SGLang's backend says here which key lies where
    lives.py        until when the bytes of a page are the same
    index.py        key -> address, as long as they are
    server.py       Holds, Fetch, Release: a thread that SGLang's scheduler never waits for
    serving.py      puts these together

On a prefill engine:

    whereabouts.py  which decode engine said that it holds what

Nothing is pinned.  SGLang may evict a page at any time, and then the page's *life* ends: that is counted
before anybody else gets the memory.  `Released(valid)` says whether every page lived until the client had
pulled it; a client believes no byte before that.  So no rank of a decode engine evicts other pages than its
neighbours because of a client of ours, no lock can be left behind, and an answer waits for nobody's step.
"""
