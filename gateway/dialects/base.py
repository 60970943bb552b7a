"""The interface of a dialect, and what dialects share."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from gateway.dialects import transcripts
from gateway.errors import GatewayError
from gateway.records import MAX_MODEL, Front, Message, Usage

# What a client may not send to the engine as it likes: the salt is ours, transfer parameters can name token ids and
# cache tags, and priority and session belong to the operator (STACK: vLLM takes them from the body). vLLM makes the
# answer's id of the request's, and answers are kept under their ids.
PRIVATE_FIELDS = ("cache_salt", "kv_transfer_params", "ec_transfer_params", "priority", "session_id", "request_id")


# Request fields that a chat template sees besides the messages (vllm 0.32, chat_completion/protocol.py).
RENDER_FIELDS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "reasoning_effort",
    "add_special_tokens",
    "mm_processor_kwargs",
)
# Of these, what a thawed conversation keeps when a client sends only what is new.
INHERITED_FIELDS = (
    "tools", "chat_template", "chat_template_kwargs", "documents", "add_special_tokens", "reasoning_effort",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """What a request says of stored answers: which one it continues, whether its own is kept, and with what.

    `conversation`: it continues everything that its session holds.
    """

    previous: str | None
    conversation: bool
    keep: bool
    instructions: str
    items: list[Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a session: the parsed body, and what the gateway needs of it.

    `raw` is the body as it came, b"" where something in it has been changed since. `messages` and `frame` are what
    the client sent, in the words of the chat dialect whatever its own: the one form of a transcript, so that any
    dialect can continue what another began. `POST /v1/chat/completions/render` takes them, and renders them to the
    tokens of the request itself. No messages: not a turn that can be recorded; the engine will say why.
    """

    body: dict[str, Any]
    raw: bytes
    model: str
    messages: list[Message]
    frame: Mapping[str, Any]
    hide_usage: bool
    client_salt: str
    front: Front | None = None
    echoes: bool = False  # the reply's text begins with the prompt's
    storage: Storage | None = None

    @property
    def whole(self) -> list[Message]:
        """The conversation as the engine gets to see it."""
        return self.messages if self.front is None else transcripts.merged(self.front, self.messages)

    @property
    def whole_frame(self) -> Mapping[str, Any]:
        """What besides the messages its prompt is rendered from."""
        return self.frame if self.front is None else {**self.front.frame, **self.frame}

    def followed_by(self, reply: Message) -> list[Message]:
        """The conversation with its reply."""
        return transcripts.followed(self.whole, reply, echoes=self.echoes)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a finished answer said. `message` is None when it was cut, an error, or is not to be sent back as it is.

    It is in the words of the chat dialect, as a client of this dialect will send it back and the dialect then reads it.
    `answer` is the answer as it is, in an API where a client can ask for it again by its `id`.
    """

    message: Message | None
    usage: Usage | None
    error: str = ""
    answer: Mapping[str, Any] | None = None


class Dialect(Protocol):
    """One client API."""

    name: str
    """As metrics have it."""

    last_event: tuple[bytes, ...]
    """The beginning of a stream's last event: a client that has read it has read the reply."""

    def read(self, body: dict[str, Any], raw: bytes) -> Call:
        """Take a request apart; `body` is `raw` parsed, and the caller's to give away."""
        ...

    def write(self, call: Call, salt: str) -> bytes:
        """Return the body for the engine: the client's, with `call.front`, the salt, and with usage requested.

        Raises `invalid_request` where the front cannot be expressed in this dialect.
        """
        ...

    def reply(self, chunks: Iterable[bytes], *, streamed: bool) -> Reply:
        """Read a recorded answer, after the request."""
        ...

    def error(self, error: GatewayError) -> bytes:
        """Render an error in the dialect's own shape."""
        ...

    def error_event(self, error: GatewayError, sent: Sequence[bytes] = ()) -> bytes:
        """Render an error as the last event of a stream that has begun, of which `sent` was kept."""
        ...


def usage_of(usage: Mapping[str, Any] | None) -> Usage | None:
    """Read a `usage` object of the chat or completions API."""
    prompt = _count(usage.get("prompt_tokens")) if isinstance(usage, Mapping) else None
    if usage is None or prompt is None:
        return None
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, Mapping) else None
    return Usage(prompt, _count(usage.get("completion_tokens")) or 0, cached)


def _count(value: object) -> int | None:
    """A number of tokens; None for anything else an engine may send."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def model_of(body: Mapping[str, Any]) -> str:
    """The model that a body names, "" without one. Raises `invalid_request` for a name that none can have."""
    model = body.get("model")
    if not isinstance(model, str):
        return ""
    if len(model) > MAX_MODEL:
        raise GatewayError(
            "invalid_request",
            f"model has {len(model)} characters; the name of a model has at most {MAX_MODEL}",
            hint="`GET /v1/models` lists the served models",
            details={"field": "model"},
        )
    return model


def is_clean(body: Mapping[str, Any]) -> bool:
    """Whether `sanitise` would find nothing to take out."""
    return "vllm_xargs" not in body and not any(name in body for name in PRIVATE_FIELDS)


def sanitise(body: dict[str, Any]) -> str:
    """Take out of `body` what a client may not send to the engine; return the client's own salt, or ""."""
    client_salt = body.get("cache_salt")
    for name in PRIVATE_FIELDS:
        body.pop(name, None)
    extra = body.get("vllm_xargs")  # vLLM merges it into the same place as kv_transfer_params
    if isinstance(extra, dict):
        body["vllm_xargs"] = {k: v for k, v in extra.items() if k not in PRIVATE_FIELDS}
    if isinstance(client_salt, dict | list):
        return write_json({"": client_salt}).decode()
    return str(client_salt) if client_salt is not None else ""


def write_json(body: Mapping[str, Any]) -> bytes:
    """Write a body. Raises `invalid_request` for one that is nested deeper than can be written."""
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits, say, from the arguments of a window's tool call
        try:
            return json.dumps(body).encode()
        except RecursionError as error:
            raise GatewayError("invalid_request", f"the body cannot be forwarded: {error}") from error


def with_fields(raw: bytes, body: Mapping[str, Any], added: Mapping[str, Any]) -> bytes:
    """Write a body with `added`, which it does not have yet, leaving every byte of `raw` as the client wrote it.

    Numbers beyond 64 bits and the spelling of floats survive, and half a megabyte of history is not serialised again.
    Without `raw` the parsed `body` is written.
    """
    if not raw:
        return write_json({**body, **added})
    end = raw.rindex(b"}")
    return b"".join((memoryview(raw)[:end], b"," if body else b"", orjson.dumps(added)[1:]))
