"""The admin API as an OpenAPI 3.1 document, made from the definitions that serve it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from gateway import __version__
from gateway.api import schemas
from gateway.api.admin.models import responses
from gateway.api.endpoint import Call
from gateway.api.operation import JSON, PLACEHOLDERS, Operation, operation
from gateway.api.schemas import Json
from gateway.errors import CODES

PATH = "/admin/openapi.json"
_ABOUT = """\
Windows and sessions of a Context Window Gateway. Errors have one of the codes that their status lists here; `retryable`
tells whether the same request may succeed later. Parameters that are not listed here are refused. A request that sends
`Accept: application/x-ndjson` gets progress: status 200 with lines of JSON, `{"progress": {...}}`, and as the last
`{"status": ..., "result": ...}` or `{"status": ..., "error": ...}`."""
_KEYS = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}


def documented(operations: Sequence[Operation]) -> Operation:
    """The operation that answers with the document of `operations`, and of itself."""

    @operation("GET", PATH)
    async def openapi(_: Call) -> Json:
        """Describe this API."""
        return whole

    whole = document([*operations, openapi])
    return openapi


def document(operations: Iterable[Operation]) -> Json:
    """Describe `operations`."""
    operations = [*operations]
    answers = [answer for one in operations for answer in one.answers.values()]
    found, definitions = schemas.of_types([responses.Error, *answers], "#/components/schemas/{model}")
    shapes = iter(found[1:])
    paths: dict[str, Json] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method.lower()] = _described(one, shapes)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Context Window Gateway", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": definitions, "securitySchemes": _KEYS},
    }


def _described(operation: Operation, answers: Iterator[Json]) -> Json:
    about: Json = {
        "operationId": operation.handler.__name__,
        "summary": (operation.handler.__doc__ or "").rstrip("."),
        "security": [{}] if operation.probe else [{}, *({name: []} for name in _KEYS)],
        "parameters": [*_parameters(operation)],
        "responses": _answers(operation, answers) | _errors(operation.codes),
    }
    if operation.takes != JSON:
        about["requestBody"] = {"required": True, "content": {operation.takes: {}}}
    elif operation.body.model_fields:
        about["requestBody"] = _body(operation)
    return about


def _parameters(operation: Operation) -> Iterable[Json]:
    for name in operation.placeholders:
        yield {"name": name, "in": "path", "required": True, "schema": PLACEHOLDERS[name][0].schema}
    for name, schema in schemas.of_request(operation.query).get("properties", {}).items():
        kind = schemas.without_null(schema)
        style = {"style": "form", "explode": False} if kind.get("type") == "array" else {}
        yield {"name": name, "in": "query", "schema": kind, **style}


def _body(operation: Operation) -> Json:
    schema = schemas.of_request(operation.body)
    return {"required": "required" in schema, "content": {JSON: {"schema": schema}}}


def _answers(operation: Operation, schemas: Iterator[Json]) -> Json:
    if operation.gives != JSON:
        schema = {"schema": {"type": "string"}} if operation.gives.startswith("text/") else {}
        return {str(operation.status): {"description": "done", "content": {operation.gives: schema}}}
    return {
        str(status): {
            "description": "done" if status == operation.status else "not ready",
            "content": {JSON: {"schema": next(schemas)}},
        }
        for status in operation.answers
    }


def _errors(codes: Iterable[str]) -> Json:
    def status(code: str) -> int:
        return CODES[code].status

    grouped = groupby(sorted(codes, key=status), key=status)
    return {str(number): _error([*some]) for number, some in grouped}


def _error(codes: Sequence[str]) -> Json:
    of_these: Mapping[str, Any] = {"properties": {"error": {"properties": {"code": {"enum": [*codes]}}}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Error"}, of_these]}
    return {"description": ", ".join(codes), "content": {JSON: {"schema": schema}}}
