"""`python sdk_anthropic.py URL`: asks with Anthropic's package, as coding agents do; prints what was answered.

Needs nothing but that package.  An exception, as a client would see it, ends the program.
"""

import json
import sys
from typing import Any

from anthropic import Anthropic, APIStatusError

TEXT = "The quick brown fox jumps over the lazy dog while the band plays on. " * 3
TOOL: Any = {
    "name": "look_up",
    "description": "Finds somebody.",
    "input_schema": {"type": "object", "properties": {}},
}


def main(url: str) -> None:
    client = Anthropic(base_url=url, api_key="none", timeout=60, max_retries=0)
    model = client.models.list().data[0].id
    user: Any = {"role": "user", "content": TEXT}
    asked: dict[str, Any] = {"model": model, "max_tokens": 8, "temperature": 0}
    told: dict[str, Any] = {}

    def texts(message):
        return [block.text for block in message.content if block.type == "text"]

    told["message"] = texts(client.messages.create(messages=[user], system="Be brief.", **asked))
    with client.messages.stream(messages=[user], **asked) as stream:
        told["stream"] = "".join(stream.text_stream)
        told["stop"] = stream.get_final_message().stop_reason
    told["tools"] = texts(client.messages.create(messages=[user], tools=[TOOL], **asked))
    use = {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Ada"}
    turns: Any = [user, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    told["tool's answer"] = texts(client.messages.create(messages=turns, tools=[TOOL], **asked))
    told["counted"] = client.messages.count_tokens(model=model, messages=[user]).input_tokens
    try:
        client.messages.create(messages=[user], model=model, max_tokens=0)
    except APIStatusError as error:
        told["refused"] = error.status_code // 100
    print(json.dumps({name: json.dumps(one) for name, one in told.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
