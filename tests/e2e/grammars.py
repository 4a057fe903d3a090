"""Questions whose answers a grammar binds, and what an answer says."""

from __future__ import annotations

import json
import urllib.request

from tokenizers.pre_tokenizers import ByteLevel

ANSWERED_WITHIN_S = 120.0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{2,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
REGEX = r"[A-Z][a-z]{2,5}-[0-9]{3}"
EBNF = 'root ::= digit "+" digit "=" digit digit\ndigit ::= [0-9]'
SUM = r"[0-9]\+[0-9]=[0-9]{2}"
CHAT = "/v1/chat/completions"


def _no_blanks() -> dict[str, int]:
    """Forbids what JSON allows between any two tokens: a model of random weights would go on with it."""
    blanks = {"ĉ", "Ċ", "č", "Ġ"}  # as the byte tokenizer spells tab, new line, return, space
    return {str(token): -100 for token, byte in enumerate(sorted(ByteLevel.alphabet())) if byte in blanks}


def ask(url: str, path: str, body: dict) -> dict:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=ANSWERED_WITHIN_S) as answer:
        return json.load(answer)


def chat(text: str, **fields) -> dict:
    message = {"role": "user", "content": text}
    limits = {"temperature": 0, "max_tokens": 200, "logit_bias": _no_blanks()}
    return {"model": "tiny", "messages": [message]} | limits | fields


def questions() -> dict[str, tuple[str, dict]]:
    """Path and body of each; prompts are longer than a page."""
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    sampling = {"temperature": 0, "max_new_tokens": 200}
    return {
        "schema": (CHAT, chat("A person, please, as JSON of this schema. " * 4, response_format=schema)),
        "tool": (CHAT, chat("Look somebody up with the tool. " * 4, tools=[TOOL], tool_choice="required")),
        "regex": ("/generate", {"text": "A code: " * 20, "sampling_params": sampling | {"regex": REGEX}}),
        "ebnf": ("/generate", {"text": "A sum: " * 20, "sampling_params": sampling | {"ebnf": EBNF}}),
    }


def told(answer: dict) -> str:
    """What an answer says, without what differs from run to run."""
    if "text" in answer:
        return answer["text"]
    return answer["choices"][0]["message"]["content"]


def ask_all(url: str) -> dict[str, str]:
    return {name: told(ask(url, *question)) for name, question in questions().items()}
