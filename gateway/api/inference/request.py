"""A request to the inference API: its base URL, its session headers, and the dialect to answer errors in."""

import re
from urllib.parse import unquote

from msgspec import Struct
from starlette.types import Receive, Scope, Send

from gateway.api.asgi import not_found
from gateway.api.inference.passthrough_routes import ROUTES, STATE
from gateway.dialects.base import Dialect
from gateway.dialects.chat import ChatDialect
from gateway.dialects.completions import CompletionsDialect
from gateway.dialects.messages import MessagesDialect
from gateway.dialects.responses import ResponsesDialect
from gateway.dialects.transcripts import SystemRule
from gateway.errors import GatewayError
from gateway.records import check_session_id, check_window_name
from gateway.runtime.offload import HEAVY_BYTES
from gateway.validation.shown import shown

SYSTEM_HEADER = b"x-window-system"
WINDOW_HEADER = b"x-window"
_TURN = re.compile("[1-9][0-9]{0,5}")
_SYSTEM_RULES: dict[bytes, SystemRule] = {b"": "", b"keep": "keep", b"replace": "replace"}
_CHAT = ChatDialect()
MESSAGES = MessagesDialect()
TURNS: dict[bytes, Dialect] = {
    b"/v1/chat/completions": _CHAT,
    b"/v1/completions": CompletionsDialect(),
    b"/v1/responses": ResponsesDialect(),
    b"/v1/messages": MESSAGES,
}
# What clients request of vLLM outside `/v1`: it stores no KV.
TOKENIZER_PATHS = (b"/tokenize", b"/detokenize", *STATE)


class RouteTarget(Struct, frozen=True):
    """What the base URL says: the engine's path, and the session or the window of all requests under it.

    `at_turn` is the turn of the window that new conversations begin at; None: its end. `known` is the path as the
    engine routes it: decoded, and without a slash at its end.
    """

    path: bytes
    known: bytes
    session_id: str | None = None
    window: str | None = None
    at_turn: int | None = None


class InferenceRequest(Struct, frozen=True):
    """A request as it came, and how to answer it."""

    scope: Scope
    receive: Receive
    send: Send
    tenant: str
    base: RouteTarget
    body: bytes

    @property
    def heavy(self) -> bool:
        """Whether its body takes so long to parse that it is done in a thread."""
        return len(self.body) > HEAVY_BYTES

    @property
    def target(self) -> bytes:
        """Path and query."""
        query: bytes = self.scope["query_string"]
        return self.base.path + b"?" + query if query else self.base.path

    def header(self, name: bytes) -> bytes | None:
        """The first header of that name."""
        return next((v for k, v in self.scope["headers"] if k == name), None)

    @property
    def system_rule(self) -> SystemRule:
        """Which system prompt X-Window-System chooses, the window's or the client's. Raises `invalid_request`."""
        sent = (self.header(SYSTEM_HEADER) or b"").strip().lower()
        if sent not in _SYSTEM_RULES:
            raise GatewayError("invalid_request", f"X-Window-System is {shown(sent, 50)}", hint="use keep or replace")
        return _SYSTEM_RULES[sent]


def read_target(scope: Scope) -> RouteTarget:
    """Read the base URL, and the header that may name a window instead."""
    raw: bytes = scope["raw_path"]
    session_id = window = at_turn = None
    if raw.startswith((b"/s/", b"/w/")):
        _, kind, part, rest = raw.split(b"/", 3) if raw.count(b"/") >= 3 else (b"", raw[1:2], raw[3:], b"")
        name = unquote(part.decode("latin-1"))
        if kind == b"s":
            session_id = check_session_id(name, "session id in the URL")
        else:
            window, at_turn = _window_and_turn(name, "window name in the URL")
        raw = b"/" + rest
    # The engine routes by the decoded path: however a client writes it, no completion may avoid its salt.
    path = unquote(raw.decode("latin-1")).encode()
    if not (path.startswith(b"/v1/") or path in TOKENIZER_PATHS) or b".." in path.split(b"/"):
        raise not_found(scope["path"])
    known = path.rstrip(b"/")
    if known in ROUTES:
        raw = known
    if window is None:
        sent = next((v for k, v in scope["headers"] if k == WINDOW_HEADER), None)
        window, at_turn = _window_and_turn(sent.decode("latin-1"), "X-Window") if sent is not None else (None, None)
    return RouteTarget(raw, known, session_id, window, at_turn)


def route_name(scope: Scope, pattern: str) -> str:
    """The route of a request, with a placeholder for what its base URL names."""
    return {"/s/": "/s/{session_id}", "/w/": "/w/{window}"}.get(scope["path"][:3], "") + pattern


def _window_and_turn(text: str, where: str) -> tuple[str, int | None]:
    """The window that `NAME` or `NAME@TURN` means, and the turn. Raises `invalid_window_name`, `invalid_request`."""
    name, at, turn = text.partition("@")
    name = check_window_name(name, where)
    if not at:
        return name, None
    if not _TURN.fullmatch(turn):
        message = f"{where}: {shown(turn, 50)} is not a turn of window {name!r}"
        raise GatewayError("invalid_request", message, hint="write NAME@TURN, with a turn from 1 on")
    return name, int(turn)


def error_dialect(scope: Scope) -> Dialect:
    """The dialect in which the client of a path reads errors."""
    path: str = scope["path"]
    if path.startswith(("/s/", "/w/")):
        path = "/" + path.split("/", 3)[-1]
    return MESSAGES if path.startswith("/v1/messages") else _CHAT
