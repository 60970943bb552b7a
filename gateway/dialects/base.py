"""The interface of a dialect, and what dialects share."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from msgspec import Struct

from gateway.dialects import transcripts
from gateway.errors import GatewayError, invalid_field
from gateway.records import MAX_MODEL, Front, Message, Usage

# What a client may not send to the engine as it likes: the salt is ours, transfer parameters can name token ids and
# cache tags, and priority and session belong to the operator (STACK: vLLM takes them from the body). vLLM makes the
# answer's id of the request's, and answers are kept under their ids.
PRIVATE_FIELDS = ("cache_salt", "kv_transfer_params", "ec_transfer_params", "priority", "session_id", "request_id")
_SANITISED = frozenset({*PRIVATE_FIELDS, "vllm_xargs"})

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


class Storage(Struct, frozen=True):
    """What a request asks of stored responses: which one it continues, whether its own is kept, and with which items.

    `conversation`: it continues everything that its session holds.
    """

    previous: str | None
    conversation: bool
    keep: bool
    instructions: str
    items: list[Any]


class Call(Struct, frozen=True):
    """One request of a session: the parsed body, and what the gateway needs of it.

    `raw` is the body as it came, b"" if it has been changed since. `messages` and `frame` are what the client sent,
    converted to the chat dialect: the one form of a transcript, so that any dialect can continue what another began.
    `POST /v1/chat/completions/render` takes them, and renders them to the tokens of the request itself. A call without
    messages is not a turn that can be recorded; the engine will say why.
    """

    body: dict[str, Any]
    raw: bytes
    model: str
    messages: list[Message]
    frame: Mapping[str, Any]
    hide_usage: bool = False  # the client did not ask for the usage event of its stream
    client_salt: str = ""
    front: Front | None = None
    echoes: bool = False  # the reply's text begins with the prompt's
    storage: Storage | None = None

    @property
    def whole(self) -> list[Message]:
        """The conversation as the engine sees it."""
        return self.messages if self.front is None else transcripts.merged(self.front, self.messages)

    @property
    def whole_frame(self) -> Mapping[str, Any]:
        """Everything but the messages that its prompt is rendered from."""
        return self.frame if self.front is None else {**self.front.frame, **self.frame}


class Reply(Struct, frozen=True):
    """A finished answer. `message` is None if it was cut, is an error, or cannot be sent back as it is.

    The message is converted to the chat dialect, as this dialect will read it when a client sends it back.
    `answer` is the original, in an API where a client can get it again by its `id`.
    """

    message: Message | None
    usage: Usage | None
    error: str = ""
    answer: Mapping[str, Any] | None = None


class Dialect(ABC):
    """One client API. Errors have OpenAI's shape unless the API has its own."""

    name: str
    """As metrics have it."""

    last_event: tuple[bytes, ...] = (b"data: [DONE]",)
    """The beginning of a stream's last event: a client that has read it has read the reply."""

    begins_with_token: bool = True
    """Whether vLLM sends the first event of a stream together with the first token, and not before."""

    @abstractmethod
    def read(self, body: dict[str, Any], raw: bytes) -> Call:
        """Take a request apart; `body` is `raw` parsed, and is changed in place.

        A body that the engine will refuse is left for the engine to refuse. Raises `invalid_request`.
        """

    @abstractmethod
    def write_with_salt(self, call: Call, salt: str) -> bytes:
        """Return the body for the engine: the client's, with `call.front`, the salt, and with usage requested.

        Raises `invalid_request` where the front cannot be expressed in this dialect.
        """

    def reply(self, chunks: Iterable[bytes], *, streamed: bool) -> Reply:
        """Read a recorded answer, after the request."""
        if streamed:
            return self._read_stream(chunks)
        answer = json_object(b"".join(chunks))
        return Reply(None, None, "the reply is not a JSON object") if answer is None else self._read_answer(answer)

    @abstractmethod
    def _read_stream(self, chunks: Iterable[bytes]) -> Reply: ...

    @abstractmethod
    def _read_answer(self, answer: dict[str, Any]) -> Reply: ...

    def error(self, error: GatewayError) -> bytes:
        """Render an error in the dialect's own shape."""
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        field = error.details.get("field")
        return orjson.dumps({"error": {"message": sentence(error), "type": kind, "param": field, "code": error.code}})

    def error_event(self, error: GatewayError, sent: Sequence[bytes] = ()) -> bytes:
        """Render an error as the last event of a stream that has begun, of which `sent` was kept."""
        return b"data: " + self.error(error) + b"\n\ndata: [DONE]\n\n"


def sentence(error: GatewayError) -> str:
    """What is wrong, and what to do about it."""
    return f"{error.message} ({error.hint})" if error.hint else error.message


def json_object(data: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; None for any other value."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def engine_token_counts(usage: Mapping[str, Any] | None) -> Usage | None:
    """Read a `usage` object of the chat or completions API."""
    prompt = _count(usage.get("prompt_tokens")) if isinstance(usage, Mapping) else None
    if usage is None or prompt is None:
        return None
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, Mapping) else None
    return Usage(prompt, _count(usage.get("completion_tokens")) or 0, cached)


def _count(value: object) -> int | None:
    """A number of tokens; None for anything else that an engine may send."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def model_of(body: Mapping[str, Any]) -> str:
    """The model that a body names, "" without one. Raises `invalid_request` for a name that is too long."""
    model = body.get("model")
    if not isinstance(model, str):
        return ""
    if len(model) > MAX_MODEL:
        problem = f"model has {len(model)} characters; the name of a model has at most {MAX_MODEL}"
        raise invalid_field("model", problem, "`GET /v1/models` lists the served models")
    return model


def is_clean(body: Mapping[str, Any]) -> bool:
    """Whether `sanitise` would find nothing to remove."""
    return _SANITISED.isdisjoint(body)


def sanitise(body: dict[str, Any]) -> str:
    """Remove from `body` what a client may not send to the engine; return the client's own salt, or ""."""
    if is_clean(body):
        return ""
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
