"""What an engine of a pair takes from clients, whatever router stands before it.

**Several samples of one prompt (`n`).**  SGLang sends one request for all samples of a prompt, which computes
it, and then one for each, all in the room of the first.  Between two engines only one pair of requests can meet
in a room: the others wait for ever.  Here a request for samples becomes an ordinary batch before SGLang looks
at it: every sample is a prompt of its own, with a room of its own.  Both engines do the same, so they agree on
the rooms without a word.

**What would end an engine** is refused with a ValueError, which SGLang makes an HTTP 400.  Both engines of a pair
would end: what one server survives after a restart costs a whole cluster two.

**What a decode engine could never take in** is refused at once.  SGLang keeps some tokens free beside every
request (`--num-reserved-decode-tokens`): a prompt that fits its memory only without them waits until the
bootstrap time-out.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

ROOMS = 1 << 63
"""Rooms are not negative and have 63 bits."""
MOST_TOP_LOGPROBS = 128
"""What a prefill engine can hand over beside a first token (SGLang's disaggregation/utils.py,
MetadataBuffers)."""


def after_normalize(_result: None, request: GenerateReqInput) -> None:
    """SGLang has made every field a list by now: all prompts, then all prompts again for the next sample."""
    samples = request.parallel_sample_num
    if request.is_single or samples == 1 or None in request.bootstrap_room:
        return
    prompts = request.batch_size
    if len(request.rid) == prompts:  # given by the client: one for each prompt
        request.rid = [f"{rid}_{sample}" for sample in range(samples) for rid in request.rid]
    request.sampling_params = [{**parameters, "n": 1} for parameters in request.sampling_params]
    request.bootstrap_room = _rooms(request.bootstrap_room, prompts)
    # An answer lists all samples of the first prompt before those of the second.
    in_order = [request[sample * prompts + prompt] for prompt in range(prompts) for sample in range(samples)]
    request.__dict__["_sub_obj_cache"] = dict(enumerate(in_order))
    for name in ("rid", "bootstrap_room", "text", "input_ids"):
        if getattr(request, name) is not None:
            setattr(request, name, [getattr(one, name) for one in in_order])
    request.batch_size = prompts * samples
    request.parallel_sample_num = 1


def _rooms(given: list[int], prompts: int) -> list[int]:
    """A router that gives every prompt its room gives it for all samples; one that gives the first prompt's
    leaves the rest to SGLang, which counts on."""
    if len(set(given)) == len(given):
        return given
    return [(room + index // prompts) % ROOMS for index, room in enumerate(given)]


def before_validate(manager: Any, request: Any, _input_ids: list[int] | None) -> None:
    """Raises ValueError.  `request`: one prompt, of any kind."""
    if getattr(request, "bootstrap_room", None) is None:
        return
    wanted = getattr(request, "top_logprobs_num", None) or 0
    vocabulary = manager.model_config.vocab_size
    most = min(MOST_TOP_LOGPROBS, vocabulary)
    if wanted > most:
        raise ValueError(
            f"{wanted} top log-probabilities: between a prefill and a decode engine at most {most} are possible"
        )
    if ids := request.input_ids:
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < vocabulary:
                raise ValueError(f"token id {token_id}: the model knows 0 to {vocabulary - 1}")


def after_capacity_check(is_refused: bool, queue: Any, req: Req) -> bool | None:
    """On a DE's scheduler thread, before a request is queued.  None: as SGLang has decided."""
    if is_refused or req.output_ids or queue._uses_swa_tail_prealloc() or queue.scheduler.enable_hisparse:
        return None
    length, page_size = len(req.origin_input_ids), queue.token_to_kv_pool_allocator.page_size
    reserved, capacity = queue.num_reserved_decode_tokens, queue.max_total_num_tokens
    if -(-length // page_size) * page_size + reserved <= capacity:
        return None
    from sglang.srt.disaggregation.utils import prepare_abort

    message = (
        f"the prompt has {length} tokens: the decode engine's memory has {capacity}, of which {reserved} stay "
        "free beside a prompt; shorten it, or lower --num-reserved-decode-tokens"
    )
    prepare_abort(req, message, status_code=HTTPStatus.BAD_REQUEST)
    queue.scheduler.output_streamer.stream_output([req], req.return_logprob)
    return True


_MANAGERS = "sglang.srt.managers."
_QUEUE = "sglang.srt.disaggregation.decode.DecodePreallocQueue."
HOOKS = (
    (_MANAGERS + "io_struct.GenerateReqInput.normalize_batch_and_arguments", after_normalize, "after"),
    (_MANAGERS + "tokenizer_manager.TokenizerManager._validate_one_request", before_validate, "before"),
    (_QUEUE + "_check_if_req_exceed_kv_capacity", after_capacity_check, "after"),
)
"""What the first two raise is for the client: nobody else hears of it."""


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in HOOKS:
        HookRegistry.register(target, hook, HookType(kind))
