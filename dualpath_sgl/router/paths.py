"""Which of SGLang's addresses this router serves, and how.

    generates     both engines of a pair, one answer (route.py)
    any engine    what every engine answers alike
    every engine  done when all have done it
    refused       a 400 that says why

What stands nowhere here is not found (404).  SGLang's list: sglang/srt/entrypoints/http_server.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

GENERATES = (
    "/generate",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/responses",
    "/invocations",
)
"""On each of them SGLang takes room and bootstrap from the body."""
ANY_ENGINE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "GET": ("/v1/models", "/v1/models/{model:.+}", "/model_info", "/get_model_info"),
        "POST": (
            *("/v1/tokenize", "/tokenize", "/v1/detokenize", "/detokenize"),
            *("/v1/messages/count_tokens", "/parse_function_call", "/separate_reasoning"),
        ),
    }
)
EVERY_ENGINE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "GET": ("/health_generate",),
        "POST": (
            *("/flush_cache", "/abort_request", "/pause_generation", "/continue_generation"),
            *("/start_profile", "/stop_profile"),
        ),
    }
)
_NOTHING_GENERATED = "prefill and decode engines only generate together: ask a server that runs alone"
_NO_ROOM = (
    "SGLang's engines cannot be told on this path that two of them work together: "
    "use /v1/chat/completions, /v1/completions or /generate"
)
_NOT_KEPT = "responses are not kept: send the whole conversation each time"
_EACH_ITSELF = "send it to each engine; GET /readiness lists them"
_NO_SESSIONS = "engines keep such sessions to themselves: name a session in the header X-Session-Id instead"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *("/v1/embeddings", "/v1/classify", "/classify", "/v1/rerank", "/v1/score", "/v1/decisions"),
                *("/v1/systemone", "/encode", "/v1/audio/transcriptions"),
            ),
            _NOTHING_GENERATED,
        ),
        **dict.fromkeys(
            ("/api/chat", "/api/generate", "/api/tags", "/api/show", "/vertex_generate"), _NO_ROOM
        ),
        **dict.fromkeys(("/v1/responses/{id}", "/v1/responses/{id}/cancel"), _NOT_KEPT),
        **dict.fromkeys(("/open_session", "/close_session"), _NO_SESSIONS),
        **dict.fromkeys(
            (
                *("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_ipc"),
                *("/update_weights_from_distributed", "/update_weight_version", "/begin_weight_update"),
                *("/end_weight_update", "/init_weights_update_group", "/destroy_weights_update_group"),
                *("/get_weights_by_name", "/weights_checker", "/release_memory_occupation"),
                *("/resume_memory_occupation", "/load_lora_adapter", "/load_lora_adapter_from_tensors"),
                *("/unload_lora_adapter", "/set_internal_state", "/configure_logging", "/pd_role_switch"),
                *("/hicache/storage-backend", "/hicache/storage-backend/clear", "/freeze_gc", "/slow_down"),
                *("/set_trace_level", "/v1/loads", "/get_load"),
            ),
            _EACH_ITSELF,
        ),
    }
)
"""Path -> why."""


def each(table: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Method and path."""
    return ((method, path) for method, paths in table.items() for path in paths)
