"""Ask: answer a question inside a frozen window, on its own KV, and store nothing.

The question follows the window's transcript under the window's salt, so the engine computes only the tail and the
question. It is not a turn: there is no session, the window does not change, and the cache is told to store nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway.dialects import text_transcripts
from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.records import Message, Usage, Window
from gateway.store.types import Saved, Text
from gateway.windows.at_turn import held_at
from gateway.windows.catalog import get_usable_window, served_model
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.placement import place
from gateway.windows.restore import Receipt, restore_and_load
from gateway.windows.savings import book

MAX_QUESTION = 10_000  # characters
MAX_TOKENS = 4096  # of an answer
DEFAULT_TOKENS = 512
_NO_RESULT = "No result: the conversation was frozen before there was one."


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer and its cost: `computed_tokens` is the part of the prompt that no cache had."""

    window: Window
    text: str
    reasoning: str | None
    finish_reason: str | None
    usage: Usage
    restored: Receipt
    duration_ms: float
    saved: Saved | None = None

    @property
    def computed_tokens(self) -> int | None:
        """None if the engine does not report cached tokens."""
        return None if self.usage.cached is None else self.usage.prompt - self.usage.cached


@instrumented
async def ask(
    ctx: OperationContext, name: str, question: str, max_tokens: int | None = None, at_turn: int | None = None
) -> Answer:
    """Ask a window a question, greedily, as it is or as it was at a turn. Raises `window_not_found`, `model_mismatch`,
    `invalid_request` if the window is not a conversation, has no such turn or no room left, `engine_unreachable`,
    `engine_timeout`.

    KV that is lost raises nothing: the engine computes it again, and the receipt says so.
    """
    services = ctx.services
    window = await get_usable_window(services, ctx.tenant, name)
    model = await served_model(services, window)
    window, manifest = await held_at(ctx, window, model, at_turn)
    max_tokens = _max_tokens(window, model, max_tokens)
    text = await conversation(services, window)
    placement = place(services, window.lineage, model=model.id, tokens=window.token_count)
    restored = replace(await restore_and_load(ctx, window, manifest, placement.cache), at_turn=at_turn)
    engine = services.engines.for_lineage(window.lineage, placement.engine)
    messages = [*text.messages, *following(text.messages, question)]
    with ctx.step("answer"):
        reply = await engine.chat(model.id, _no_tools(text.frame or {}), messages, window.salt, max_tokens=max_tokens)
    took = ctx.duration_ms()
    saved = await book(services, "ask", window, model, reply.usage, at=placement.engine)
    return Answer(window, reply.text, reply.reasoning, reply.finish_reason, reply.usage, restored, took, saved)


def _max_tokens(window: Window, model: Model, max_tokens: int | None) -> int:
    """How long the answer may be. Raises `invalid_request` if the window does not leave that much room."""
    left = model.context_limit - window.token_count if model.context_limit else MAX_TOKENS
    if left <= (max_tokens or 0):
        raise GatewayError(
            "invalid_request",
            f"window {window.name!r} has {window.token_count} of {model.context_limit} tokens: "
            f"no room for a question and {max_tokens or 'any'} tokens of answer",
            hint=f"`max_tokens` below {left} leaves room for a question" if left > 1 else "ask one of its ancestors",
            details={"field": "max_tokens"},
        )
    # At most half of what is left: the question needs some of it too.
    return max_tokens or min(DEFAULT_TOKENS, max(left // 2, 1))


async def conversation(services: Services, window: Window) -> Text:
    """Return a window's text. Raises `invalid_request` if no user message can follow it."""
    text = await services.store.text(window)
    if kind := text_transcripts.kind(text.messages):
        raise GatewayError(
            "invalid_request",
            f"window {window.name!r} holds {text_transcripts.NAMES[kind]}, not a conversation, and cannot be asked",
            hint="thaw it, and continue it at /v1/completions",
        )
    return text


def following(messages: Sequence[Message], question: str) -> list[Message]:
    """The question as the next messages. An agent freezes itself by a tool call, so the last may lack a result."""
    calls = (messages[-1].get("tool_calls") if messages else None) or ()
    results = [{"role": "tool", "tool_call_id": call.get("id", ""), "content": _NO_RESULT} for call in calls]
    return [*results, {"role": "user", "content": question}]


def _no_tools(frame: Mapping[str, Any]) -> dict[str, Any]:
    """The frame with its tools, because the KV has them; but none may be called, because nobody would run it."""
    return {**frame, "tool_choice": "none"} if frame.get("tools") else dict(frame)
