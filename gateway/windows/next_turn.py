"""The token ids with which a conversation's next turn will begin.

Not the ids that were sampled: a reply rarely tokenizes back to itself, and a template may drop an earlier turn's
reasoning. So the engine renders the transcript with the reply, and the result is compared with that of a next turn.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from gateway.dialects import text_transcripts
from gateway.engines.client import EngineClient
from gateway.records import Message

# Two next messages that share no first token, whatever the tokenizer.
_PROBES = ("a", "#")
# What may follow a text and merge into one token with its end: a letter, a digit, a sign, a space, a line.
_SUFFIXES = ("a", "1", "#", " ", "\n")


async def next_turn_ids(
    engine: EngineClient, model: str, frame: Mapping[str, Any], messages: Sequence[Message], *, any_length: bool = False
) -> list[int]:
    """Return the ids that every next turn shares. Raises what `HttpEngineClient.render` raises.

    With `any_length` also of a conversation that leaves no room for a next turn.
    """
    render = partial(engine.render, model, frame, any_length=any_length)
    if text_transcripts.kind(messages):
        return await _ids_of_text(engine, model, frame, messages)
    ids = await render(messages)
    first = await render([*messages, _next_message(messages[-1], _PROBES[0])])
    if first[: len(ids)] == ids:
        return ids
    # The template renders the last reply differently before another message: what two next turns share is safe.
    second = await render([*messages, _next_message(messages[-1], _PROBES[1])])
    return first[: text_transcripts.shared(first, second)]


async def _ids_of_text(
    engine: EngineClient, model: str, frame: Mapping[str, Any], conversation: Sequence[Message]
) -> list[int]:
    """The ids of a plain text to be continued, or of a list of ids; see `gateway.dialects.text_transcripts`."""
    *before, last = conversation
    if last["role"] == text_transcripts.TOKENS:
        return list(last["content"])
    if before:  # a reply to token ids, which will be sent in front of the new text
        return [*before[0]["content"], *await engine.tokenize(model, last["content"], special=False)]
    special = frame.get("add_special_tokens", True)
    ids = await engine.tokenize(model, last["content"], special=special)
    for suffix in _SUFFIXES:
        longer = await engine.tokenize(model, last["content"] + suffix, special=special)
        ids = ids[: text_transcripts.shared(ids, longer)]
    return ids


def _next_message(last: Message, text: str) -> Message:
    """A message that may follow `last`: a tool's result if tools were called, else the user's."""
    if calls := last.get("tool_calls"):
        return {"role": "tool", "tool_call_id": calls[0].get("id", ""), "content": text}
    return {"role": "user", "content": text}
