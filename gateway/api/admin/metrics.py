"""The numbers, for Prometheus and as JSON. Whichever worker is asked answers for all."""

from functools import partial
from typing import Any

from starlette.responses import Response

from gateway.api import parameters
from gateway.api.admin import response_schemas
from gateway.api.endpoint import Call
from gateway.api.operation import Operation
from gateway.metrics import CONTENT_TYPE, Stored
from gateway.windows.context import Services


@partial(Operation, "GET", "/metrics", {"type": "string"}, gives=CONTENT_TYPE)
async def prometheus(call: Call) -> Any:
    """Tell every number, to Prometheus."""
    return Response(call.services.metrics.text(await _stored(call.services)), media_type=CONTENT_TYPE)


@partial(
    Operation,
    "GET",
    "/admin/metrics",
    response_schemas.METRICS,
    query={"format": parameters.one_of("json", "prometheus").default("json")},
)
async def as_json(call: Call) -> Any:
    """Tell every number, as JSON."""
    stored = await _stored(call.services)
    if call.given["format"] == "prometheus":
        return {"format": "prometheus", "content": call.services.metrics.text(stored).decode()}
    return {"format": "json", "metrics": call.services.metrics.rows(stored)}


async def _stored(services: Services) -> Stored:
    await services.recorder.flush()  # who has read a reply, finds its turn counted
    return Stored(await services.store.window_counts(), await services.store.tier_usage())
