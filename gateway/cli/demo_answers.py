"""Ask a session and measure the answer, and compare two answers token for token."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from gateway.cli.admin_client import Admin

TOLERANCE = 0.1
"""Of a log probability. The last bits depend on how many tokens are computed in one go, and a thaw computes the tail
anew: 0.03 was measured in bfloat16. Deep verification allows as much (`gateway.windows.replay`)."""
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


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many tokens were compared, and the largest difference of a log probability; `difference` is "" if none.

    Tokens that both answers find equally likely (within `TOLERANCE`) may be chosen either way; what follows them is
    not compared.
    """

    tokens: int
    largest: float
    difference: str = ""


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


def compare(one: Answer, other: Answer) -> Comparison:
    """Compare an answer with a later one to the same question."""
    if not one.tokens:
        return Comparison(0, 0.0, "has no log probabilities to compare")
    largest = 0.0
    for position, (a, b) in enumerate(zip_longest(one.tokens, other.tokens)):
        if a != b:
            if _is_tie(one, other, position):
                return Comparison(position, largest)
            return Comparison(position, largest, f"differs from token {position + 1} on: {b!r}, not {a!r}")
        apart = abs(one.logprobs[position] - other.logprobs[position])
        largest = max(largest, apart)
        if apart > TOLERANCE:
            return Comparison(
                position + 1, largest, f"has another log probability at token {position + 1}: {apart:.3f} apart"
            )
    return Comparison(len(one.tokens), largest)


def _is_tie(one: Answer, other: Answer, position: int) -> bool:
    if position >= min(len(one.tokens), len(other.tokens)):
        return False
    a, b = one.tokens[position], other.tokens[position]
    likeliest = (one.likeliest[position], other.likeliest[position])
    return all(a in top and b in top and abs(top[a] - top[b]) <= TOLERANCE for top in likeliest)
