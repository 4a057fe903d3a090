"""How an agent's turns become HTTP requests, and streamed events its answers.

Token ids go to SGLang's `/generate`, whose events each hold all `output_ids` so far.  Full text goes to
`/v1/chat/completions`: the server's chat template makes the prompt of it, every event holds a piece of
the text, and the last one counts tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from dualpath_sgl.evals.agents.chat import ChatPlan, ChatWorkload, opening
from dualpath_sgl.evals.agents.conversation import Conversation
from dualpath_sgl.evals.agents.workload import Workload

Answer = list[int] | str


class Question(NamedTuple):
    """One request, ready to be sent."""

    body: dict[str, Any]
    prompt_tokens: int
    """Of a chat: estimated, the server's template is not known here."""
    output_tokens: int
    hit_tokens: int
    """Prompt tokens, in whole pages, whose KV an infinite cache of this session holds."""


class Reply(Protocol):
    """An answer that arrives."""

    @property
    def answer(self) -> Answer: ...

    @property
    def arrived(self) -> int:
        """Tokens so far; of a chat, pieces of text."""

    @property
    def output_tokens(self) -> int: ...

    @property
    def prompt_tokens(self) -> int | None:
        """As the server counts; None: it does not say."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens the server did not compute."""

    @property
    def finish_reason(self) -> Any: ...

    def take(self, event: dict[str, Any]) -> None: ...


class Talk(Protocol):
    """One agent's session: `ask` and `answered` alternate."""

    @property
    def path(self) -> str: ...

    @property
    def id(self) -> str: ...

    @property
    def turns(self) -> int: ...

    def think_s(self, turn: int) -> float: ...

    def ask(self) -> Question: ...

    def reply(self) -> Reply: ...

    def answered(self, reply: Any) -> None: ...


def talks(workload: Workload | ChatWorkload, vocab_size: int, seed: int) -> Sequence[Talk]:
    """The agents of a workload; `seed` draws what is random in their prompts, from `vocab_size` tokens where they
    talk in ids."""
    if isinstance(workload, ChatWorkload):
        return [ChatTalk(plan, workload.page_size, seed) for plan in workload.sessions]
    return [TokenTalk(Conversation(plan, vocab_size, seed), workload.page_size) for plan in workload.sessions]


class TokenReply:
    def __init__(self) -> None:
        self.answer: list[int] = []
        self.prompt_tokens = None
        self._meta: dict[str, Any] = {}

    def take(self, event: dict[str, Any]) -> None:
        self.answer = event["output_ids"]
        self._meta = event.get("meta_info", {})

    @property
    def arrived(self) -> int:
        return len(self.answer)

    @property
    def output_tokens(self) -> int:
        return len(self.answer)

    @property
    def cached_tokens(self) -> int:
        return int(self._meta.get("cached_tokens", 0))

    @property
    def finish_reason(self) -> Any:
        return self._meta.get("finish_reason")


class TokenTalk:
    path = "/generate"

    def __init__(self, conversation: Conversation, page_size: int) -> None:
        self._conversation = conversation
        self._page_size = page_size
        self._asked = 0

    @property
    def id(self) -> str:
        return self._conversation.plan.id

    @property
    def turns(self) -> int:
        return len(self._conversation.plan.turns)

    def think_s(self, turn: int) -> float:
        return self._conversation.plan.turns[turn].think_s

    def ask(self) -> Question:
        turn = self._conversation.plan.turns[self._asked]
        self._asked += 1
        sampling = {"temperature": 0.0, "max_new_tokens": turn.output_tokens, "ignore_eos": True}
        body = {"input_ids": self._conversation.prompt(), "sampling_params": sampling, "stream": True}
        return Question(body, turn.prompt_tokens, turn.output_tokens, turn.hit_tokens(self._page_size))

    def reply(self) -> TokenReply:
        return TokenReply()

    def answered(self, reply: TokenReply) -> None:
        self._conversation.answer(reply.answer)


class ChatReply:
    def __init__(self) -> None:
        self.answer = ""
        self.arrived = 0
        self.output_tokens = 0
        self.prompt_tokens: int | None = None
        self.cached_tokens = 0
        self.finish_reason: Any = None

    def take(self, event: dict[str, Any]) -> None:
        for choice in event.get("choices", ()):
            if piece := choice.get("delta", {}).get("content"):
                self.answer += piece
                self.arrived += 1
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if usage := event.get("usage"):
            self.output_tokens = usage["completion_tokens"]
            self.prompt_tokens = usage["prompt_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


class ChatTalk:
    path = "/v1/chat/completions"

    def __init__(self, plan: ChatPlan, page_size: int, seed: int) -> None:
        self._plan = plan
        self._page_size = page_size
        self._opening = opening(plan.id, seed, page_size)
        self._messages: list[dict[str, str]] = []
        self._asked = 0
        self._known_tokens = 0

    @property
    def id(self) -> str:
        return self._plan.id

    @property
    def turns(self) -> int:
        return len(self._plan.turns)

    def think_s(self, turn: int) -> float:
        return self._plan.turns[turn].think_s

    def ask(self) -> Question:
        turn = self._plan.turns[self._asked]
        self._asked += 1
        text = turn.text
        if not turn.continues:
            self._messages, self._known_tokens = [], 0
            text = self._opening + text
        self._messages.append({"role": "user", "content": text})
        body = {
            "model": "default",
            "messages": list(self._messages),
            "temperature": 0.0,
            "max_tokens": turn.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        hit_tokens = self._known_tokens // self._page_size * self._page_size
        return Question(body, turn.prompt_tokens, turn.output_tokens, hit_tokens)

    def reply(self) -> ChatReply:
        return ChatReply()

    def answered(self, reply: ChatReply) -> None:
        self._messages.append({"role": "assistant", "content": reply.answer})
        # The last generated token's KV is computed only by a turn that follows it.
        self._known_tokens = (reply.prompt_tokens or 0) + reply.output_tokens - 1
