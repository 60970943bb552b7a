"""Which conversation a request belongs to: by an id sent with it, or else by its own beginning.

Agents name their sessions in headers and body fields of their own (`read_client_session_id`). Who names nothing is
recognised by the prefix chain: a hash for each message over all before it, so that equal hashes mean equal beginnings.
The store knows every point at which a turn asked or was answered; the longest known beginning of a request says which
conversation it goes on with (`match_session`). Where a client changed something before the last reply, a system prompt
that tells the time or a question that came with passages, that reply is found by what did not change (`reply_aliases`,
`alias_match`). Nothing here reads a clock, a socket or a store.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import orjson
from blake3 import blake3

from gateway.dialects import transcripts
from gateway.errors import GatewayError
from gateway.records import MAX_NAME, SESSION_ID, Message, Session, Trace, check_session_id
from gateway.sessions.reply_aliases import Answered, Context, tool_names

# session: exactly this session · agent: an agent's id for all that it does, side conversations too ·
# key: what conversations of one kind share
Kind = Literal["session", "agent", "key"]

SESSION_HEADER = b"x-session-id"
_CLAUDE = b"x-claude-code-session-id"
_CLAUDE_AGENT = b"x-claude-code-agent-id"
_CODEX = b"x-codex-turn-metadata"
_SUBAGENT = b"x-openai-subagent"
_AFFINITY = b"x-session-affinity"
# In this order, after the two above. Not among them: x-client-request-id and x-correlation-id, which most clients make
# anew for each request.
_AGENT_HEADERS = (
    b"session-id",
    b"session_id",
    _AFFINITY,
    b"x-litellm-session-id",
    b"x-dynamo-session-id",
    b"x-amp-thread-id",
    b"x-nemo-relay-session-id",
)
# Between the client and us: no engine gets to see them.
HEADERS = frozenset({SESSION_HEADER, _CLAUDE, _CLAUDE_AGENT, _CODEX, _SUBAGENT, *_AGENT_HEADERS})

_DIGEST = 16
_LONGEST_USER = 4096  # characters of a `user_id` that are looked at
_LOOK_BACK = 4  # replies of a request that are looked for under their further names
_SIDE = 17  # characters that a side conversation adds to its agent's id


@dataclass(frozen=True, slots=True)
class ClientSessionId:
    """An id that a request brings; `source` says where, in the words that the session's status shows.

    `parent` is the id of the session that a sub-agent works for.
    """

    kind: Kind
    id: str
    source: str
    parent: str = ""


def read_client_session_id(
    headers: Iterable[tuple[bytes, bytes]], body: Mapping[str, Any], in_url: str | None
) -> ClientSessionId | None:
    """Return the id that a request brings, None if it brings none. Raises `invalid_session_id` for one of our own."""
    if in_url is not None:
        return ClientSessionId("session", in_url, "base URL")
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in HEADERS:
            found.setdefault(name, value.decode("latin-1").strip())
    if SESSION_HEADER in found:
        named = check_session_id(found[SESSION_HEADER], "X-Session-ID")
        # OpenCode sends both, and makes its titles under the same id.
        return ClientSessionId("agent" if found.get(_AFFINITY) == named else "session", named, "header x-session-id")
    return (_in_headers(found) if found else None) or _in_body(body)


def _in_headers(found: Mapping[bytes, str]) -> ClientSessionId | None:
    if found.get(_CLAUDE):
        # A sub-agent carries its parent's session id, so only both together name a conversation.
        return _agent((found[_CLAUDE], found.get(_CLAUDE_AGENT, "")), _CLAUDE)
    if _CODEX in found:
        turn = _object(found[_CODEX])
        if named := _text(turn.get("thread_id")) or _text(turn.get("session_id")):
            return _agent((named,), _CODEX)
    for name in _AGENT_HEADERS:
        if found.get(name):
            return _agent((found[name], found.get(_SUBAGENT, "")), name)
    return None


def _agent(parts: Sequence[str], header: bytes) -> ClientSessionId:
    main, *others = filter(None, parts)
    parent = fitting(main) if others else ""
    return ClientSessionId("agent", fitting(":".join([main, *others])), f"header {header.decode()}", parent)


def _in_body(body: Mapping[str, Any]) -> ClientSessionId | None:
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        if named := _text(metadata.get("session_id")):
            return ClientSessionId("session", fitting(named), "body metadata.session_id")
        if named := _session_of_user(metadata.get("user_id")):
            return ClientSessionId("agent", fitting(named), "body metadata.user_id")
    conversation = body.get("conversation")
    if named := _text(conversation.get("id") if isinstance(conversation, dict) else conversation):
        return ClientSessionId("session", fitting(named), "body conversation")
    if named := _text(body.get("prompt_cache_key")):
        return ClientSessionId("key", fitting(named), "body prompt_cache_key")
    return None


def _session_of_user(user_id: object) -> str:
    """The session in Claude Code's `user_id`: a JSON object, or `user_..._session_ID` as older versions wrote it."""
    text = _text(user_id)[:_LONGEST_USER]
    return _text(_object(text).get("session_id")) or text.rpartition("_session_")[2] if "session" in text else ""


