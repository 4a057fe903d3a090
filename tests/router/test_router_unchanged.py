"""Without `--dualpath-scheduler` the patched package does what it did before."""

from __future__ import annotations

from faulty_engine import busy


def test_mini_lb_is_still_sglangs_own(world):
    answer = world.upstream_router().ask()
    assert (answer.status, answer.json["text"]) == (200, "d0")
    assert answer.headers["server"] == "uvicorn"
    # Upstream passes a refusal on; ours would say no_engine.
    world.p0.behaviour = world.d0.behaviour = busy
    answer = world.upstream_router().ask()
    assert (answer.status, answer.json) == (503, {"error": {"message": "The request queue is full."}})


def test_the_rust_router_still_starts_and_serves(world):
    router = world.rust_router()
    world.wait_until_served(router)  # it looks for its engines after it answers
    assert router.ask().json["text"] == "d0"
