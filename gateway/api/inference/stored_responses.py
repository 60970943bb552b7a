"""Responses that the gateway stores for the Responses API: continue one, refer to its items, get and delete it."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any
from urllib.parse import parse_qsl, unquote

import orjson
from msgspec import structs

from gateway.api import requests
from gateway.api.asgi import bounded_query
from gateway.api.inference.passthrough_routes import RESPONSES
from gateway.api.requests import Reads
from gateway.dialects import transcripts
from gateway.dialects.base import Call, Dialect
from gateway.errors import GatewayError, invalid_field
from gateway.records import Front, Message, StoredResponse
from gateway.validation import fields
from gateway.windows.context import Services

Operation = Callable[[Services, str, str, dict[str, str]], Awaitable[Any]]

_INCLUDE = ("include", "include[]")  # accepted and ignored: a response always has everything
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


async def insert_items(services: Services, tenant: str, call: Call, dialect: Dialect) -> Call:
    """Insert the items that a call refers to by their ids (`item_reference`); the same call if there are none.

    Vercel's AI SDK refers to every item of a response, unless `store` is false. The engine stores none and refuses such
    items. Raises `invalid_request` for an item that is not stored.
    """
    storage = call.storage
    ids = [item["id"] for item in storage.items if _is_reference(item)] if storage else []
    if storage is None or not ids:
        return call
    if len(set(ids)) < len(ids):
        raise invalid_field("input", "The input refers to the same item twice.", "refer to each item once")
    stored = await services.store.response_items(tenant, ids)
    if len(stored) < len(ids):
        await services.recorder.flush()  # it may be of a turn that is not recorded yet
        stored = await services.store.response_items(tenant, ids)
    if missing := [one for one in ids if one not in stored]:
        hint = "send the item itself; responses to requests with store: false are not stored"
        raise invalid_field("input", f"Item with id '{missing[0]:.100}' not found.", hint)
    items = [stored[item["id"]] if _is_reference(item) else item for item in storage.items]
    whole = dialect.read({**call.body, "input": items}, b"")
    return structs.replace(whole, client_salt=call.client_salt, storage=structs.replace(storage, items=items))


def _is_reference(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") == "item_reference" and isinstance(item.get("id"), str)


async def resume(services: Services, tenant: str, call: Call) -> tuple[Call, StoredResponse | None]:
    """Put the conversation up to `previous_response_id` in front of a call; return that response, None without one.

    Raises `previous_response_not_found`, `invalid_request`.
    """
    storage = call.storage
    if storage is None or storage.previous is None:
        if storage and storage.conversation:
            await services.recorder.flush()  # its session's transcript has only recorded turns
        return call, None
    before = await _find(services, tenant, storage.previous)
    if before is None:
        raise GatewayError(
            "previous_response_not_found",
            f"Previous response with id '{storage.previous:.100}' not found.",
            details={"field": "previous_response_id"},
        )
    history = await services.store.messages(before.transcript) if before.transcript else []
    if not history:
        raise invalid_field(
            "previous_response_id", f"response {before.id!r} cannot be continued", "send its output again"
        )
    if not call.messages:
        raise invalid_field(
            "input", "this input cannot follow a response", "send text, images, tool calls and their outputs"
        )
    return structs.replace(call, front=_front(call, history[1:] if before.instructed else history)), before


def _front(call: Call, history: list[Message]) -> Front:
    """The history between the request's own instructions and its input, system messages of the input included."""
    count = 1 if call.storage and call.storage.instructions else 0
    leading, _ = transcripts.split(call.messages[count:])
    return Front(call.messages[:count], [*history, *leading])


async def _find(services: Services, tenant: str, response_id: str) -> StoredResponse | None:
    """A stored response, also that of a turn that is not recorded yet."""
    response = await services.store.response(tenant, response_id)
    if response is None:
        await services.recorder.flush()
        response = await services.turns.wait_for(lambda: services.store.response(tenant, response_id))
    return response


