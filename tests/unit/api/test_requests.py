"""Requests as models: what is absent, null, missing or unknown, and that an error names the field."""

from typing import Annotated, Any

import pytest

from gateway.api import schemas
from gateway.api.requests import Body, Changes, Query, Reads, codes, read, read_query
from gateway.errors import GatewayError
from gateway.validation import fields
from gateway.validation.fields import or_null

Name = Annotated[str, Reads(fields.window_name)]
Count = Annotated[int, Reads(fields.whole(1, 9))]


class Make(Body):
    name: Name
    count: Count = 3
    parent: Name | None = None


class Change(Changes):
    count: Annotated[int | None, Reads(or_null(fields.whole(1, 9)))] = None


class Page(Query):
    limit: Annotated[int, Reads(fields.whole(-5, 10))] = 5
    deep: Annotated[bool, Reads(fields.boolean)] = False
    name: Name | None = None


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
    assert refused(Page, {"limit": 11}) == (
        "invalid_request", "limit", "limit must be a whole number from -5 to 10, not 11"
    )  # fmt: skip
    assert codes(Make) == {"invalid_request", "invalid_window_name"}


def test_the_schema_is_closed_and_declares_where_null_is_accepted() -> None:
    _, definitions = schemas.of_types([Make, Change], mode="validation")
    made, changed = definitions["Make"], definitions["Change"]
    assert (made["additionalProperties"], made["required"]) == (False, ["name"])
    count = {"type": "integer", "minimum": 1, "maximum": 9}
    assert made["properties"]["count"] == {"anyOf": [{**count, "default": 3}, {"type": "null"}]}
    assert changed["properties"]["count"] == {**count, "type": ["integer", "null"]}
    assert made["properties"]["name"]["type"] == "string"


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-0", 0), ("-5", -5), ("10", 10), ("007", 7)])
def test_a_number_in_a_query(text: str, value: int) -> None:
    assert read_query(Page, {"limit": text}).limit == value


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "+1", "1.0", "1e1", "0x1", "1_0", "11", "-6", "--1", "-", "٣", "²", "9" * 5000, "one"]
)
def test_what_is_no_number_in_a_query(text: str) -> None:
    with pytest.raises(GatewayError, match=r"^limit must be a whole number from -5 to 10") as caught:
        read_query(Page, {"limit": text})
    assert (caught.value.details, len(caught.value.message) < 300) == ({"field": "limit"}, True)


def test_booleans_in_a_query_are_true_and_false() -> None:
    assert [read_query(Page, {"deep": text}).deep for text in ("true", "false")] == [True, False]
    for text in ("True", "1", "yes", "", " true"):
        with pytest.raises(GatewayError, match=r"^deep must be true or false"):
            read_query(Page, {"deep": text})


def test_text_in_a_query_stays_text() -> None:
    assert read_query(Page, {"name": "1"}).name == "1"
    with pytest.raises(GatewayError) as unknown:
        read_query(Page, {"x" * 9999: "1"})
    assert unknown.value.hint == "known names: limit, deep, name"
    assert len(unknown.value.message) < 200


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(GatewayError) as unknown:
        read(Make, {"nam": "a"})
    assert (unknown.value.code, unknown.value.hint) == ("unknown_parameter", "did you mean 'name'?")
