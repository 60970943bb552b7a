"""The gateway's one exception, the table of its error codes, and hints in the words of each API.

Every failure that a caller may see is a `GatewayError` with one of the codes below; the HTTP status and whether a
retry makes sense depend on the code, so they are written once. `gateway.api` renders it, in the admin API's shape or in
that of the client's dialect. What a hint has in backticks is a name in the admin API (a route, a field); `HintWords`
puts it into the words of another API.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Code:
    """What a code means and what the caller can do about it. docs/errors.md is generated from this."""

    status: int
    means: str
    remedy: str
    retryable: bool = False


CODES: Mapping[str, Code] = MappingProxyType(
    {
        "invalid_request": Code(
            400, "A field or the body is invalid; `details.field` names it", "Correct it as the message says"
        ),
        "invalid_session_id": Code(
            400,
            "Invalid session id",
            "Use 1 to 128 characters of `A-Z a-z 0-9 _ . : -`, beginning with a letter or digit",
        ),
        "invalid_window_name": Code(
            400,
            "Invalid window name",
            "Use 1 to 128 characters of `A-Z a-z 0-9 _ . -`, beginning with a letter or digit",
        ),
        "unknown_parameter": Code(
            400, "Unknown parameter", "The hint names the closest known parameter, or all of them"
        ),
        "window_system_conflict": Code(
            400,
            "A request that continues a window has a system message that differs from the window's",
            "Omit it, or send `X-Window-System: keep` or `replace`",
        ),
        "unauthorized": Code(
            401, "The key is missing or wrong", "Send `Authorization: Bearer KEY` or `x-api-key: KEY`"
        ),
        "forbidden": Code(
            403,
            "A page of another site made a browser send this, or may have: no key is set, and it was sent to a public "
            "name",
            "Use the gateway's IP address or localhost, or set `api_key` to serve it under a public name",
        ),
        "not_found": Code(404, "Nothing is served at this path", "`/admin/openapi.json` lists every path"),
        "session_not_found": Code(
            404, "The session does not exist or was deleted", "`GET /admin/sessions` lists the sessions"
        ),
        "window_not_found": Code(
            404,
            "The window does not exist, or it has expired and can no longer be used",
            "`GET /admin/windows` lists the windows; an expired one has to be frozen again",
        ),
        "response_not_found": Code(
            404, "No response with this id is stored", "Send `store: true`; `responses_kept` sets how many are stored"
        ),
        "previous_response_not_found": Code(404, "The previous response is not stored", "Send the whole conversation"),
        "method_not_allowed": Code(
            405, "The path does not support this method", "The header `Allow` lists the supported methods"
        ),
        "request_timeout": Code(
            408,
            "The body stopped arriving",
            "Send it again; `client_timeout_s` sets how long the gateway waits",
            retryable=True,
        ),
        "window_already_exists": Code(
            409, "A window with this name exists", "Choose another name, or delete that window"
        ),
        "session_already_exists": Code(409, "A session with this id exists", "Choose another id, or omit it"),
        "session_busy": Code(
            409, "A turn of the session is in progress", "Try again when its reply is complete", retryable=True
        ),
        "model_mismatch": Code(
            409,
            "The engine does not serve the model of the window or session, or serves it with other weights",
            "Serve that model, or thaw or import the window with `as_text`: the engine computes it then",
        ),
        "payload_too_large": Code(
            413, "The body is too large", "`max_body_bytes` and `max_import_bytes` set the limits"
        ),
        "too_complex": Code(
            413,
            "A request or a file has too many values, messages, parameters or levels of nesting",
            "Send less at once; the message says what there is too much of, and which setting limits it",
        ),
        "window_corrupted": Code(
            422,
            "Text or KV of the window, or of a window file, is lost or does not match its checksum",
            "For a window: `verify` says what is lost, and a thaw recomputes it. For a file: copy or export it again",
        ),
        "rate_limited": Code(
            429,
            "Too many clients (then the status is 503), open files, or finished turns that wait for the store",
            "Wait a moment; `max_connections`, `turn_queue` and the limit on open files set the maximum",
            retryable=True,
        ),
        "internal": Code(500, "An error in the gateway", "The gateway's log says why; this is a bug, please report it"),
        "engine_unreachable": Code(
            502,
            "No engine answers, or it answers with an error",
            "Is vLLM running, and does `engine_urls` have its address? `GET /admin/health` says what is wrong",
            retryable=True,
        ),
        "cache_unavailable": Code(
            503,
            "LMCache or a tier is not configured, or does not answer",
            "Is LMCache running, and does `cache_url` have its address? `GET /admin/cache` says what is wrong",
            retryable=True,
        ),
        "store_unavailable": Code(
            503,
            "The database of the store does not answer",
            "Is PostgreSQL running, and does `store_url` have its address? The gateway connects again by itself",
            retryable=True,
        ),
        "engine_timeout": Code(
            504,
            "The engine was silent for too long",
            "`engine_timeout_s` sets how long the gateway waits",
            retryable=True,
        ),
        "storage_full": Code(
            507,
            "A disk or Redis is full, or has less than `disk_reserve_bytes` free; a quota or the limit on the size of "
            "files is reached; or the tenant's windows would hold more than `tenant_budget_bytes`",
            "Free space, delete windows that are not needed, or raise the limit",
        ),
    }
)


_IN_BACKTICKS = re.compile(r"`([^`]+)`")
_PLACEHOLDER = re.compile(r"\{\w+\}")


class GatewayError(Exception):
    """A failure with a code, a sentence that says what is wrong, and a hint that says what to do about it.

    `lasting`: a retry does not help, although it does with other errors of that code.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        details: Mapping[str, Any] | None = None,
        lasting: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details = dict(details or {})
        self._lasting = lasting

    @property
    def status(self) -> int:
        """HTTP status of the code."""
        return CODES[self.code].status

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return CODES[self.code].retryable and not self._lasting


def no_cache(purpose: str) -> GatewayError:
    """The error for an operation that needs a cache where none is configured."""
    message = f"no cache is configured to {purpose}"
    return GatewayError("cache_unavailable", message, hint="set cache_url", lasting=True)


def invalid_field(field: str, message: str, hint: str = "") -> GatewayError:
    """The error `invalid_request` about one field of a request."""
    return GatewayError("invalid_request", message, hint=hint, details={"field": field})


@dataclass(frozen=True, slots=True)
class HintWords:
    """The words in which one API says what hints name in backticks.

    `names` has the text in place of a route (its placeholders written as `{}`) or a field, backticks and all;
    `by_code` whole hints, for errors whose remedy is another one there.
    """

    names: Mapping[str, str]
    by_code: Mapping[str, str] = field(default_factory=dict)

    def translate(self, code: str, hint: str) -> str:
        """The hint of an error in this API's words. What this API has no name for stays as it is."""
        return self.by_code.get(code) or _IN_BACKTICKS.sub(self._name, hint)

    def _name(self, quoted: re.Match[str]) -> str:
        return self.names.get(placeholders_blank(quoted[1]), quoted[0])


def placeholders_blank(route: str) -> str:
    """A route without the names of its placeholders: they differ from API to API."""
    return _PLACEHOLDER.sub("{}", route)


class StartError(Exception):
    """The gateway cannot start; the message says in one line why, and what to do about it."""
