"""Requests as clients send them: one of each kind that SGLang's HTTP servers know.

Each has a name, so that a difference can be told; greedy, so that answers are comparable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

GENERATE = "/generate"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
MODEL = "tiny"
TEXT = "The quick brown fox jumps over the lazy dog while the band plays on. " * 3
OTHER_TEXT = "A second prompt, which has little to do with the first one at all. " * 2
IDS = [index * 7 % 250 for index in range(70)]
OTHER_IDS = [index * 11 % 250 for index in range(45)]
TOKENS = 8
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
TOOL_SCHEMA = {"name": "look_up", "description": "Finds somebody.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": TOOL_SCHEMA}


class Case(NamedTuple):
    name: str
    path: str
    body: dict[str, Any]


def generating() -> list[Case]:
    """Everything that makes tokens, and what is wrong about such requests."""
    return [*_generate(), *_completions(), *_chat(), *_messages(), *_responses()]


def ending() -> list[Case]:
    """A single server ends at these, or nobody answers: what counts is that a cluster refuses them and lives."""
    sampling = {"temperature": 0, "max_new_tokens": TOKENS}
    return [
        Case("an id beyond the vocabulary", GENERATE, {"input_ids": [1, 10**7], "sampling_params": sampling}),
        Case(
            "more top log-probabilities than fit",
            GENERATE,
            {"text": TEXT, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 129},
        ),
        Case("more logprobs than fit", COMPLETIONS, {"model": MODEL, "prompt": TEXT, "logprobs": 200}),
    ]


def _both(name: str, path: str, body: dict[str, Any]) -> Iterator[Case]:
    yield Case(name, path, body)
    yield Case(f"{name}, stream", path, body | {"stream": True})


def _generate() -> Iterator[Case]:
    def plain(sampling: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        prompt = {} if "input_ids" in fields else {"text": TEXT}
        return prompt | {"sampling_params": greedy | (sampling or {})} | fields

    texts, ids = [TEXT, OTHER_TEXT], [IDS, OTHER_IDS]
    asked = {
        "text": plain(),
        "input_ids": plain(input_ids=IDS),
        "batch": plain(text=texts),
        "batch of ids": plain(input_ids=ids),
        "batch with parameters each": plain() | {"text": texts, "sampling_params": [
            {"temperature": 0, "max_new_tokens": 3}, {"temperature": 0, "max_new_tokens": 5}]},
        "n": plain({"n": 3}),
        "n of ids": plain({"n": 2}, input_ids=IDS),
        "n of a batch": plain({"n": 2}, text=texts),
        "n with names": plain({"n": 2}, text=texts, rid=["case-n-a", "case-n-b"]),
        "n with log-probabilities": plain({"n": 2}, return_logprob=True, logprob_start_len=0),
        "log-probabilities": plain(return_logprob=True),
        "the prompt's log-probabilities": plain(return_logprob=True, logprob_start_len=0),
        "a part of the prompt's log-probabilities": plain(return_logprob=True, logprob_start_len=20),
        "top log-probabilities": plain(return_logprob=True, logprob_start_len=0, top_logprobs_num=3),
        "log-probabilities of ids": plain(return_logprob=True, logprob_start_len=0, token_ids_logprob=[5, 7]),
        "log-probabilities of a batch": plain(text=texts, return_logprob=True, logprob_start_len=0),
        "log-probabilities, one of two": plain(text=texts, return_logprob=[True, False], logprob_start_len=[0, -1]),
        "top log-probabilities of a batch": plain(
            text=texts, return_logprob=True, logprob_start_len=0, top_logprobs_num=[1, 2]),
        "log-probabilities with text": plain(return_logprob=True, return_text_in_logprobs=True),
        "ids of the prompt": plain(return_prompt_token_ids=True),
        "stop": plain({"stop": ["e", "a"], "max_new_tokens": 30, "ignore_eos": False}),
        "stop tokens": plain({"stop_token_ids": list(range(40)), "max_new_tokens": 30, "ignore_eos": False}),
        "one token": plain({"max_new_tokens": 1}),
        "penalties": plain({"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1}),
        "logit_bias": plain({"logit_bias": {"65": 50.0}}),
        "min_new_tokens": plain({"min_new_tokens": 4, "ignore_eos": False}),
        "regex": plain({"regex": "[a-z]{3}[0-9]{2}", "ignore_eos": False}),
        "json_schema": plain({"regex": None, "json_schema": '{"type": "boolean"}', "ignore_eos": False}),
        "the fields of bench_multiturn": plain(lora_path="", return_logprob=False, logprob_start_len=-1),
        "the fields of bench_serving": plain(lora_path="", return_logprob=False, return_routed_experts=False,
                                             logprob_start_len=-1, image_data=None),
        "routed experts": plain(return_routed_experts=True),
        "entropy": plain(return_entropy=True),
        "a rid": plain(rid="case-rid"),
        "a salt": plain(cache_salt="case"),
        "an extra key": plain(extra_key="case"),
        "a priority": plain(priority=1),
        # What is wrong.
        "no prompt": {"sampling_params": {"max_new_tokens": 2}},
        "text and ids": plain(input_ids=IDS) | {"text": TEXT},
        "empty ids": plain(input_ids=[]),
        "a negative limit": plain({"max_new_tokens": -1}),
        "no such parameter": plain({"no_such_parameter": 1}),
        "a bad regex": plain({"regex": "[", "ignore_eos": False}),
        "two grammars": plain({"regex": "a", "json_schema": "{}"}),
        "hidden states": plain(return_hidden_states=True),
        "a logit processor": plain(custom_logit_processor="x"),
        "no such adapter": plain(lora_path="nowhere"),
        "a temperature below nothing": plain({"temperature": -1}),
        "top_p beyond one": plain({"top_p": 2}),
    }  # fmt: skip
    for name, body in asked.items():
        yield from _both(f"generate: {name}", GENERATE, body)


def _completions() -> Iterator[Case]:
    def plain(**fields: Any) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": TEXT,
            "temperature": 0,
            "max_tokens": TOKENS,
            "ignore_eos": True,
        } | fields

    asked = {
        "text": plain(),
        "ids": plain(prompt=IDS),
        "batch": plain(prompt=[TEXT, OTHER_TEXT]),
        "batch of ids": plain(prompt=[IDS, OTHER_IDS]),
        "echo": plain(echo=True),
        "logprobs": plain(logprobs=2),
        "no logprobs": plain(logprobs=0),
        "echo and logprobs": plain(echo=True, logprobs=2),
        "echo and logprobs of ids": plain(prompt=IDS, echo=True, logprobs=1),
        "echo and logprobs of a batch": plain(prompt=[TEXT, OTHER_TEXT], echo=True, logprobs=1),
        "n": plain(n=2),
        "n of a batch": plain(n=2, prompt=[TEXT, OTHER_TEXT]),
        "n, echo and logprobs": plain(n=2, echo=True, logprobs=1),
        "best_of": plain(best_of=2),
        "stop": plain(stop=["e", "a"], max_tokens=30, ignore_eos=False),
        "suffix": plain(suffix="end"),
        "seed and user": plain(seed=3, user="ada"),
        "schema": plain(response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}},
                        ignore_eos=False, max_tokens=40),
        "ids told": plain(return_token_ids=True),
        "usage": plain(stream_options={"include_usage": True}),
        "usage all the time": plain(stream_options={"include_usage": True, "continuous_usage_stats": True}),
        "empty": plain(prompt=""),
        "no prompt": {"model": MODEL},
        "nothing to make": plain(max_tokens=0),
    }  # fmt: skip
    for name, body in asked.items():
        yield from _both(f"completions: {name}", COMPLETIONS, body)


def _chat() -> Iterator[Case]:
    def plain(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
        said = list(messages) or [{"role": "user", "content": TEXT}]
        limits = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        return {"model": MODEL, "messages": said} | limits | fields

    user = {"role": "user", "content": TEXT}
    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"age": 3}'}}
    asked = {
        "text": plain(),
        "system": plain({"role": "system", "content": "Be brief."}, user),
        "parts": plain({"role": "user", "content": [{"type": "text", "text": TEXT}]}),
        "turns": plain(user, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}),
        "a tool's answer": plain(user, {"role": "assistant", "content": "", "tool_calls": [call]},
                                 {"role": "tool", "tool_call_id": "call_1", "content": "Ada"}, tools=[TOOL]),
        "n": plain(n=3),
        "n and logprobs": plain(n=2, logprobs=True, top_logprobs=2),
        "logprobs": plain(logprobs=True),
        "top logprobs": plain(logprobs=True, top_logprobs=3),
        "usage": plain(stream_options={"include_usage": True}),
        "usage all the time": plain(stream_options={"include_usage": True, "continuous_usage_stats": True}),
        "n and usage": plain(n=2, stream_options={"include_usage": True}),
        "tools": plain(tools=[TOOL]),
        "no tool": plain(tools=[TOOL], tool_choice="none"),
        "a tool required": plain(tools=[TOOL], tool_choice="required", ignore_eos=False, max_tokens=60),
        "this tool": plain(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "look_up"}},
                           ignore_eos=False, max_tokens=60),
        "schema": plain(response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}},
                        ignore_eos=False, max_tokens=40),
        "any JSON": plain(response_format={"type": "json_object"}, ignore_eos=False, max_tokens=30),
        "stop": plain(stop=["e", "a"], max_tokens=30, ignore_eos=False),
        "max_completion_tokens": plain(max_completion_tokens=3),
        "ids told": plain(return_token_ids=True),
        "seed and user": plain(seed=3, user="ada"),
        "an answer begun": plain(user, {"role": "assistant", "content": "It"}, continue_final_message=True),
        "no messages": plain(messages=[]),
        "no such role": plain({"role": "nobody", "content": "x"}),
        "too many logprobs": plain(top_logprobs=3),
        "no such tool": plain(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "nothing"}}),
    }  # fmt: skip
    for name, body in asked.items():
        yield from _both(f"chat: {name}", CHAT, body)


def _messages() -> Iterator[Case]:
    def plain(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
        said = list(messages) or [{"role": "user", "content": TEXT}]
        return {"model": MODEL, "messages": said, "temperature": 0, "max_tokens": TOKENS} | fields

    tool = {"name": "look_up", "description": "Finds somebody.", "input_schema": SCHEMA}
    use = {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"age": 3}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Ada"}]}
    asked = {
        "text": plain(),
        "system": plain(system="Be brief."),
        "system in parts": plain(system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]),
        "parts": plain({"role": "user", "content": [{"type": "text", "text": TEXT}]}),
        "tools": plain(tools=[tool]),
        "a tool's answer": plain({"role": "user", "content": TEXT}, {"role": "assistant", "content": [use]},
                                 {"role": "user", "content": [result]}, tools=[tool]),
        "any tool": plain(tools=[tool], tool_choice={"type": "any"}, max_tokens=60),
        "stop": plain(stop_sequences=["e", "a"], max_tokens=30),
        "metadata": plain(metadata={"user_id": "ada"}),
        "no limit": {"model": MODEL, "messages": [{"role": "user", "content": TEXT}]},
        "no messages": plain(messages=[]),
        "nothing to make": plain(max_tokens=0),
    }  # fmt: skip
    for name, body in asked.items():
        yield from _both(f"messages: {name}", MESSAGES, body)


def _responses() -> Iterator[Case]:
    def plain(**fields: Any) -> dict[str, Any]:
        return {"model": MODEL, "input": TEXT, "temperature": 0, "max_output_tokens": TOKENS} | fields

    tool = {"type": "function"} | TOOL_SCHEMA
    asked = {
        "text": plain(),
        "instructions": plain(instructions="Be brief."),
        "items": plain(input=[{"role": "user", "content": TEXT}]),
        "parts": plain(input=[{"role": "user", "content": [{"type": "input_text", "text": TEXT}]}]),
        "tools": plain(tools=[tool]),
        "not kept": plain(store=False),
        "schema": plain(text={"format": {"type": "json_schema", "name": "p", "schema": SCHEMA}}, max_output_tokens=40),
        "no input": {"model": MODEL},
    }  # fmt: skip
    for name, body in asked.items():
        yield from _both(f"responses: {name}", RESPONSES, body)


def others() -> list[Case]:
    """Paths that make no tokens, and are answered all the same."""
    return [
        Case("tokenize", "/v1/tokenize", {"model": MODEL, "prompt": TEXT}),
        Case("tokenize, short", "/tokenize", {"model": MODEL, "prompt": TEXT}),
        Case("detokenize", "/v1/detokenize", {"model": MODEL, "tokens": IDS[:9]}),
        Case(
            "count tokens",
            "/v1/messages/count_tokens",
            {"model": MODEL, "messages": [{"role": "user", "content": TEXT}]},
        ),
        Case(
            "parse a call", "/parse_function_call", {"text": "x", "tools": [], "tool_call_parser": "qwen25"}
        ),
        Case("separate", "/separate_reasoning", {"text": "<think>a</think>b", "reasoning_parser": "qwen3"}),
    ]
