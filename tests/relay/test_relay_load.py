"""Loads through relays: who brings what, and that the bytes are right."""

from __future__ import annotations

from relay_world import MIB, Loading

from dualpath_sgl.evals.relay.world import eventually


def test_relays_bring_all_but_what_the_own_client_has_claimed(scene):
    relays = scene.relay(), scene.relay()
    objects = scene.objects()
    prefill = scene.prefill(*relays)
    prefill.may_read.clear()
    loading = Loading(lambda: prefill.load(objects))
    eventually(lambda: prefill.counts.relay_bytes + 8 * MIB > objects.byte_count, "relays bring the rest")
    prefill.may_read.set()
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []
