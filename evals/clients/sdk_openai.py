"""`python sdk_openai.py URL TOPIC`: asks with OpenAI's package; prints a JSON object of what was answered.

Topics: `chat` (completions too), `echo` (a completion with its prompt's log-probabilities), `responses`.  Needs
nothing but that package.  An exception, as a client would see it, ends the program.
"""

import json
import sys
from typing import Any

from openai import APIStatusError, OpenAI

TEXT = "The quick brown fox jumps over the lazy dog while the band plays on. " * 3
TOOL_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


def chat(client: OpenAI, model: str) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": TEXT}]}

    def ask(**fields):
        return client.chat.completions.create(**asked | SHORT | fields)

    told: dict[str, Any] = {"chat": ask().choices[0].message.content}
    told["several"] = [choice.message.content for choice in ask(n=3).choices]
    pieces = list(ask(stream=True, stream_options={"include_usage": True}))
    told["stream"] = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    told["usage"] = pieces[-1].usage.completion_tokens
    probabilities = ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    told["logprobs"] = [[one.token, [top.token for top in one.top_logprobs]] for one in probabilities]
    tool = {"type": "function", "function": {"name": "look_up", "parameters": TOOL_SCHEMA}}
    forced = ask(tools=[tool], tool_choice="required", max_tokens=60).choices[0].message
    told["tool"] = [forced.content, [call.function.arguments for call in forced.tool_calls or ()]]
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": TOOL_SCHEMA}}
    told["schema"] = ask(response_format=schema, max_tokens=60).choices[0].message.content
    batch = client.completions.create(model=model, prompt=[TEXT, "Another one. " * 9], n=2, **SHORT)
    told["completions"] = [choice.text for choice in batch.choices]
    try:
        ask(temperature=-1)
    except APIStatusError as error:
        told["refused"] = error.status_code // 100
    return told


def echo(client: OpenAI, model: str) -> dict[str, Any]:
    completion = client.completions.create(model=model, prompt=TEXT, echo=True, logprobs=1, **SHORT)
    (choice,) = completion.choices
    return {"text": choice.text, "tokens": choice.logprobs.tokens}


def responses(client: OpenAI, model: str) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": model, "input": TEXT, "temperature": 0, "max_output_tokens": 8}
    told = {"model": client.models.retrieve(model).id, "text": client.responses.create(**asked).output_text}
    events = client.responses.create(**asked, stream=True)
    told["stream"] = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    return told


def main(url: str, topic: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
    (model,) = client.models.list().data
    told = {"chat": chat, "echo": echo, "responses": responses}[topic](client, model.id)
    print(json.dumps({name: json.dumps(one) for name, one in told.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
