"""The allow-list of engine paths that pass through. Paths that a newer engine adds are refused until they are listed.

The paths are those of vLLM 0.32 (vllm/entrypoints, the routers) that serve clients, not those that control the engine:
LoRA adapters, sleep, profiling, weights. The setting `extra_paths` adds more.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gateway.api.asgi import not_found
from gateway.errors import GatewayError

_GET = frozenset({"GET", "HEAD"})
_POST = frozenset({"POST"})
_ANY = _GET | _POST | {"PUT", "PATCH", "DELETE"}


@dataclass(frozen=True, slots=True)
class Route:
    """The allowed methods of a path. `salted`: its JSON body gets a `cache_salt`, since the engine may store KV.

    `needs_json`: a body of another content type is refused, as vLLM does (`validate_json_request`): a page of another
    site can make a browser send text, but JSON only after a preflight. `from_store`: the gateway answers it itself.
    """

    methods: frozenset[str]
    salted: bool = False
    needs_json: bool = False
    from_store: bool = False


_READING = Route(_GET)
_RENDERING = Route(_POST, needs_json=True)  # between text and tokens, on the CPU
_COMPUTING = Route(_POST, salted=True, needs_json=True)
_FORM = Route(_POST)

TURNS = (b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages")
RESPONSES = b"/v1/responses/"
COUNT = b"/v1/messages/count_tokens"
STATE = (b"/health", b"/ping", b"/version", b"/load")  # load generators request them before they start
ROUTES: Mapping[bytes, Route] = {
    **dict.fromkeys(TURNS, _COMPUTING),
    COUNT: _RENDERING,
    b"/v1/models": _READING,
    b"/v1/chat/completions/batch": _COMPUTING,
    b"/v1/embeddings": _COMPUTING,
    b"/v1/rerank": _COMPUTING,
    b"/v1/score": _COMPUTING,
    b"/v1/systemone": _COMPUTING,
    **{path + b"/render": _RENDERING for path in TURNS},
    b"/v1/chat/completions/derender": _RENDERING,
    b"/v1/completions/derender": _RENDERING,
    b"/v1/audio/transcriptions": _FORM,
    b"/v1/audio/translations": _FORM,
    b"/tokenize": _RENDERING,
    b"/detokenize": _RENDERING,
    **dict.fromkeys(STATE, _READING),
}
_BELOW: Mapping[bytes, Route] = {b"/v1/models/": _READING, RESPONSES: Route(_ANY, from_store=True)}


class Routes:
    """The allow-list with `extra` from the setting: "POST /v1/x", "GET /v1/y/*", "* /v1/z"."""

    def __init__(self, extra: Collection[str]) -> None:
        self._exact = dict(ROUTES)
        self._below = dict(_BELOW)
        for one in extra:
            method, _, path = one.partition(" ")
            route = Route(_ANY if method == "*" else frozenset({method}), salted=True)
            (self._below if path.endswith("*") else self._exact)[path.removesuffix("*").encode()] = route

    def of(self, path: bytes) -> Route | None:
        """The route of a decoded path without a slash at its end."""
        exact = self._exact.get(path)
        return exact or next((route for start, route in self._below.items() if path.startswith(start)), None)

    def pattern(self, path: bytes) -> str:
        """The path, or of several paths what they begin with and a star."""
        if path in self._exact:
            return path.decode()
        return next((f"{start.decode()}*" for start in self._below if path.startswith(start)), "")

    def check(self, method: str, path: bytes) -> Route:
        """Return the route of a request. Raises `not_found`, `method_not_allowed`."""
        route = self.of(path)
        if route is None:
            raise not_found(path.decode("utf-8", "replace"))
        if method not in route.methods:
            raise GatewayError(
                "method_not_allowed", f"{method} is not served here", hint=f"use {' or '.join(sorted(route.methods))}"
            )
        return route
