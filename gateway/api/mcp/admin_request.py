"""Requests to the admin API, as the MCP tools make them and as a transport sends them."""

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
ReportProgress = Callable[[Mapping[str, Any]], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class AdminRequest:
    """A request to the admin API."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Json | None = None
    traceparent: str = ""  # of the span that the agent made the call in


# Sends a request, reports its progress, and returns the admin API's answer, which may be an error.
Ask = Callable[[AdminRequest, ReportProgress], Awaitable[Json]]
