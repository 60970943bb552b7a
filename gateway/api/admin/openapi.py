"""The admin API as an OpenAPI 3.1 document, made from the very definitions that serve it."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from gateway import __version__
from gateway.api.admin import response_schemas
from gateway.api.admin.schema import ANYTHING
from gateway.api.endpoint import Call
from gateway.api.operation import JSON, PLACEHOLDERS, Json, Operation
from gateway.errors import CODES
from gateway.validation.fields import or_null

PATH = "/admin/openapi.json"
_ABOUT = """\
Windows and sessions of a Context Window Gateway. An error has one of the codes that its status lists here; `retryable`
says whether the same request may succeed later. Parameters that are not named here are refused. A request that sends
`Accept: application/x-ndjson` is told of progress: it is answered 200 with lines of JSON, `{"progress": {...}}`, and
last `{"status": ..., "result": ...}` or `{"status": ..., "error": ...}`."""
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def documented(operations: Sequence[Operation]) -> Operation:
    """The operation that answers with the document of `operations`, and of itself."""

    @partial(Operation, "GET", PATH, ANYTHING)
    async def openapi(_: Call) -> Any:
        """Describe this API."""
        return whole

    whole = document([*operations, openapi])
    return openapi


def document(operations: Iterable[Operation]) -> Json:
    """Describe `operations`."""
    paths: dict[str, Json] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Context Window Gateway", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": {"Error": response_schemas.ERROR}, "securitySchemes": _KEYS},
    }


def _described(operation: Operation) -> Json:
    about: Json = {
        "operationId": operation.verb.__name__,
        "summary": (operation.verb.__doc__ or "").rstrip("."),
        "security": [{}] if operation.probe else [{}, *({name: []} for name in _KEYS)],
        "parameters": [*_parameters(operation)],
        "responses": _answers(operation) | _errors(operation.codes),
    }
    if operation.takes != JSON:
        about["requestBody"] = {"required": True, "content": {operation.takes: {}}}
    elif operation.body:
        about["requestBody"] = _body(operation)
    return about


def _parameters(operation: Operation) -> Iterable[Json]:
    for name in operation.placeholders:
        yield {"name": name, "in": "path", "required": True, "schema": PLACEHOLDERS[name][0].schema}
    for name, known in operation.query.items():
        written = {"style": "form", "explode": False} if known.schema.get("type") == "array" else {}
        yield {"name": name, "in": "query", "schema": known.schema, **written}


def _body(operation: Operation) -> Json:
    properties = {
        name: (known if operation.nulls or name in operation.required else or_null(known)).schema
        for name, known in operation.body.items()
    }
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if operation.required:
        schema["required"] = [*operation.required]
    return {"required": bool(operation.required), "content": {JSON: {"schema": schema}}}


def _answers(operation: Operation) -> Json:
    content: Json = {operation.gives: {"schema": operation.answer} if operation.answer else {}}
    found = {str(operation.status): {"description": "done", "content": content}}
    for status, schema in operation.also.items():
        found[str(status)] = {"description": "not so", "content": {JSON: {"schema": schema}}}
    return found


def _errors(codes: Iterable[str]) -> Json:
    def status(code: str) -> int:
        return CODES[code].status

    grouped = groupby(sorted(codes, key=status), key=status)
    return {str(number): _error([*some]) for number, some in grouped}


def _error(codes: Sequence[str]) -> Json:
    of_these: Mapping[str, Any] = {"properties": {"error": {"properties": {"code": {"enum": [*codes]}}}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Error"}, of_these]}
    return {"description": ", ".join(codes), "content": {JSON: {"schema": schema}}}
