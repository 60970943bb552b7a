"""Ids that clients send: agents name their sessions in headers and body fields of their own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import orjson
from blake3 import blake3
from msgspec import Struct

from gateway.records import SESSION_ID, check_session_id

# session: exactly this session · agent: one id for everything an agent does, side conversations too ·
# key: shared by conversations of one kind
Kind = Literal["session", "agent", "key"]

SESSION_HEADER = b"x-session-id"
_CLAUDE = b"x-claude-code-session-id"
_CLAUDE_AGENT = b"x-claude-code-agent-id"
_CODEX = b"x-codex-turn-metadata"
_SUBAGENT = b"x-openai-subagent"
_AFFINITY = b"x-session-affinity"
# In this order, after the two above. Not among them: x-client-request-id and x-correlation-id, which most clients
# change with each request.
_AGENT_HEADERS = (
    b"session-id",
    b"session_id",
    _AFFINITY,
    b"x-litellm-session-id",
    b"x-dynamo-session-id",
    b"x-amp-thread-id",
    b"x-nemo-relay-session-id",
    # Chat front ends make titles and tags under the id of the chat, and traces hold all that an agent does.
    b"x-openwebui-chat-id",
    b"x-conversation-id",
    b"x-chat-id",
    b"x-thread-id",
    b"helicone-session-id",
    b"langfuse-session-id",
    b"langfuse_session_id",
)
# The engine does not get them.
HEADERS = frozenset({SESSION_HEADER, _CLAUDE, _CLAUDE_AGENT, _CODEX, _SUBAGENT, *_AGENT_HEADERS})

_DIGEST = 16
_LONGEST_USER = 4096  # characters of a `user_id` that are looked at


class ClientSessionId(Struct, frozen=True):
    """An id that a client sent; `source` says where, as the session's status shows it.

    `parent` is the id of the session that a sub-agent works for.
    """

    kind: Kind
    id: str
    source: str
    parent: str = ""


def read_client_session_id(
    headers: Iterable[tuple[bytes, bytes]], body: Mapping[str, Any], in_url: str | None
) -> ClientSessionId | None:
    """Return the id that a client sent, None if it sent none. Raises `invalid_session_id` for X-Session-ID."""
    if in_url is not None:
        return ClientSessionId("session", in_url, "base URL")
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in HEADERS:
            found.setdefault(name, value.decode("latin-1").strip())
    if SESSION_HEADER in found:
        session_id = check_session_id(found[SESSION_HEADER], "X-Session-ID")
        # OpenCode sends both, and makes its titles under the same id.
        kind: Kind = "agent" if found.get(_AFFINITY) == session_id else "session"
        return ClientSessionId(kind, session_id, "header x-session-id")
    return (_in_headers(found) if found else None) or _in_body(body)


def _in_headers(found: Mapping[bytes, str]) -> ClientSessionId | None:
    if found.get(_CLAUDE):
        # A sub-agent carries its parent's session id, so only both together name a conversation.
        return _agent((found[_CLAUDE], found.get(_CLAUDE_AGENT, "")), _CLAUDE)
    if _CODEX in found:
        turn = _object(found[_CODEX])
        if value := _text(turn.get("thread_id")) or _text(turn.get("session_id")):
            return _agent((value,), _CODEX)
    for name in _AGENT_HEADERS:
        if found.get(name):
            return _agent((found[name], found.get(_SUBAGENT, "")), name)
    return None


def _agent(parts: Sequence[str], header: bytes) -> ClientSessionId:
    main, *others = filter(None, parts)
    parent = valid_id(main) if others else ""
    return ClientSessionId("agent", valid_id(":".join([main, *others])), f"header {header.decode()}", parent)


def _in_body(body: Mapping[str, Any]) -> ClientSessionId | None:
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        if value := _text(metadata.get("session_id")):
            return ClientSessionId("session", valid_id(value), "body metadata.session_id")
        if value := _session_of_user(metadata.get("user_id")):
            return ClientSessionId("agent", valid_id(value), "body metadata.user_id")
    conversation = body.get("conversation")
    if value := _text(conversation.get("id") if isinstance(conversation, dict) else conversation):
        return ClientSessionId("session", valid_id(value), "body conversation")
    if value := _text(body.get("prompt_cache_key")):
        return ClientSessionId("key", valid_id(value), "body prompt_cache_key")
    return None


def _session_of_user(user_id: object) -> str:
    """The session in Claude Code's `user_id`: a JSON object, or `user_..._session_ID` in older versions."""
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


def valid_id(name: str) -> str:
    """A client's id as a session id: itself, or a hash if it has other characters or is too long."""
    return name if SESSION_ID.fullmatch(name) else f"x-{blake3(name.encode()).hexdigest(_DIGEST)}"
