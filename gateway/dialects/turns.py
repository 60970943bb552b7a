"""The turns of a transcript, numbered from 1: where a conversation can be continued otherwise.

A turn ends with a reply that calls no tool. What a user says, the tool calls that follow, their results and that reply
are one turn, whatever else stands between them; what follows the last such reply is an open turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.dialects import text_transcripts
from gateway.records import Message

_CONTINUES = ("assistant", "tool", "function")  # roles of what belongs to the turn before it


@dataclass(frozen=True, slots=True)
class Turns:
    """`numbers` has the turn of each message; `ends` how many messages there are up to the end of each finished turn.

    A text or a list of token ids has no turns: both are empty.
    """

    numbers: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of(cls, messages: Sequence[Message]) -> "Turns":
        """Number the turns of a transcript."""
        if text_transcripts.kind(messages):
            return cls((), ())
        numbers: list[int] = []
        ends: list[int] = []
        asked = False
        for place, message in enumerate(messages, 1):
            numbers.append(len(ends) + 1)
            asked = asked or message.get("role") == "user"
            following = messages[place].get("role") if place < len(messages) else None
            if asked and _is_final(message) and following not in _CONTINUES:
                ends.append(place)
                asked = False
        return cls(numbers, ends)

    @property
    def open(self) -> bool:
        """Whether messages follow the last finished turn."""
        return len(self.numbers) > (self.ends[-1] if self.ends else 0)


def _is_final(message: Message) -> bool:
    """Whether a message is a reply that calls no tool."""
    return message.get("role") == "assistant" and not (message.get("tool_calls") or message.get("function_call"))
