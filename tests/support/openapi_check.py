"""Whether the admin API answers as its document says: every test that asks a gateway checks that by the way."""

import re
from functools import cache
from typing import Any

import httpx
import orjson
from jsonschema import Draft202012Validator

from gateway.api.admin import openapi
from gateway.api.admin.routes import OPERATIONS


@cache
def document() -> dict[str, Any]:
    """The document, as a client reads it."""
    whole: dict[str, Any] = orjson.loads(orjson.dumps(openapi.document(OPERATIONS)))
    return whole


def check(response: httpx.Response) -> None:
    """Fail where an answer has a status, a type or a body that the document does not name."""
    described = _answers(response.request.method, response.request.url.path)
    if described is None:
        return
    asked = f"{response.request.method} {response.request.url}"
    kind = response.headers.get("content-type", "")
    if kind == "application/x-ndjson":
        return
    assert str(response.status_code) in described, f"{asked} answered {response.status_code}, which is not documented"
    content = described[str(response.status_code)]["content"]
    assert kind in content, f"{asked} answered {kind}, which is not documented"
    if kind == "application/json" and response.request.method != "HEAD":
        wrong = next(_validator(orjson.dumps(content[kind]["schema"])).iter_errors(orjson.loads(response.read())), None)
        assert wrong is None, f"{asked} answered {response.status_code}: {wrong.json_path}: {wrong.message}"


def _answers(method: str, path: str) -> dict[str, Any] | None:
    for pattern, methods in _paths():
        known = methods.get("get" if method == "HEAD" else method.lower())
        if known is not None and pattern.fullmatch(path):
            answers: dict[str, Any] = known["responses"]
            return answers
    return None


@cache
def _paths() -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    paths = sorted(document()["paths"].items(), key=lambda item: item[0].count("{"))  # what is spelt out comes first
    return [(re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), methods) for path, methods in paths]


@cache
def _validator(schema: bytes) -> Draft202012Validator:
    return Draft202012Validator({**orjson.loads(schema), "components": document()["components"]})
