"""Responses that the gateway stores for the Responses API: continue one, or get and delete it by id.

An id that another tenant has is an id that nobody has.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import parse_qsl, unquote

import orjson

from gateway.api import requests
from gateway.api.asgi import bounded_query
from gateway.api.requests import Reads
from gateway.dialects import transcripts
from gateway.dialects.base import Call
from gateway.errors import GatewayError
from gateway.records import Front, Message, StoredResponse
from gateway.validation import fields
from gateway.windows.context import Services

Verb = Callable[[Services, str, str, dict[str, str]], Awaitable[Any]]

_DOOR = b"/v1/responses/"
_INCLUDE = ("include", "include[]")  # accepted and ignored: an answer has everything that there is
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


# --- going on from one


async def resume(services: Services, tenant: str, call: Call) -> tuple[Call, StoredResponse | None]:
    """Put the conversation up to `previous_response_id` in front of a call; return that response, None without one.

    Raises `previous_response_not_found`, `invalid_request`.
    """
    storage = call.storage
    if storage is None or storage.previous is None:
        if storage and storage.conversation:
            await services.recorder.flush()  # what its session holds is what was recorded
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
        raise _refused("previous_response_id", f"response {before.id!r} cannot be continued", "send its output again")
    if not call.messages:
        raise _refused(
            "input", "this input cannot follow a response", "send text, images, tool calls and their outputs"
        )
    return replace(call, front=_front(call, history[1:] if before.instructed else history)), before


def _front(call: Call, history: list[Message]) -> Front:
    """The history between the request's own instructions and its input, system messages of the input included."""
    count = 1 if call.storage and call.storage.instructions else 0
    leading, _ = transcripts.split(call.messages[count:])
    return Front(call.messages[:count], [*history, *leading])


async def _find(services: Services, tenant: str, response_id: str) -> StoredResponse | None:
    """What the store has of an answer. It may have been told to the client by a turn that is not recorded yet."""
    found = await services.store.response(tenant, response_id)
    if found is None:
        await services.recorder.flush()
        found = await services.store.response(tenant, response_id)
    return found


async def _found(services: Services, tenant: str, response_id: str) -> StoredResponse:
    found = await _find(services, tenant, response_id)
    if found is None:
        raise GatewayError("response_not_found", f"Response with id '{response_id:.100}' not found.")
    return found


def _refused(field: str, message: str, hint: str) -> GatewayError:
    return GatewayError("invalid_request", message, hint=hint, details={"field": field})


# --- asking for them


async def serve(services: Services, tenant: str, method: str, target: bytes) -> bytes | None:
    """Answer a request for a kept answer; None where `target` is none of those."""
    if not target.startswith(_DOOR):
        return None
    path, _, query = target.removeprefix(_DOOR).decode("latin-1").partition("?")
    response_id, _, rest = path.partition("/")
    verb = _VERBS.get((method, rest))
    if verb is None or not response_id:
        return None
    bounded_query(query.encode("latin-1"))
    asked = dict(parse_qsl(query, keep_blank_values=True))
    return orjson.dumps(await verb(services, tenant, unquote(response_id), asked))


async def _get(services: Services, tenant: str, response_id: str, query: dict[str, str]) -> Mapping[str, Any]:
    fields.refuse_unknown(query, (*_INCLUDE, "include_obfuscation", "starting_after", "stream"))
    if query.get("stream") == "true":
        raise _refused("stream", "a stored response cannot be streamed", "request it without stream")
    return (await _found(services, tenant, response_id)).answer


async def _delete(services: Services, tenant: str, response_id: str, query: dict[str, str]) -> Mapping[str, Any]:
    fields.refuse_unknown(query, ())
    await _found(services, tenant, response_id)
    await services.store.delete_response(tenant, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


async def _cancel(services: Services, tenant: str, response_id: str, query: dict[str, str]) -> Mapping[str, Any]:
    await _found(services, tenant, response_id)
    raise _refused(
        "response_id",
        "Cannot cancel a synchronous response.",
        "only background responses can be cancelled, and they are not supported: close the connection",
    )


class _InputItemsQuery(requests.Query):
    limit: Annotated[int, Reads(fields.whole(1, 100))] = 20
    order: Annotated[str, Reads(fields.one_of("asc", "desc"))] = "desc"
    after: Annotated[str, Reads(fields.text(200))] | None = None


async def _input_items(services: Services, tenant: str, response_id: str, query: dict[str, str]) -> Mapping[str, Any]:
    asked = requests.read_query(_InputItemsQuery, {name: query[name] for name in query if name not in _INCLUDE})
    found = await _found(services, tenant, response_id)
    items = await services.store.messages(found.request_input) if found.request_input else []
    named = [_named(item, found.id, number) for number, item in enumerate(items)]
    return _page(named if asked.order == "asc" else named[::-1], asked.after, asked.limit)


def _page(items: list[dict[str, Any]], after: str | None, limit: int) -> Mapping[str, Any]:
    start = 0
    if after is not None:
        start = next((number for number, item in enumerate(items, 1) if item["id"] == after), -1)
        if start < 0:
            raise _refused("after", f"there is no item {after!r:.100}", "send the last_id of the page before")
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


def _named(item: dict[str, Any], response_id: str, number: int) -> dict[str, Any]:
    """An item as OpenAI lists it: with an id, and its text in parts."""
    kind = item.get("type", "message")
    made = f"{_PREFIXES.get(kind, 'item')}_{response_id.removeprefix('resp_')}_{number}"
    named = {**item, "type": kind, "id": item.get("id") or made}
    if kind == "message":
        named.setdefault("status", "completed")
        if isinstance(item.get("content"), str):
            part = "output_text" if item.get("role") == "assistant" else "input_text"
            named["content"] = [{"type": part, "text": item["content"]}]
    return named


_VERBS: dict[tuple[str, str], Verb] = {
    ("GET", ""): _get,
    ("DELETE", ""): _delete,
    ("POST", "cancel"): _cancel,
    ("GET", "input_items"): _input_items,
}