def _object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def fitting(name: str) -> str:
    """A foreign id as a session id of ours: itself, or a hash where it has other characters or is too long."""
    return name if SESSION_ID.fullmatch(name) else f"x-{blake3(name.encode()).hexdigest(_DIGEST)}"


def subconversation_id(session_id: str, head: bytes) -> str:
    """Name another conversation that an agent holds under the same id: its title maker, a skill, what follows a
    compaction."""
    return f"{session_id[: MAX_NAME - _SIDE]}:{head.hex()[: _SIDE - 1]}"


# --- the prefix chain


def seed(body: Mapping[str, Any], scope: str, client_salt: str) -> bytes:
    """What a chain begins with: whatever says that equal beginnings of two requests are none of each other's."""
    user = _text(body.get("user")) or _text(body.get("safety_identifier"))
    return b"" if not (scope or client_salt or user) else _hash(orjson.dumps([scope, client_salt, user]))


def chain(messages: Sequence[Message], start: bytes) -> list[bytes]:
    """Return a hash for each message over all messages up to it."""
    return _linked(map(_digest, messages), start)


def _linked(digests: Iterable[bytes], start: bytes) -> list[bytes]:
    links: list[bytes] = []
    for digest in digests:
        start = _hash(start + digest) if digest else start
        links.append(start)
    return links


def link(before: bytes, message: Message) -> bytes:
    """The hash of a message and of all before it. Raises `invalid_request` for one that nests over 254 levels deep."""
    (last,) = chain([message], before)
    return last


def _digest(message: Message) -> bytes:
    """The hash of one message; b"" for a reply that says nothing, which some clients leave out of their history."""
    kept = transcripts.canonical(message)
    if len(kept) == 1 and kept.get("role") == "assistant":
        return b""
    try:
        return _hash(orjson.dumps(kept, option=orjson.OPT_SORT_KEYS))
    except (orjson.JSONEncodeError, RecursionError) as error:
        raise GatewayError("invalid_request", f"a message cannot be written as JSON: {error}") from error


def head(messages: Sequence[Message]) -> bytes:
    """What a conversation began with, whatever system prompt it has by now."""
    _, rest = transcripts.split(messages)
    return link(b"", rest[0]) if rest else b""


def trace(
    start: bytes,
    messages: Sequence[Message],
    reply: Message | None,
    request: "ConversationPrefix | None" = None,
    began: bytes | None = None,
) -> Trace:
    """Where a turn has left its conversation.

    `request` is the beginning that its messages are where that was made already: then the reply gets its further names
    too. `began` is its head where that is known.
    """
    if not messages:
        return Trace(b"", b"", None)
    asked = request.asked if request else chain(messages, start)[-1]
    began = head(messages) if began is None else began
    if reply is None:
        return Trace(began, asked, None)
    said = _digest(reply)
    ends = request.context.aliases(reply, said) if request and said else ()
    return Trace(began, asked, _linked([said], asked)[0], ends)


def _hash(data: bytes) -> bytes:
    return blake3(data).digest(_DIGEST)


# --- the verdict


@dataclass(frozen=True)
class Prompt:
    """What of a request tells its conversation: `seed` is what `seed` returns, `frame` that of its call."""

    messages: Sequence[Message]
    seed: bytes
    frame: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def head(self) -> bytes:
        """See `head`."""
        return head(self.messages)

    @cached_property
    def beginning(self) -> "ConversationPrefix":
        """The beginning that this request is."""
        return ConversationPrefix.of(self)

    def prepare(self, named: ClientSessionId | None) -> None:
        """Hash what a request with this id is going to be recognised by; for many or large messages it takes long."""
        if self.messages and not (named and named.kind == "session"):
            _ = self.beginning, self.head


