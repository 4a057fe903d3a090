"""The replay rules as properties: what is shared, how long things are, how they scale."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath_sgl.evals.agents.conversation import Conversation
from dualpath_sgl.evals.agents.trace import TraceRequest, TraceSession, sharings
from dualpath_sgl.evals.agents.workload import MIN_OUTPUT_TOKENS, SessionPlan, build, scale_session
from dualpath_sgl.evals.common.errors import EvalError

BLOCK = 16
PAGE = 4
VOCAB = 8
"""Small, so that new tokens often agree with old ones by chance."""


@st.composite
def trace_sessions(draw):
    """Sessions that append, cut back, branch off older requests and start again."""
    requests, next_id = [], 0
    for _ in range(draw(st.integers(1, 8))):
        prefix: tuple[int, ...] = ()
        shortest = 1
        if requests and draw(st.integers(0, 5)):
            base = draw(st.sampled_from(requests))
            if draw(st.booleans()):
                prefix, shortest = base.hash_ids, base.prompt_tokens
            else:
                prefix = base.hash_ids[: draw(st.integers(0, len(base.hash_ids)))]
                shortest = max(1, len(prefix) * BLOCK)
        prompt = shortest + draw(st.integers(0, 6 * BLOCK))
        new = prompt // BLOCK - len(prefix)
        requests.append(
            TraceRequest(
                prompt_tokens=prompt,
                output_tokens=draw(st.integers(0, 4 * BLOCK)),
                hash_ids=prefix + tuple(range(next_id, next_id + new)),
            )
        )
        next_id += new
    return TraceSession(id="s", block_size=BLOCK, requests=tuple(requests))


def played(plan: SessionPlan, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers when the model says 0, 1, 2, … of the vocabulary."""
    conversation = Conversation(plan, VOCAB, seed)
    prompts, answers = [], []
    for index, turn in enumerate(plan.turns):
        prompts.append(conversation.prompt())
        answers.append([(index + place) % VOCAB for place in range(turn.output_tokens)])
        conversation.answer(answers[-1])
    return prompts, answers