async def _get_response(services: Services, tenant: str, response_id: str) -> StoredResponse:
    response = await _find(services, tenant, response_id)
    if response is None:
        raise GatewayError("response_not_found", f"Response with id '{response_id:.100}' not found.")
    return response


async def serve(services: Services, tenant: str, method: str, target: bytes) -> bytes | None:
    """Answer a request for a stored response; None if `target` is not one."""
    if not target.startswith(RESPONSES):
        return None
    path, _, query = target.removeprefix(RESPONSES).decode("latin-1").partition("?")
    response_id, _, rest = path.partition("/")
    operation = _OPERATIONS.get((method, rest))
    if operation is None or not response_id:
        return None
    bounded_query(query.encode("latin-1"))
    parsed = dict(parse_qsl(query, keep_blank_values=True))
    return orjson.dumps(await operation(services, tenant, unquote(response_id), parsed))


async def _get(services: Services, tenant: str, response_id: str, query: dict[str, str]) -> Mapping[str, Any]:
    fields.refuse_unknown(query, (*_INCLUDE, "include_obfuscation", "starting_after", "stream"))
    if query.get("stream") == "true":
        raise invalid_field("stream", "a stored response cannot be streamed", "request it without stream")
    return (await _get_response(services, tenant, response_id)).answer


async def _delete(services: Services, tenant: str, response_id: str, query: dict[str, str]) -> Mapping[str, Any]:
    fields.refuse_unknown(query, ())
    await _get_response(services, tenant, response_id)
    await services.store.delete_response(tenant, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


async def _cancel(services: Services, tenant: str, response_id: str, query: dict[str, str]) -> Mapping[str, Any]:
    await _get_response(services, tenant, response_id)
    raise invalid_field(
        "response_id",
        "Cannot cancel a synchronous response.",
        "only background responses can be cancelled, and they are not supported: close the connection",
    )


class _InputItemsQuery(requests.Query):
    limit: Annotated[int, Reads(fields.whole(1, 100))] = 20
    order: Annotated[str, Reads(fields.one_of("asc", "desc"))] = "desc"
    after: Annotated[str, Reads(fields.text(200))] | None = None


async def _input_items(services: Services, tenant: str, response_id: str, query: dict[str, str]) -> Mapping[str, Any]:
    given = requests.read_query(_InputItemsQuery, {name: query[name] for name in query if name not in _INCLUDE})
    response = await _get_response(services, tenant, response_id)
    messages = await services.store.messages(response.request_input) if response.request_input else []
    items = [_listed(item, response.id, number) for number, item in enumerate(messages)]
    return _page(items if given.order == "asc" else items[::-1], given.after, given.limit)


def _page(items: list[dict[str, Any]], after: str | None, limit: int) -> Mapping[str, Any]:
    start = 0
    if after is not None:
        start = next((number for number, item in enumerate(items, 1) if item["id"] == after), -1)
        if start < 0:
            raise invalid_field("after", f"there is no item {after!r:.100}", "send the last_id of the page before")
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


def _listed(item: dict[str, Any], response_id: str, number: int) -> dict[str, Any]:
    """An item as OpenAI lists it: with an id, and its text in parts."""
    kind = item.get("type", "message")
    made = f"{_PREFIXES.get(kind, 'item')}_{response_id.removeprefix('resp_')}_{number}"
    listed = {**item, "type": kind, "id": item.get("id") or made}
    if kind == "message":
        listed.setdefault("status", "completed")
        if isinstance(item.get("content"), str):
            part = "output_text" if item.get("role") == "assistant" else "input_text"
            listed["content"] = [{"type": part, "text": item["content"]}]
    return listed


_OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", ""): _get,
    ("DELETE", ""): _delete,
    ("POST", "cancel"): _cancel,
    ("GET", "input_items"): _input_items,
}