@dataclass(frozen=True, slots=True)
class ConversationPrefix:
    """The chain of a request, and how many of its first messages may end a turn or its question, longest first."""

    messages: Sequence[Message]
    seed: bytes
    frame: Mapping[str, Any]
    digests: Sequence[bytes]
    prefix_hashes: Sequence[bytes]
    points: Sequence[int]
    replies: Sequence[int]  # how many messages there are up to each reply, and with it

    @classmethod
    def of(cls, prompt: Prompt) -> "ConversationPrefix":
        """The beginning that a request is."""
        roles = [message.get("role") for message in prompt.messages]
        replies = [i for i, role in enumerate(roles, 1) if role == "assistant"]
        # Between two messages of a user there may have been an empty reply, which the client left out.
        unanswered = [i for i in range(1, len(roles)) if roles[i - 1] == roles[i] == "user"]
        points = sorted({len(roles), *replies, *(i - 1 for i in replies), *unanswered} - {0}, reverse=True)
        digests = [_digest(message) for message in prompt.messages]
        links = _linked(digests, prompt.seed)
        return cls(prompt.messages, prompt.seed, prompt.frame, digests, links, points, replies)

    @property
    def candidates(self) -> list[bytes]:
        """The links to look for, longest beginning first."""
        return [self.prefix_hashes[point - 1] for point in self.points]

    @property
    def asked(self) -> bytes:
        """The link of the whole request."""
        return self.prefix_hashes[-1]

    @property
    def context(self) -> Context:
        """What the reply to this request will answer."""
        return self._context(len(self.digests))

    def answered(self, beyond: int = 0) -> Iterator[Answered]:
        """The last replies of this request after its first `beyond` messages, latest first.

        The client may have put exchanges of its own after the reply that the engine gave last, as aider does with the
        files that it shows. Of the replies before the last only those count that are hardly said twice.
        """
        for place in self.replies[: -_LOOK_BACK - 1 : -1]:
            counts = place == self.replies[-1] or transcripts.telling(self.messages[place - 1])
            if place > beyond and counts and self.digests[place - 1]:
                yield self._answered(place)

    def _answered(self, place: int) -> Answered:
        context = self._context(place - 1)
        return Answered(place, context, context.aliases(self.messages[place - 1], self.digests[place - 1]))

    def depth(self, known: bytes) -> int:
        """How many messages there are up to a link: an empty reply has that of the message before it."""
        return len(self.prefix_hashes) - self.prefix_hashes[::-1].index(known)

    def _context(self, count: int) -> Context:
        return Context.of(self.seed, self.messages[:count], self.digests[:count], tool_names(self.frame))


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The session that a request goes on with, or forks from. `depth` is how many of its messages were known."""

    session: Session | None
    forks: bool = False
    depth: int = 0
    how: str = "new"


STRANGER = PrefixMatch(None)


def match_session(request: ConversationPrefix, known: bytes | None, candidates: Sequence[Session]) -> PrefixMatch:
    """Say which of `candidates` a request goes on with: the sessions that have been at `known`, its longest known link.

    - At a session's last reply: the next turn.
    - The very request that a session asked last: a retry. But a first request that was answered is asked by the next
      stranger: a reply makes a conversation, a question alone does not.
    - The session's last question with another reply behind it: the reply was cut, or came back differently.
    - Anywhere before: a fork, provided that a reply is part of what is shared.
    """
    if known is None or not candidates:
        return STRANGER
    depth = request.depth(known)
    answered_before = any(reply <= depth and request.digests[reply - 1] for reply in request.replies)
    asking = [one for one in candidates if one.last_request_hash == known]
    if depth == len(request.prefix_hashes):
        return _again(depth, asking, candidates, answered_before)
    going = next((one for one in candidates if one.last_reply_hash == known), None)
    if going and (going.last_request_hash != going.last_reply_hash or answered_before or len(candidates) == 1):
        return PrefixMatch(going, depth=depth, how="prefix")
    waiting = next((one for one in asking if _waits(one)), None)
    if waiting:
        return PrefixMatch(waiting, depth=depth, how="prefix")
    # A client may send any reply back as it likes, an empty one in place of a call that failed, too; two that asked the
    # same cannot be told apart by that.
    replied = depth + 1 in request.replies or not request.digests[depth - 1]
    if replied and len(asking) == 1 and (answered_before or len(candidates) == 1):
        return PrefixMatch(asking[0], depth=depth, how="prefix")
    return PrefixMatch(candidates[0], forks=True, depth=depth, how="fork") if answered_before else STRANGER


def _again(depth: int, asking: Sequence[Session], candidates: Sequence[Session], answered_before: bool) -> PrefixMatch:
    """The verdict on a request that was asked before, word for word."""
    waiting = next((one for one in asking if _waits(one)), None)
    if waiting or (asking and answered_before):
        return PrefixMatch(waiting or asking[0], depth=depth, how="retry")
    return PrefixMatch(candidates[0], forks=True, depth=depth, how="fork") if answered_before else STRANGER


def _waits(session: Session) -> bool:
    """Whether a session's last question has no answer, or an empty one."""
    return not session.answered or session.last_reply_hash == session.last_request_hash


def was_answered(request: ConversationPrefix, verdict: PrefixMatch) -> bool:
    """Whether the verdict is that somebody has asked the very same before, and has the reply to it."""
    session = verdict.session
    return (
        session is not None and verdict.depth == len(request.prefix_hashes) and (verdict.forks or not _waits(session))
    )


def likelier(again: PrefixMatch, standing: PrefixMatch) -> PrefixMatch:
    """Of the verdict that a request was answered before and the one without that: who asks an old question anew, does
    so soon, so the session that was active last. A fork, of a session that has gone on, comes after both."""
    if again.session is None or standing.session is None or standing.forks:
        return again
    return standing if again.forks or standing.session.last_active_at > again.session.last_active_at else again
