"""The prefix chain: a hash for each message over all messages up to it, so that equal hashes mean equal beginnings.

A request without an id is recognised by it. The store knows every point at which a turn asked or was answered; the
longest known prefix of a request says which conversation it continues (`prefix_match`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import orjson
from msgspec import Struct

from gateway.dialects import transcripts
from gateway.errors import GatewayError
from gateway.records import Message, Trace
from gateway.sessions.client_ids import ClientSessionId
from gateway.sessions.reply_aliases import Answered, Context, digest, tool_names

_LOOK_BACK = 4  # replies of a request that are looked for under their aliases


_USER_FIELDS = ("user", "safety_identifier")


def seed(body: Mapping[str, Any], scope: str, client_salt: str) -> bytes:
    """What a chain begins with: everything that keeps equal beginnings of two requests apart."""
    user = next((v for name in _USER_FIELDS if isinstance(v := body.get(name), str) and v), "")
    return digest(orjson.dumps([scope, client_salt, user])) if scope or client_salt or user else b""


def chain(messages: Sequence[Message], start: bytes) -> list[bytes]:
    """Return a hash for each message over all messages up to it.

    Raises `invalid_request` for a message that nests over 254 levels deep.
    """
    return _linked(map(_message_hash, messages), start)


def _linked(hashes: Iterable[bytes], start: bytes) -> list[bytes]:
    links: list[bytes] = []
    for one in hashes:
        start = digest(start + one) if one else start
        links.append(start)
    return links


def link(before: bytes, message: Message) -> bytes:
    """The hash of a message and all messages before it. Raises as `chain` does."""
    return chain([message], before)[-1]


def _message_hash(message: Message) -> bytes:
    """The hash of one message; b"" for an empty reply, which some clients leave out of their history."""
    kept = transcripts.canonical(message)
    if len(kept) == 1 and kept.get("role") == "assistant":
        return b""
    try:
        return digest(orjson.dumps(kept, option=orjson.OPT_SORT_KEYS))
    except (orjson.JSONEncodeError, RecursionError) as error:
        message_text = f"a message cannot be written as JSON: {error}"
        raise GatewayError("invalid_request", message_text, hint="nest it less deeply") from error


def head(messages: Sequence[Message]) -> bytes:
    """The hash of the first message after the system prompt, which may change."""
    first = transcripts.leading(messages)
    return link(b"", messages[first]) if first < len(messages) else b""


def trace(
    start: bytes,
    messages: Sequence[Message],
    reply: Message | None,
    request: "ConversationPrefix | None" = None,
    began: bytes | None = None,
) -> Trace:
    """The hashes of a turn that is over.

    `request` is the prefix of its messages if it is known: then the reply gets its aliases too. `began` is its head if
    that is known.
    """
    if not messages:
        return Trace(b"", b"", None)
    asked = request.request_hash if request else chain(messages, start)[-1]
    if began is None:
        began = request.head if request else head(messages)
    if reply is None:
        return Trace(began, asked, None)
    reply_hash = _message_hash(reply)
    aliases = request.context.aliases(reply, reply_hash) if request and reply_hash else ()
    return Trace(began, asked, digest(asked + reply_hash) if reply_hash else asked, aliases)


@dataclass(frozen=True)
class Prompt:
    """What identifies the conversation of a request: `seed` is what `seed` returns, `frame` that of its call."""

    messages: Sequence[Message]
    seed: bytes
    frame: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def head(self) -> bytes:
        """See `head`."""
        return head(self.messages)

    @cached_property
    def prefix(self) -> "ConversationPrefix":
        """See `ConversationPrefix`."""
        return ConversationPrefix.of(self)

    @property
    def continues(self) -> bool:
        """Whether it is part of a conversation that goes on: it holds a reply, or may call tools. A title does not."""
        replied = any(message.get("role") == "assistant" for message in self.messages)
        return replied or bool(tool_names(self.frame))

    def prepare(self, client_id: ClientSessionId | None) -> None:
        """Hash whatever the session of a request with this id will be found by; it takes long for large messages."""
        if self.messages and not (client_id and client_id.kind == "session"):
            _ = self.prefix, self.head


class ConversationPrefix(Struct, frozen=True):
    """The chain of a request. `points` are the numbers of first messages that may end a turn or its question, longest
    first, and `replies` those up to and with each reply."""

    messages: Sequence[Message]
    seed: bytes
    frame: Mapping[str, Any]
    digests: Sequence[bytes]
    prefix_hashes: Sequence[bytes]
    request_hash: bytes  # of the whole request
    points: Sequence[int]
    replies: Sequence[int]

    @classmethod
    def of(cls, prompt: Prompt) -> "ConversationPrefix":
        """Hash the messages of a request."""
        roles = [message.get("role") for message in prompt.messages]
        replies = [i for i, role in enumerate(roles, 1) if role == "assistant"]
        # There may have been an empty reply between two messages of a user, which the client left out.
        unanswered = [i for i in range(1, len(roles)) if roles[i - 1] == roles[i] == "user"]
        points = sorted({len(roles), *replies, *(i - 1 for i in replies), *unanswered} - {0}, reverse=True)
        digests = [_message_hash(message) for message in prompt.messages]
        links = _linked(digests, prompt.seed)
        whole = links[-1] if links else prompt.seed
        return cls(prompt.messages, prompt.seed, prompt.frame, digests, links, whole, points, replies)

    @property
    def candidates(self) -> list[bytes]:
        """The hashes to look for, longest prefix first."""
        return [self.prefix_hashes[point - 1] for point in self.points]

    @property
    def head(self) -> bytes:
        """See `head`."""
        first = transcripts.leading(self.messages)
        return _linked(self.digests[first : first + 1] or [b""], b"")[0]

    @property
    def context(self) -> Context:
        """The context of the reply to this request."""
        return self._context(len(self.digests))

    def answered(self, beyond: int = 0) -> Iterator[Answered]:
        """The last replies of this request after its first `beyond` messages, latest first.

        The client may have put exchanges of its own after the last reply of the engine, as aider does with the files
        that it shows. Of the replies before the last, only distinctive ones count.
        """
        for depth in self.replies[: -_LOOK_BACK - 1 : -1]:
            message, message_hash = self.messages[depth - 1], self.digests[depth - 1]
            counts = depth == self.replies[-1] or transcripts.is_distinctive(message)
            if depth > beyond and counts and message_hash:
                context = self._context(depth - 1)
                yield Answered(depth, context, context.aliases(message, message_hash))

    def depth(self, known: bytes) -> int:
        """How many messages there are up to a hash: an empty reply has that of the message before it."""
        return len(self.prefix_hashes) - self.prefix_hashes[::-1].index(known)

    def _context(self, count: int) -> Context:
        return Context.of(self.seed, self.messages[:count], self.digests[:count], tool_names(self.frame))
