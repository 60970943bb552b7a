"""The one error of the gateway, and the table of its codes.

Every failure that a caller may see is a `GatewayError` with one of the codes below; the HTTP status and whether a
retry makes sense hang on the code, so they are written once. `gateway.api` renders it: in the admin API's shape, or in
the shape of the dialect that the client speaks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Code:
    """What a code means on the wire, in words, and what whoever gets it can do. docs/errors.md is made of this."""

    status: int
    means: str
    remedy: str
    retryable: bool = False


CODES: Mapping[str, Code] = MappingProxyType(
    {
        "invalid_request": Code(
            400, "A field or the body is not what it must be; `details.field` names it", "Send what the message says"
        ),
        "invalid_session_id": Code(
            400,
            "What should be the id of a session is none",
            "Use 1 to 128 of `A-Z a-z 0-9 _ . : -`, a letter or digit first",
        ),
        "invalid_window_name": Code(
            400,
            "What should be the name of a window is none",
            "Use 1 to 128 of `A-Z a-z 0-9 _ . -`, a letter or digit first",
        ),
        "unknown_parameter": Code(
            400, "A parameter that the route does not know", "The hint has the nearest that it knows, or all of them"
        ),
        "window_system_conflict": Code(
            400,
            "A request that goes on from a window brings another system message than the window has",
            "Leave it out, or send `X-Window-System: keep` or `replace`",
        ),
        "unauthorized": Code(
            401, "The key is missing or wrong", "Send `Authorization: Bearer KEY` or `x-api-key: KEY`"
        ),
        "forbidden": Code(
            403,
            "A page of another site made a browser send this, or may have: no key is set, and it went to a public name",
            "Ask from the gateway's own address; set `api_key` where it has a name of its own",
        ),
        "not_found": Code(404, "Nothing is served at this path", "`/admin/openapi.json` has every path"),
        "session_not_found": Code(
            404, "There is no such session, or it was deleted", "`GET /admin/sessions` lists those that there are"
        ),
        "window_not_found": Code(
            404,
            "There is no such window; or it has expired, then it cannot be used any more",
            "`GET /admin/windows` lists those that there are; freeze it again",
        ),
        "response_not_found": Code(
            404, "No answer of this id is kept", "Send `store: true`; `responses_kept` says how many are"
        ),
        "previous_response_not_found": Code(
            404, "The answer that a request goes on from is not kept", "Send the whole conversation"
        ),
        "method_not_allowed": Code(405, "The path is served, but not by this method", "The header `Allow` has those"),
        "request_timeout": Code(
            408, "The body stopped coming", "Send it again; `client_timeout_s` sets how long we wait", retryable=True
        ),
        "window_already_exists": Code(
            409, "The name is in use by a window", "Choose another name, or delete that window"
        ),
        "session_already_exists": Code(409, "The id is in use by a session", "Choose another id, or give none"),
        "session_busy": Code(
            409, "A turn of the session is going on", "Try again when its reply is complete", retryable=True
        ),
        "model_mismatch": Code(
            409,
            "The engine does not serve the model that the window or session was made with, or with other weights",
            "Serve that model; the text is there (`GET /admin/windows/{name}/messages`), and can be imported `as_text`",
        ),
        "payload_too_large": Code(
            413, "The body is larger than may be", "`max_body_bytes` and `max_import_bytes` set the limits"
        ),
        "too_complex": Code(
            413,
            "A request or a file has more parts than may be: values, messages, parameters, or levels of nesting",
            "Send less at once; the message says what there is too much of, and which setting bounds it",
        ),
        "window_corrupted": Code(
            422,
            "Text or KV of the window, or of a window's file, is lost or not as its checksum says",
            "A window: `verify` says what is lost, a thaw computes it anew. A file: fetch or export it again",
        ),
        "rate_limited": Code(
            429,
            "Too much is going on: clients, open files, or finished turns that wait for the store",
            "Wait a moment; `max_connections`, `turn_queue` and the limit on open files set how much may be",
            retryable=True,
        ),
        "internal": Code(500, "The gateway failed", "Its log says why; that is a bug, please report it"),
        "engine_unreachable": Code(
            502,
            "No engine answers, or it answers with an error of its own",
            "Is vLLM running, and does `engine_urls` have its address? `GET /admin/health` says what is the matter",
            retryable=True,
        ),
        "cache_unavailable": Code(
            503,
            "LMCache or a tier is not configured, or does not answer",
            "Is LMCache running, and does `cache_url` have its address? `GET /admin/cache` says what is the matter",
            retryable=True,
        ),
        "engine_timeout": Code(
            504, "The engine was silent for too long", "`engine_timeout_s` sets how long we wait", retryable=True
        ),
        "storage_full": Code(
            507,
            "A disk or Redis has no room, or less than `disk_reserve_bytes`; a quota or the limit on the size of "
            "files is reached; or the tenant's windows would hold more than `tenant_budget_bytes`",
            "Free space, delete windows that are not needed, or raise the limit",
        ),
    }
)


class GatewayError(Exception):
    """A failure with a code, a sentence that says what is wrong, and a hint that says what to do about it."""

    def __init__(self, code: str, message: str, *, hint: str = "", details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details = dict(details or {})

    @property
    def status(self) -> int:
        """HTTP status of the code."""
        return CODES[self.code].status

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return CODES[self.code].retryable


class StartError(Exception):
    """The gateway cannot start; the message says in one line why, and what to do about it."""
