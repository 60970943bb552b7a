"""The token ids with which a conversation's next turn will begin.

Not the ids that were sampled: a reply rarely tokenises back to itself, and a template may drop an earlier turn's
reasoning. So the engine renders the transcript with the reply, and what it renders is checked against a next turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.engine import Questions
from gateway.records import Message

# Two beginnings of a next message that share no first token, whatever the tokeniser.
_PROBES = ("a", "#")


async def next_turn_ids(
    engine: Questions, model: str, frame: Mapping[str, Any], messages: Sequence[Message]
) -> list[int]:
    """Return the ids that every next turn shares. Raises what `Engine.render` raises."""
    ids = await engine.render(model, frame, messages)
    first = await engine.render(model, frame, [*messages, _next(messages[-1], _PROBES[0])])
    if first[: len(ids)] == ids:
        return ids
    # The template writes the last reply differently once there is a message behind it: what two next turns share is
    # safe.
    second = await engine.render(model, frame, [*messages, _next(messages[-1], _PROBES[1])])
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return first[:shared]


def _next(last: Message, text: str) -> Message:
    """A message that may follow: a tool's result if tools were called, else the user's."""
    calls = last.get("tool_calls")
    if calls:
        return {"role": "tool", "tool_call_id": calls[0].get("id", ""), "content": text}
    return {"role": "user", "content": text}
