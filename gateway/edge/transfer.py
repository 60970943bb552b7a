"""Windows as files, over HTTP: an export goes out and an import comes in as a stream."""

import logging
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.edge import fields, show
from gateway.edge.client import client_of
from gateway.edge.endpoint import Call
from gateway.errors import GatewayError
from gateway.records import check_window_name
from gateway.windows.export import Export, export
from gateway.windows.imports import import_window as bring

log = logging.getLogger(__name__)


async def export_window(call: Call) -> tuple[int, ASGIApp]:
    """GET /admin/windows/{name}/export."""
    q = call.query({"as_text": fields.flag})
    return 200, _File(await export(call.parts, call.tenant, call.window_name, as_text=q.get("as_text", False)))


async def import_window(call: Call) -> tuple[int, Any]:
    """POST /admin/windows/import."""
    q = call.query({"window_name": lambda name, value: check_window_name(value, name), "as_text": fields.flag})
    window, warnings = await bring(
        call.parts,
        call.tenant,
        call.stream(),
        name=q.get("window_name"),
        as_text=q.get("as_text", False),
        progress=call.progress,
    )
    return 201, {**show.window(window), "warnings": warnings}


class _File:
    """The answer that a window's file is."""

    def __init__(self, export: Export) -> None:
        self._export = export

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = f'attachment; filename="{self._export.window.name}.cwg"'
        headers = [
            (b"content-type", b"application/x-tar"),
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
            # The length was promised, so a client that counts sees that this is not all.
            log.warning("the export of %s was cut: %s", self._export.window.name, error.message)
            return
        await send({"type": "http.response.body", "body": b""})
