"""Resolve items that a Responses request names by their ids only (`item_reference`).

Vercel's AI SDK does so with whatever it was answered, unless it is told `store: false`. The engine keeps no answers and
refuses such items; we keep them.
"""

from dataclasses import replace

from gateway.dialects.base import Call, Dialect
from gateway.errors import GatewayError
from gateway.windows.context import Services

_KIND = "item_reference"


async def resolve(services: Services, tenant: str, call: Call, dialect: Dialect) -> Call:
    """Put in what a call refers to. Raises `invalid_request` for an item that is not kept."""
    storage = call.storage
    named = [item["id"] for item in storage.items if _is_reference(item)] if storage else []
    if storage is None or not named:
        return call
    if len(set(named)) < len(named):
        raise _refused("The input refers to the same item twice.", "refer to each item once")
    kept = await services.store.response_items(tenant, named)
    if len(kept) < len(named):
        await services.recorder.flush()  # it may be of a turn that is not recorded yet
        kept = await services.store.response_items(tenant, named)
    if missing := [one for one in named if one not in kept]:
        hint = "send the item itself; responses to requests with store: false are not stored"
        raise _refused(f"Item with id '{missing[0]:.100}' not found.", hint)
    items = [kept[item["id"]] if _is_reference(item) else item for item in storage.items]
    whole = dialect.read({**call.body, "input": items}, b"")
    return replace(whole, client_salt=call.client_salt, storage=replace(storage, items=items))


def _refused(message: str, hint: str) -> GatewayError:
    return GatewayError("invalid_request", message, hint=hint, details={"field": "input"})


def _is_reference(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") == _KIND and isinstance(item.get("id"), str)
