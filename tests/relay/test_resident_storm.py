"""Prompts come and go in a decode engine's tree while a prefill engine asks for them: no wrong byte, ever."""

from __future__ import annotations

import random
import threading
import time

from decode_tree import DEVICE_PAGES, HOST_PAGES, PAGE_TOKENS, DecodeTree, Wanted, prefill_of, prompt, stored

from dualpath_sgl.evals.relay.world import eventually

TURNS = 120
DOCUMENTS = 8
MOST_PAGES = 24


class Reader(threading.Thread):
    """Loads one prompt after another, of which the engine wrote every page once."""

    def __init__(self, scene, tree: DecodeTree, prompts: list[list[int]], chance: random.Random) -> None:
        super().__init__(daemon=True)
        self._scene, self._tree, self._prompts, self._chance = scene, tree, prompts, chance
        self.prefill = prefill_of(scene, tree, batch_bytes=2**18)
        self.ends = threading.Event()
        self.loads = 0
        self.wrong: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            self.error = error

    def _read(self) -> None:
        has = stored(self._scene)
        while not self.ends.is_set():
            keys = self._tree.names(self._chance.choice(self._prompts))
            if self.prefill.loader.exist(keys, has) != [1] * len(keys):
                time.sleep(0.001)
                continue
            wanted = Wanted(self._scene.store.client, keys, self._tree.part_bytes)
            results = self.prefill.load(wanted)
            self.wrong += wanted.wrong(self._tree.bytes_of, results)
            self.loads += 1
            wanted.free()


def test_pages_that_come_and_go_are_never_mistaken(own_fresh_process, scene, storm_seed):
    chance = random.Random(storm_seed)
    tree = DecodeTree(scene.store.master, core=["rust", "python"][storm_seed % 2])
    documents = [prompt(MOST_PAGES // 2, 1000 * storm_seed + number) for number in range(DOCUMENTS)]
    prompts: list[list[int]] = [documents[0]]
    tree.compute(documents[0])
    tree.settles()
    reader = Reader(scene, tree, prompts, random.Random(storm_seed + 1))
    reader.start()
    for turn in range(TURNS):
        if turn % 30 == 29:
            tree.flush()
        if chance.random() < 0.3:
            tree.evict(chance.randrange(HOST_PAGES))
        begin = chance.choice(documents)[: chance.randrange(MOST_PAGES // 2) * PAGE_TOKENS]
        tokens = begin + prompt(chance.randrange(1, MOST_PAGES // 2), chance.randrange(10**6))
        tree.compute(tokens)
        prompts.append(tokens)
        del prompts[:-DOCUMENTS]
        if chance.random() < 0.5:
            tree.settles()
        for _ in range(chance.randrange(40)):
            tree.step()
            time.sleep(0.001)
    reader.ends.set()
    reader.join()
    assert reader.error is None and reader.wrong == []
    print(f"{reader.loads} loads, {reader.prefill.counts}, {tree.server.served}")
    assert reader.prefill.counts.forwarded_bytes > 0
    eventually(lambda: tree.server.leased == 0, "nothing is leased")
    tree.settles()
    tree.evict(HOST_PAGES + DEVICE_PAGES)
    pool = tree.controller.storage_host_pool
    assert pool.available_size() == pool.logical_size  # nothing was pinned
