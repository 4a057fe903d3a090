"""One store for all tests here (relay_world.py)."""

import pytest


@pytest.fixture(scope="package")
def store():
    from relay_world import STORE_BYTES, Store

    store = Store(STORE_BYTES)
    yield store
    store.end()


@pytest.fixture
def scene(store):
    from relay_world import scene_of

    with scene_of(store) as scene:
        yield scene
