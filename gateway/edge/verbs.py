"""The admin door, second half: what one does with a window that is there already."""

from dataclasses import asdict
from typing import Any

from gateway.edge import fields, show
from gateway.edge.endpoint import Call, Verb
from gateway.windows import describe, verify


async def describe_window(call: Call) -> tuple[int, Any]:
    """PATCH /admin/windows/{name}."""
    said = await call.body(
        {
            "description": fields.or_null(fields.description),
            "tags": fields.or_null(fields.tags),
            "ttl_seconds": fields.or_null(fields.seconds),
        },
        nulls=True,
    )
    return 200, show.window(await describe.describe(call.parts, call.tenant, call.window_name, said))


async def verify_window(call: Call) -> tuple[int, Any]:
    """POST /admin/windows/{name}/verify."""
    await call.body({})
    return 200, asdict(await verify.verify(call.parts, call.tenant, call.window_name, call.progress))


SERVED: list[tuple[str, str, Verb]] = [
    ("PATCH", "/admin/windows/{name}", describe_window),
    ("POST", "/admin/windows/{name}/verify", verify_window),
]
