"""Metrics for Prometheus and as JSON. Any worker answers for all of them."""

from starlette.responses import Response

from gateway.api.admin import models
from gateway.api.admin.models import requests
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.metrics import CONTENT_TYPE, Stored
from gateway.windows.context import Services


@operation("GET", "/metrics", gives=CONTENT_TYPE)
async def prometheus(call: Call) -> Response:
    """Tell every number, to Prometheus."""
    return Response(call.services.metrics.text(await _stored(call.services)), media_type=CONTENT_TYPE)


@operation("GET", "/admin/metrics")
async def as_json(call: Call, query: requests.MetricsQuery) -> models.Metrics:
    """Tell every number, as JSON."""
    stored = await _stored(call.services)
    if query.format == "prometheus":
        return models.PrometheusMetrics(format="prometheus", content=call.services.metrics.text(stored).decode())
    rows = [models.Metric(**row) for row in call.services.metrics.rows(stored)]
    return models.JsonMetrics(format="json", metrics=rows)


async def _stored(services: Services) -> Stored:
    await services.recorder.flush()  # who has read a reply, finds its turn counted
    return Stored(await services.store.window_counts(), await services.store.tier_usage())
