"""What is refused before any engine sees it, because SGLang 0.5.23 would not answer it.

Some requests are wrong in a way that SGLang notices too late: the client waits without end, or the engine
that takes the request ends, and here two engines would.  What SGLang refuses by itself is left to it.

    odd numbers of samples    it counts them before it looks at them
    types SGLang passes on    its scheduler process ends when a message cannot be decoded (io_struct.py)
    custom_labels             ends the process that answers clients (tokenizer_manager.collect_metrics)
    negative token ids        the model's embedding has no such row
    kept responses            one engine of two has them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from dualpath_sgl.router.fleet.errors import BadRequest

ONE_PER_PROMPT = (
    *("return_logprob", "logprob_start_len", "top_logprobs_num", "return_sampling_mask"),
    *("sampling_logprobs_mode", "return_hidden_states", "lora_path", "lora_id", "custom_logit_processor"),
)
"""Fields that may be lists with a list of prompts, and only then."""
_KEPT = ("previous_response_id", "background")
NOT_OVER_HTTP = ("positional_embed_overrides", "token_indices_to_pool", "multi_item_delimiter_indices")
"""Fields of `/generate` for callers inside the engine's own process: SGLang checks none of them."""
MAX_SAMPLES = 128
"""As OpenAI's API has it: each is a request of its own between the engines."""
_SAMPLED = ("/v1/completions", "/v1/chat/completions", "/invocations")
"""Where sampling parameters stand in the body itself."""
_Scalar = bool | int | float | str | None
CUSTOM_PARAMS = dict[str, _Scalar | list[_Scalar] | dict[str, _Scalar]]


class _SessionParams(msgspec.Struct):
    """`SessionParams` of SGLang's io_struct.py."""

    id: str | None = None
    rid: str | None = None
    offset: int | None = None
    replace: bool | None = None
    drop_previous_output: bool | None = None


def check(path: str, body: Mapping[str, Any]) -> None:
    """Raises BadRequest naming the field, its value and the remedy."""
    prompts = _prompts(path, body)
    _check_token_ids(prompts)
    for parameters, name in _sampling_params(path, body):
        _check_type(parameters.get("custom_params"), CUSTOM_PARAMS, f"{name}custom_params")
    _check_type(body.get("session_params"), _SessionParams, "session_params")
    if not _is_batch(prompts):
        for name in ONE_PER_PROMPT:
            if isinstance(body.get(name), list):
                raise _refused(name, body[name], "there is one prompt, so give one value, not a list")
    if path == "/generate":
        _check_internals(body)
    if path == "/v1/responses":
        for name in _KEPT:
            if body.get(name):
                raise _refused(
                    name, body[name], "responses are not kept: leave it out and send the whole conversation"
                )


def _check_internals(body: Mapping[str, Any]) -> None:
    if body.get("custom_labels"):
        raise _refused(
            "custom_labels",
            body["custom_labels"],
            "an engine ends at a label it was not started with; send labels to /v1/completions or "
            "/v1/chat/completions in the header that --tokenizer-metrics-custom-labels-header names",
        )
    for name in NOT_OVER_HTTP:
        if body.get(name) is not None:
            raise _refused(name, body[name], "it is no part of a client's request: leave it out")


def samples(path: str, body: Mapping[str, Any]) -> int:
    """Answers that are wanted to each prompt.  Raises BadRequest."""
    found = 1
    for parameters, name in _sampling_params(path, body):
        number = parameters.get("n", 1)
        if number != 1 and not (isinstance(number, int) and 1 < number <= MAX_SAMPLES):
            raise _refused(
                f"{name}n", number, f"give a whole number from 1 to {MAX_SAMPLES}, or leave it out"
            )
        found = max(found, number)
    return found


def _prompts(path: str, body: Mapping[str, Any]) -> Any:
    """What SGLang takes for the prompt or prompts; None for messages."""
    names = {"/generate": ("text", "input_ids"), "/v1/completions": ("prompt",)}.get(path, ())
    return next((body[name] for name in names if body.get(name) is not None), None)


def _is_batch(prompts: Any) -> bool:
    return isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)


def _check_token_ids(prompts: Any) -> None:
    for ids in prompts if _is_batch(prompts) else [prompts]:
        # What is not all numbers SGLang refuses.
        with suppress(TypeError):
            if isinstance(ids, list) and ids and (least := min(ids)) < 0:
                raise _refused("a token id", least, "token ids begin at 0")


def _sampling_params(path: str, body: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """With the words that lead there; for all prompts, or one for each."""
    if path != "/generate":
        if path in _SAMPLED:
            yield body, ""
        return
    found = body.get("sampling_params")
    if isinstance(found, dict):
        yield found, "sampling_params."
    elif isinstance(found, list):
        for index, one in enumerate(found):
            if isinstance(one, dict):
                yield one, f"sampling_params[{index}]."


def _check_type(value: Any, wanted: Any, name: str) -> None:
    """Nothing (null) is always right."""
    if value is None:
        return
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise _refused(name, value, str(error)) from None


def _refused(name: str, value: Any, remedy: str) -> BadRequest:
    return BadRequest(f"{name} is {value!r:.100}: {remedy}")
