"""The document of the admin API: valid, whole, and of one mind with what is served."""

from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway.api.admin.routes import OPERATIONS
from gateway.errors import CODES
from tests.support import openapi_check
from tests.support.admin_requests import error_of
from tests.support.gateway_process import Gateway

EVERY = [pytest.param(one, id=f"{one.method} {one.path}") for one in OPERATIONS]


def described(method: str, path: str) -> dict[str, Any]:
    """One operation of the document."""
    found: dict[str, Any] = openapi_check.document()["paths"][path][method.lower()]
    return found


def test_the_document_is_served_and_is_valid(gateway: Gateway) -> None:
    served = gateway.http.get("/admin/openapi.json").json()
    OpenAPIV31SpecValidator(served).validate()
    assert served["openapi"].startswith("3.1")
    assert "get" in served["paths"].pop("/admin/openapi.json")
    assert served == openapi_check.document()
    assert sum(len(methods) for methods in served["paths"].values()) == len(OPERATIONS)


@pytest.mark.parametrize("operation", EVERY)
def test_every_operation_says_what_it_does_and_which_errors_it_may_answer(operation: Any) -> None:
    about = described(operation.method, operation.path)
    assert about["summary"][0].isupper()
    assert "\n" not in about["summary"]
    codes = {code for answer in about["responses"].values() for code in answer["description"].split(", ")}
    assert {"invalid_request", "unknown_parameter", "internal"} <= codes
    assert set(operation.codes) <= CODES.keys()
    assert operation.probe or {"unauthorized", "forbidden"} <= codes


def without_text(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != "description"}


def test_bounds_patterns_and_defaults_are_those_that_are_checked() -> None:
    parameters = {p["name"]: without_text(p["schema"]) for p in described("GET", "/admin/windows")["parameters"]}
    assert parameters["limit"] == {"type": "integer", "minimum": 1, "maximum": 100, "default": 50}
    assert parameters["sort_order"] == {"type": "string", "enum": ["asc", "desc"], "default": "desc"}
    body = described("POST", "/admin/windows")["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["session_id", "window_name"]
    assert body["additionalProperties"] is False
    window_name = without_text(body["properties"]["window_name"])
    assert window_name == {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$"}
    assert {"type": "null"} in body["properties"]["tags"]["anyOf"]  # as good as absent
    (name,) = described("POST", "/admin/windows/{name}/thaw")["parameters"]
    assert (name["in"], name["required"]) == ("path", True)


@pytest.mark.parametrize("operation", EVERY)
def test_an_operation_refuses_undocumented_parameters_and_fields(gateway: Gateway, operation: Any) -> None:
    path = operation.path.format(name="w-nobody-made", session_id="s-nobody-had")
    refused = gateway.http.request(operation.method, path, params={"nobody_knows": "1"})
    assert error_of(refused) == (400, "unknown_parameter")
    if operation.takes == "application/json":
        needed = {"q": "x"} if operation.path == "/admin/search" else {}
        refused = gateway.http.request(operation.method, path, params=needed, json={"nobody_knows": 1})
        assert error_of(refused) == (400, "unknown_parameter")
        assert error_of(gateway.http.request(operation.method, path, params=needed, content=b"[]")) == (
            400,
            "invalid_request",
        )


@pytest.mark.parametrize(
    ("status", "more", "said"),
    [(418, {}, "418, which is not documented"), (200, {"totla": 1}, "'totla' was unexpected")],
)
def test_an_answer_that_is_not_documented_fails_the_test_that_sees_it(
    gateway: Gateway, status: int, more: dict[str, int], said: str
) -> None:
    answer = gateway.http.get("/admin/sessions?limit=1")
    other = httpx.Response(status, json={**answer.json(), **more}, request=answer.request)
    with pytest.raises(AssertionError, match=said):
        openapi_check.check(other)
