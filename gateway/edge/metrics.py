"""The numbers, for Prometheus and as JSON. Whichever worker is asked answers for all."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.edge import auth, fields
from gateway.edge.endpoint import Call, error_answer
from gateway.errors import GatewayError
from gateway.parts import Parts
from gateway.telemetry import CONTENT_TYPE, Stored


async def prometheus(request: Request) -> Response:
    """GET /metrics."""
    parts: Parts = request.state.parts
    try:
        auth.tenant(request.scope["headers"], parts.settings.api_key)
    except GatewayError as error:
        return error_answer(error)
    return Response(parts.telemetry.text(await _stored(parts)), media_type=CONTENT_TYPE)


async def as_json(call: Call) -> tuple[int, Any]:
    """GET /admin/metrics."""
    q = call.query({"format": fields.one_of("json", "prometheus")})
    stored = await _stored(call.parts)
    if q.get("format") == "prometheus":
        return 200, {"format": "prometheus", "content": call.parts.telemetry.text(stored).decode()}
    return 200, {"format": "json", "metrics": call.parts.telemetry.rows(stored)}


async def _stored(parts: Parts) -> Stored:
    await parts.turns.settle()  # who has read a reply, finds its turn counted
    return Stored(await parts.store.window_counts(), await parts.store.tier_usage())
