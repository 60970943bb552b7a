"""The one error of the gateway, and the table of its codes.

Every failure that a caller may see is a `GatewayError` with one of the codes below; the HTTP status and whether a
retry makes sense hang on the code, so they are written once. `gateway.edge` renders it: in the admin API's shape, or in
the shape of the dialect that the client speaks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Code:
    """What a code means on the wire."""

    status: int
    retryable: bool = False


CODES: Mapping[str, Code] = MappingProxyType(
    {
        "invalid_request": Code(400),
        "invalid_session_id": Code(400),
        "invalid_window_name": Code(400),
        "unknown_parameter": Code(400),
        "window_system_conflict": Code(400),
        "unauthorized": Code(401),
        "forbidden": Code(403),
        "not_found": Code(404),
        "session_not_found": Code(404),
        "window_not_found": Code(404),
        "response_not_found": Code(404),
        "previous_response_not_found": Code(404),
        "method_not_allowed": Code(405),
        "request_timeout": Code(408, retryable=True),
        "window_already_exists": Code(409),
        "session_already_exists": Code(409),
        "session_busy": Code(409, retryable=True),
        "model_mismatch": Code(409),
        "payload_too_large": Code(413),
        "window_corrupted": Code(422),
        "rate_limited": Code(429, retryable=True),
        "internal": Code(500),
        "engine_unreachable": Code(502, retryable=True),
        "cache_unavailable": Code(503, retryable=True),
        "engine_timeout": Code(504, retryable=True),
        "storage_full": Code(507),
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
