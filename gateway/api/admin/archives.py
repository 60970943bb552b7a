"""Windows as files, over HTTP: an export goes out and an import comes in as a stream."""

import logging

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.admin import serializers
from gateway.api.admin.models import requests, responses
from gateway.api.connection import client_of
from gateway.api.endpoint import Call
from gateway.api.operation import ENGINE, operation
from gateway.errors import GatewayError
from gateway.windows.archive.export import Export, export
from gateway.windows.archive.import_ import import_window as import_file

log = logging.getLogger(__name__)

_TAR = "application/x-tar"


@operation("GET", "/admin/windows/{name}/export", gives=_TAR, errors=("window_corrupted", "cache_unavailable"))
async def export_window(call: Call, query: requests.ExportQuery) -> ASGIApp:
    """Send a window as one file."""
    return _File(await export(call.context, call.window_name, as_text=query.as_text))


@operation(
    "POST",
    "/admin/windows/import",
    status=201,
    takes=_TAR,
    errors=("window_already_exists", "window_corrupted", "too_complex", "cache_unavailable", *ENGINE),
)
async def import_window(call: Call, query: requests.ImportQuery) -> responses.Frozen:
    """Import a window from a file."""
    window, warnings = await import_file(call.context, call.stream(), name=query.window_name, as_text=query.as_text)
    return responses.Frozen(**serializers.window_fields(window, call.now), warnings=list(warnings))


class _File:
    """The response with a window's file."""

    def __init__(self, export: Export) -> None:
        self._export = export

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = f'attachment; filename="{self._export.window.name}.cwg"'
        headers = [
            (b"content-type", _TAR.encode()),
            (b"content-length", b"%d" % self._export.size),
            (b"content-disposition", name.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        client = client_of(scope)
        try:
            async for piece in self._export.pieces:
                if client.gone:
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except GatewayError as error:
            # A client can tell: the body is shorter than its content-length.
            log.warning("the export of %s was cut: %s", self._export.window.name, error.message)
            return
        await send({"type": "http.response.body", "body": b""})


OPERATIONS = (export_window, import_window)