def common(left: list[int], right: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


factors = st.floats(0.01, 1.0)


@given(trace_sessions(), factors, st.sampled_from([0, PAGE]))
def test_every_prompt_is_as_long_as_planned_and_every_turn_brings_something_new(session, factor, prelude):
    plan = SessionPlan("s", scale_session(session, sharings(session), factor, prelude))
    prompts, _ = played(plan)
    assert [len(prompt) for prompt in prompts] == [turn.prompt_tokens for turn in plan.turns]
    assert all(turn.new_tokens >= 1 for turn in plan.turns)
    assert all(turn.output_tokens >= MIN_OUTPUT_TOKENS for turn in plan.turns[1 if prelude else 0 :])


@given(trace_sessions(), factors)
def test_a_prompt_shares_with_earlier_transcripts_exactly_what_is_planned(session, factor):
    plan = SessionPlan("s", scale_session(session, sharings(session), factor))
    prompts, answers = played(plan)
    for index, turn in enumerate(plan.turns):
        planned = turn.prompt_tokens - turn.new_tokens
        longest = max((common(prompts[index], prompts[j] + answers[j]) for j in range(index)), default=0)
        assert longest == planned


@given(trace_sessions(), factors)
def test_an_appended_prompt_is_context_plus_generated_tokens_plus_append(session, factor):
    shares = sharings(session)
    prompts, answers = played(SessionPlan("s", scale_session(session, shares, factor)))
    for index, shared in enumerate(shares):
        if shared and shared.extends:
            context = prompts[shared.parent] + answers[shared.parent]
            assert prompts[index][: len(context)] == context
            assert len(prompts[index]) > len(context)


@given(trace_sessions())
def test_at_full_size_a_left_context_is_left_where_the_trace_leaves_it(session):
    # Answers that are shorter than the floor, or longer than what the next prompt grew by, shift
    # later places; sessions where neither happens keep every place.
    shares = sharings(session)
    for request, shared in zip(session.requests, shares, strict=True):
        if request.output_tokens < MIN_OUTPUT_TOKENS:
            return
        if shared and shared.extends:
            before = session.requests[shared.parent]
            if request.prompt_tokens <= before.prompt_tokens + before.output_tokens:
                return
        elif request.prompt_tokens == (shared.blocks * BLOCK if shared else 0):
            return
    turns = scale_session(session, shares, 1.0)
    for turn, request, shared in zip(turns, session.requests, shares, strict=True):
        assert turn.prompt_tokens == request.prompt_tokens
        if shared and not shared.extends:
            assert turn.kept_tokens == shared.blocks * BLOCK


@given(trace_sessions(), factors, factors)
def test_scaling_is_monotone(session, one, other):
    shares = sharings(session)
    small = scale_session(session, shares, min(one, other))
    large = scale_session(session, shares, max(one, other))
    for less, more in zip(small, large, strict=True):
        assert less.prompt_tokens <= more.prompt_tokens and less.output_tokens <= more.output_tokens


@given(st.lists(trace_sessions(), min_size=1, max_size=3), st.integers(1, 5), st.integers(120, 400))
@settings(max_examples=50)
def test_every_prompt_with_its_answer_fits_the_context(sessions, agents, context):
    workload = build(sessions, agents=agents, turns=None, max_context_tokens=context, page_size=PAGE)
    assert len(workload.sessions) == agents
    for session in workload.sessions:
        assert all(turn.prompt_tokens + turn.output_tokens <= context for turn in session.turns)
    assert 0 < workload.factor <= 1 and 0 <= workload.hit_rate < 1


@given(trace_sessions())
@settings(max_examples=50)
def test_a_reused_session_shares_no_page_with_its_original(session):
    workload = build([session], agents=3, turns=None, max_context_tokens=4000, page_size=PAGE)
    played_sessions = []
    for plan in workload.sessions:
        # A real vocabulary: with eight tokens two random pages may be equal by chance.
        conversation = Conversation(plan, 50_000, 0)
        prompts = []
        for turn in plan.turns:
            prompts.append(conversation.prompt())
            conversation.answer([1] * turn.output_tokens)
        played_sessions.append(prompts)
    original, first, second = played_sessions
    assert len(first) == len(original) + 1 and workload.sessions[1].turns[0].output_tokens == 1
    for left, right in ((original, first), (original, second), (first, second)):
        assert max(common(one, other) for one in left for other in right) < PAGE


@given(trace_sessions(), factors)
def test_the_same_seed_gives_the_same_prompts_and_another_seed_others(session, factor):
    plan = SessionPlan("s", scale_session(session, sharings(session), factor))
    assert played(plan, 3) == played(plan, 3)
    if plan.turns[0].prompt_tokens > 20:
        assert played(plan, 3)[0][0] != played(plan, 4)[0][0]


def hand_made() -> TraceSession:
    return TraceSession(
        id="s",
        block_size=10,
        requests=(
            TraceRequest(prompt_tokens=20, output_tokens=6, hash_ids=(1, 2)),
            TraceRequest(prompt_tokens=30, output_tokens=5, hash_ids=(1, 2, 3)),
            TraceRequest(prompt_tokens=25, output_tokens=5, hash_ids=(1, 9)),
        ),
    )


def test_the_theoretical_hit_rate_of_a_hand_made_session():
    workload = build([hand_made()], agents=1, turns=None, max_context_tokens=100, page_size=2)
    # Turn 1 follows 20 prompt and 6 generated tokens, of which the last has no KV yet: 25 -> 24 in
    # pages of 2.  Turn 2 leaves after the first block: 10.
    assert [turn.prompt_tokens for turn in workload.sessions[0].turns] == [20, 30, 25]
    assert [turn.hit_tokens(2) for turn in workload.sessions[0].turns] == [0, 24, 10]
    assert workload.hit_rate == 34 / 75
    assert workload.raw_hit_rate == 30 / 75
    assert workload.factor == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"agents": 0}, "agents is 0"),
        ({"turns": 0}, "turns is 0"),
        ({"max_context_tokens": 9}, "max context is 9 tokens, but the chosen turns need at least"),
    ],
)
def test_impossible_workloads_are_refused(changes, said):
    options = {"agents": 1, "turns": None, "max_context_tokens": 100, "page_size": 4} | changes
    with pytest.raises(EvalError, match=said):
        build([hand_made()], **options)


def test_an_answer_of_the_wrong_length_is_refused():
    plan = SessionPlan("s", scale_session(hand_made(), sharings(hand_made()), 1.0))
    conversation = Conversation(plan, VOCAB, 0)
    conversation.prompt()
    with pytest.raises(ValueError, match="5 tokens were generated, 6 asked for"):
        conversation.answer([1] * 5)
