"""Requests as models: what is absent, null, missing or unknown, and that an error names the field."""

from typing import Annotated, Any

import pytest

from gateway.api import parameters, schemas
from gateway.api.requests import Body, Changes, Query, Reads, codes, read
from gateway.errors import GatewayError
from gateway.validation.fields import or_null

Name = Annotated[str, Reads(parameters.window_name)]
Count = Annotated[int, Reads(parameters.count(1, 9))]


class Make(Body):
    name: Name
    count: Count = 3
    parent: Name | None = None


class Change(Changes):
    count: Annotated[int | None, Reads(or_null(parameters.count(1, 9)))] = None


class Page(Query):
    limit: Annotated[int, Reads(parameters.whole(1, 9))] = 5


def refused(model: type[Any], given: dict[str, Any]) -> tuple[str, str, str]:
    with pytest.raises(GatewayError) as caught:
        read(model, given)
    return caught.value.code, caught.value.details["field"], caught.value.message


def test_null_is_as_good_as_absent_in_a_body() -> None:
    made = read(Make, {"name": "a", "count": None, "parent": None})
    assert (made.name, made.count, made.parent) == ("a", 3, None)


def test_null_is_a_value_where_something_is_changed() -> None:
    assert read(Change, {"count": None}).given() == {"count": None}
    assert read(Change, {}).given() == {}


@pytest.mark.parametrize("given", [{}, {"name": None}])
def test_a_required_field_that_is_missing_is_named(given: dict[str, Any]) -> None:
    assert refused(Make, given) == ("invalid_request", "name", "name is missing")


def test_an_unknown_field_is_refused_before_anything_else() -> None:
    assert refused(Make, {"count": 0, "nmae": "a"}) == ("unknown_parameter", "nmae", "unknown parameter 'nmae'")


def test_an_error_has_the_code_of_its_parameter_and_names_the_field() -> None:
    assert refused(Make, {"name": "a", "parent": "/"})[:2] == ("invalid_window_name", "parent")
    assert refused(Page, {"limit": "10"}) == (
        "invalid_request", "limit", "limit must be a whole number from 1 to 9, not '10'"
    )  # fmt: skip
    assert codes(Make) == {"invalid_request", "invalid_window_name"}


def test_the_schema_is_closed_and_says_where_null_is_taken() -> None:
    _, definitions = schemas.of_types([Make, Change], mode="validation")
    made, changed = definitions["Make"], definitions["Change"]
    assert (made["additionalProperties"], made["required"]) == (False, ["name"])
    count = {"type": "integer", "minimum": 1, "maximum": 9}
    assert made["properties"]["count"] == {"anyOf": [{**count, "default": 3}, {"type": "null"}]}
    assert changed["properties"]["count"] == {"anyOf": [count, {"type": "null"}]}
    assert made["properties"]["name"]["type"] == "string"
