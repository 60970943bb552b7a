"""The token ids with which a conversation's next turn will begin.

Not the ids that were sampled: a reply rarely tokenises back to itself, and a template may drop an earlier turn's
reasoning. So the engine renders the transcript with the reply, and what it renders is checked against a next turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.dialects import text_transcripts
from gateway.engines.client import EngineClient
from gateway.records import Message

# Two beginnings of a next message that share no first token, whatever the tokeniser.
_PROBES = ("a", "#")
# What may follow a text and become one token with its end: a letter, a digit, a sign, a space, a line.
_ENDS = ("a", "1", "#", " ", "\n")


async def next_turn_ids(
    engine: EngineClient, model: str, frame: Mapping[str, Any], messages: Sequence[Message]
) -> list[int]:
    """Return the ids that every next turn shares. Raises what `HttpEngineClient.render` raises."""
    if text_transcripts.kind(messages):
        return await _ids_of_text(engine, model, frame, messages)
    ids = await engine.render(model, frame, messages)
    first = await engine.render(model, frame, [*messages, _next(messages[-1], _PROBES[0])])
    if first[: len(ids)] == ids:
        return ids
    # The template writes the last reply differently once there is a message behind it: what two next turns share is
    # safe.
    second = await engine.render(model, frame, [*messages, _next(messages[-1], _PROBES[1])])
    return first[: text_transcripts.shared(first, second)]


async def _ids_of_text(
    engine: EngineClient, model: str, frame: Mapping[str, Any], conversation: Sequence[Message]
) -> list[int]:
    """The ids of a text that goes on, or those that are given; see `gateway.dialects.text_transcripts`."""
    *before, last = conversation
    if last["role"] == text_transcripts.TOKENS:
        return list(last["content"])
    if before:  # a reply to token ids, whose own ids will be sent in front of what is new
        return [*before[0]["content"], *await engine.tokenize(model, last["content"], special=False)]
    special = frame.get("add_special_tokens", True)
    ids = await engine.tokenize(model, last["content"], special=special)
    for end in _ENDS:
        ids = ids[: text_transcripts.shared(ids, await engine.tokenize(model, last["content"] + end, special=special))]
    return ids


def _next(last: Message, text: str) -> Message:
    """A message that may follow: a tool's result if tools were called, else the user's."""
    calls = last.get("tool_calls")
    if calls:
        return {"role": "tool", "tool_call_id": calls[0].get("id", ""), "content": text}
    return {"role": "user", "content": text}
