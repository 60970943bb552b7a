"""Ask a session, measure the answer, and say in words what two answers differ in."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.cli.admin_client import Admin
from gateway.windows.comparison import Comparison

_FEWEST = 4  # equal tokens before a tie
_LIKELIEST = 5


@dataclass(slots=True)
class Answer:
    """A greedy answer: its tokens, their log probabilities, the likeliest ones at each position, and what it took."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[Mapping[str, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    first_token_s: float = 0.0

    @property
    def ids(self) -> list[str]:
        """What two answers are compared by: a stream of chat has no token ids."""
        return self.tokens


def ask(admin: Admin, session: str, model: str, messages: list[dict[str, str]], max_tokens: int) -> Answer:
    """Send one greedy turn of a session and read its stream. Raises AdminError."""
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": _LIKELIEST, "stream": True, "stream_options": {"include_usage": True}}
    answer, started = Answer(), time.monotonic()
    for event in admin.stream(f"/s/{session}/v1/chat/completions", body):
        _read(answer, event)
        if answer.tokens and not answer.first_token_s:
            answer.first_token_s = time.monotonic() - started
    return answer


def _read(answer: Answer, event: Mapping[str, Any]) -> None:
    if usage := event.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens")
    for choice in event.get("choices") or ():
        answer.text += choice["delta"].get("content") or ""
        for token in (choice.get("logprobs") or {}).get("content") or ():
            answer.tokens.append(token["token"])
            answer.logprobs.append(token["logprob"])
            answer.likeliest.append({other["token"]: other["logprob"] for other in token["top_logprobs"]})


def difference(live: Answer, after: Answer, seen: Comparison) -> str:
    """What a comparison of two answers to the same question found wrong; "" if nothing."""
    if not live.tokens:
        return "has no log probabilities to compare"
    at = seen.tokens - 1
    if seen.verdict == "tie" and at < _FEWEST:
        return f"is equal only up to a tie at token {seen.tokens}, and so few tokens prove nothing"
    if seen.verdict != "different":
        return ""
    a, b = (answer.tokens[at] if at < len(answer.tokens) else None for answer in (live, after))
    if a != b:
        return f"differs from token {seen.tokens} on: {b!r}, not {a!r}"
    apart = abs(live.logprobs[at] - after.logprobs[at])
    return f"has another log probability at token {seen.tokens}: {apart:.3f} apart"
