"""A request to the inference API: its base URL, its session headers, and the dialect to answer errors in."""

from dataclasses import dataclass
from urllib.parse import unquote

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
_CHAT = ChatDialect()
MESSAGES = MessagesDialect()
TURNS: dict[bytes, Dialect] = {
    b"/v1/chat/completions": _CHAT,
    b"/v1/completions": CompletionsDialect(),
    b"/v1/responses": ResponsesDialect(),
    b"/v1/messages": MESSAGES,
}
# What vLLM has beside `/v1` and clients ask for: no KV comes of it.
TOKENIZER_PATHS = (b"/tokenize", b"/detokenize", *STATE)


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """What the base URL says: the engine's path, and the session or the window that all under it belongs to.

    `known` is the path as the engine routes it: decoded, and without a slash at its end.
    """

    path: bytes
    known: bytes
    session_id: str | None = None
    window: str | None = None


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A request as it came: from whom, for which session, and how to answer it."""

    scope: Scope
    receive: Receive
    send: Send
    tenant: str
    base: RouteTarget
    body: bytes

    @property
    def heavy(self) -> bool:
        """Whether its body takes so long to parse that it is done beside the event loop."""
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
        """What X-Window-System says of a window's system prompt and the client's. Raises `invalid_request`."""
        sent = (self.header(SYSTEM_HEADER) or b"").strip().lower()
        if sent == b"keep":
            return "keep"
        if sent == b"replace":
            return "replace"
        if sent:
            raise GatewayError("invalid_request", f"X-Window-System is {shown(sent, 50)}", hint="use keep or replace")
        return ""


def read_target(scope: Scope) -> RouteTarget:
    """Read the base URL, and what a header says in its place."""
    raw: bytes = scope["raw_path"]
    session_id = window = None
    if raw.startswith((b"/s/", b"/w/")):
        _, kind, part, rest = raw.split(b"/", 3) if raw.count(b"/") >= 3 else (b"", raw[1:2], raw[3:], b"")
        name = unquote(part.decode("latin-1"))
        if kind == b"s":
            session_id = check_session_id(name, "session id in the URL")
        else:
            window = check_window_name(name, "window name in the URL")
        raw = b"/" + rest
    # The engine routes by the decoded path: however a client spells it, a completion must not get past its salt.
    path = unquote(raw.decode("latin-1")).encode()
    if not (path.startswith(b"/v1/") or path in TOKENIZER_PATHS) or b".." in path.split(b"/"):
        raise not_found(scope["path"])
    known = path.rstrip(b"/")
    if known in ROUTES:
        raw = known
    if window is None:
        sent = next((v for k, v in scope["headers"] if k == WINDOW_HEADER), None)
        window = check_window_name(sent.decode("latin-1"), "X-Window") if sent is not None else None
    return RouteTarget(raw, known, session_id, window)


def error_dialect(scope: Scope) -> Dialect:
    """The dialect whose errors the client of a path can read, whatever else is wrong with the request."""
    path: str = scope["path"]
    if path.startswith(("/s/", "/w/")):
        path = "/" + path.split("/", 3)[-1]
    return MESSAGES if path.startswith("/v1/messages") else _CHAT
