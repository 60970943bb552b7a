"""The names of everything that is on a span, once. docs/tracing.md lists them, and a test compares.

`gen_ai.*` are of OpenTelemetry's GenAI conventions 0.1.0, `http.*`, `server.*`, `url.*` and `error.type` of its general
ones; `cwg.*` are ours. The GenAI conventions are in development and have renamed attributes before: change them here.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

PROVIDER: Final = "vllm"
OPERATIONS: Mapping[str, str] = MappingProxyType({"completions": "text_completion"})
"""`gen_ai.operation.name` by dialect, where it is not `chat`."""

# The request.
METHOD: Final = "http.request.method"
ROUTE: Final = "http.route"
STATUS: Final = "http.response.status_code"
PATH: Final = "url.path"
TENANT: Final = "cwg.tenant"
SOURCE: Final = "cwg.session.source"
REQUEST_ID: Final = "cwg.request.id"

# The engine's part of a turn.
OPERATION: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
MODEL: Final = "gen_ai.request.model"
STREAM: Final = "gen_ai.request.stream"
CONVERSATION: Final = "gen_ai.conversation.id"
RESPONSE_ID: Final = "gen_ai.response.id"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
SERVER: Final = "server.address"
PORT: Final = "server.port"
ERROR: Final = "error.type"
OUTCOME: Final = "cwg.outcome"
MISS: Final = "cwg.miss"
EXPECTED_TOKENS: Final = "cwg.expected_tokens"

# Operations, their steps, and automatic work.
WINDOW: Final = "cwg.window.name"
REASON: Final = "cwg.reason"
RECEIPT: Final = "cwg.receipt."
"""Before the name of each number in an operation's receipt."""
DONE: Final = "cwg.step.done"
TOTAL: Final = "cwg.step.total"
WARNINGS: Final = "cwg.warnings"
"""How many there are."""
