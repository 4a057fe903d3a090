"""What the replay client does when a server fails.

The server here is a stand-in, because a real one cannot be made to fail at will; the client is
used with real servers by the end-to-end tests.
"""

import json
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from dualpath_sgl.evals.agents import replay as module
from dualpath_sgl.evals.agents.replay import Pace, ReplayError, replay
from dualpath_sgl.evals.agents.trace import TraceRequest, TraceSession
from dualpath_sgl.evals.agents.workload import build
from dualpath_sgl.evals.common.errors import EvalError
from scheduler_svc.telemetry.tracing import init_tracing, shutdown

SESSION = TraceSession(
    id="s",
    block_size=10,
    requests=(
        TraceRequest(prompt_tokens=20, output_tokens=6, hash_ids=(1, 2)),
        TraceRequest(prompt_tokens=30, output_tokens=5, hash_ids=(1, 2, 3)),
    ),
)


@asynccontextmanager
async def serving(handler):
    app = web.Application()
    app.router.add_post("/generate", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


def played_against(handler, agents: int = 1, monkeypatch=None, pace: Pace | None = None, **how):
    """Run the client in its own event loop, with the server in the same."""
    workload = build([SESSION], agents=agents, turns=None, max_context_tokens=200, page_size=4)
    tracer = init_tracing("tester", None)
    real = module._Player.play

    async def with_server(player, url, conversations):
        async with serving(handler) as address:
            return await real(player, address, conversations)

    monkeypatch.setattr(module._Player, "play", with_server)
    try:
        pace = pace or Pace(concurrency=agents)
        return replay(workload, "", pace=pace, vocab_size=100, seed=0, tracer=tracer, **how)
    finally:
        shutdown()


def streamed(*events):
    async def handler(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        body = await request.json()
        for event in events:
            event = event(body) if callable(event) else event
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    return handler


def generated(body):
    count = body["sampling_params"]["max_new_tokens"]
    return {
        "output_ids": list(range(count)),
        "meta_info": {"cached_tokens": 3, "finish_reason": {"type": "length"}},
    }


def first_token(body):
    return {"output_ids": [0], "meta_info": {}}


def test_answers_are_used_in_the_next_prompt_and_requests_carry_one_trace_each(monkeypatch):
    seen = []

    async def handler(request):
        seen.append((await request.json(), request.headers["traceparent"]))
        return await streamed(first_token, generated)(request)

    run = played_against(handler, monkeypatch=monkeypatch)
    (first, first_parent), (second, second_parent) = seen
    assert second["input_ids"][:26] == first["input_ids"] + list(range(6)) and len(second["input_ids"]) == 30
    assert first["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
    assert [record.trace_id for record in run.records] == [
        first_parent.split("-")[1],
        second_parent.split("-")[1],
    ]
    assert first_parent.split("-")[1] != second_parent.split("-")[1]
    assert run.answers == {"s": [list(range(6)), list(range(5))]}
    assert [(r.prompt_tokens, r.cached_tokens, r.theoretical_hit_tokens) for r in run.records] == [
        (20, 3, 0),
        (30, 3, 24),
    ]
    assert all(0 < r.ttft_s <= r.e2e_s <= run.job_s and r.tpot_s is not None for r in run.records)


def test_an_http_error_names_session_turn_status_and_body(monkeypatch):
    async def handler(request):
        return web.json_response({"error": "no decode engine"}, status=503)

    with pytest.raises(ReplayError, match=r"session s turn 0: HTTP 503 .*no decode engine"):
        played_against(handler, monkeypatch=monkeypatch)


def test_an_error_inside_the_stream_is_a_failure(monkeypatch):
    handler = streamed(first_token, {"error": {"message": "aborted by engine"}})
    with pytest.raises(ReplayError, match="aborted by engine"):
        played_against(handler, monkeypatch=monkeypatch)


def test_a_short_answer_is_a_failure_with_the_finish_reason(monkeypatch):
    def short(body):
        return {"output_ids": [1, 2], "meta_info": {"finish_reason": {"type": "abort", "message": "gone"}}}

    with pytest.raises(ReplayError, match=r"gave 2 tokens, 6 asked for.*gone"):
        played_against(streamed(short), monkeypatch=monkeypatch)


def test_one_failure_ends_the_whole_replay_and_nothing_is_retried(monkeypatch):
    requests = []

    async def handler(request):
        requests.append(1)
        return web.Response(status=500, text="broken")

    with pytest.raises(ReplayError, match="HTTP 500"):
        played_against(handler, agents=3, monkeypatch=monkeypatch)
    assert len(requests) <= 3


def test_agents_come_when_the_pace_says_and_think_between_their_turns(monkeypatch):
    slept = []
    sleep = module.asyncio.sleep

    async def noted(seconds):
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(module.asyncio, "sleep", noted)
    thinking = SESSION.requests[1].model_copy(update={"think_s": 40.0})
    monkeypatch.setattr(
        "test_evals_replay.SESSION", SESSION.model_copy(update={"requests": (SESSION.requests[0], thinking)})
    )
    pace = Pace(starts_s=[0.5, 2.5], think=0.5, longest_think_s=15)
    run = played_against(streamed(generated), 2, monkeypatch, pace)
    # The second agent begins with a round of its own.
    assert len(run.records) == 5 and sorted(filter(None, slept)) == [0.5, 2.5, 15, 15]


def test_a_replay_ends_when_it_has_shown_enough(monkeypatch):
    run = played_against(streamed(generated), 3, monkeypatch, until=lambda record: record.turn == 1)
    assert 2 <= len(run.records) < 8 and run.records[-1].turn == 1


def test_a_server_that_is_not_there_is_a_failure():
    workload = build([SESSION], agents=1, turns=None, max_context_tokens=200, page_size=4)
    tracer = init_tracing("tester", None)
    with pytest.raises(ReplayError, match="127.0.0.1:1"):
        replay(
            workload, "http://127.0.0.1:1", pace=Pace(concurrency=1), vocab_size=100, seed=0, tracer=tracer
        )
    with pytest.raises(EvalError, match="concurrency is 0"):
        replay(
            workload, "http://127.0.0.1:1", pace=Pace(concurrency=0), vocab_size=100, seed=0, tracer=tracer
        )
