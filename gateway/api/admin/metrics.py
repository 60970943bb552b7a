"""Metrics for Prometheus and as JSON. Any worker answers for all workers."""

from starlette.responses import Response

from gateway.api.admin.models import requests, status
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.telemetry.metrics import CONTENT_TYPE, Stored
from gateway.windows.context import Services


@operation("GET", "/metrics", gives=CONTENT_TYPE)
async def prometheus(call: Call) -> Response:
    """All metrics in Prometheus' text format."""
    return Response(call.services.metrics.text(await _stored(call.services)), media_type=CONTENT_TYPE)


@operation("GET", "/admin/metrics")
async def as_json(call: Call, query: requests.MetricsQuery) -> status.Metrics:
    """All metrics as JSON, or as text for Prometheus in a JSON object."""
    stored = await _stored(call.services)
    if query.format == "prometheus":
        return status.PrometheusMetrics(format="prometheus", content=call.services.metrics.text(stored).decode())
    rows = [status.Metric(**row) for row in call.services.metrics.rows(stored)]
    return status.JsonMetrics(format="json", metrics=rows)


async def _stored(services: Services) -> Stored:
    await services.recorder.flush()  # so that a turn is counted once its reply was read
    store = services.store
    held = await store.held_kv()
    return Stored(
        await store.window_counts(),
        await store.tier_usage(),
        await store.saved_by_tenants(),
        held.byte_hours if held else 0.0,
    )
