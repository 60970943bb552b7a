"""Fields: what each accepts and refuses, and that an error names the field and stays short."""

from collections.abc import Callable
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.validation import fields

INF = float("inf")


def refused(read: Callable[..., Any], value: Any) -> GatewayError:
    """The error for a value."""
    with pytest.raises(GatewayError) as caught:
        read("the_field", value)
    assert caught.value.code == "invalid_request"
    assert caught.value.details == {"field": "the_field"}
    assert caught.value.message.startswith("the_field must be ")
    assert len(caught.value.message) < 300
    return caught.value


@pytest.mark.parametrize("value", [-5, 0, 10])
def test_a_whole_number_within_its_bounds(value: int) -> None:
    assert fields.whole(-5, 10)("n", value) == value


@pytest.mark.parametrize("value", [11, -6, 10**30, 1.0, True, "1", None, [1], float("nan")])
def test_invalid_whole_numbers(value: Any) -> None:
    refused(fields.whole(-5, 10), value)


@pytest.mark.parametrize("value", [1, 0.5, 9_999_999_999, 1e-9])
def test_a_duration(value: float) -> None:
    got = fields.seconds("ttl", value)
    assert (got, type(got)) == (value, float)


@pytest.mark.parametrize("value", [0, -1, True, False, "1", INF, -INF, float("nan"), 1e10, 10**300, [1], {}])
def test_invalid_durations(value: Any) -> None:
    refused(fields.seconds, value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1970-01-01", 0.0),
        ("1970-01-02T00:00:00", 86400.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("1970-01-01T00:00:01.5Z", 1.5),
        ("1969-12-31", -86400.0),
    ],
)
def test_a_moment_is_utc_unless_it_names_its_zone(text: str, value: float) -> None:
    assert fields.moment("at", text) == value


@pytest.mark.parametrize(
    "text", ["", "0", "now", "1970-13-01", "1970-02-30", "1970-01-01T25:00", "01/02/1970", "x" * 5000]
)
def test_invalid_times(text: str) -> None:
    refused(fields.moment, text)


def test_the_ends_of_time_are_moments_or_refused_but_never_a_failure() -> None:
    for text in ("0001-01-01", "9999-12-31", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"):
        try:
            moment = fields.moment("the_field", text)
        except GatewayError:
            continue
        assert -7e10 < moment < 3e11


def test_tags_are_few_words_and_each_once() -> None:
    assert fields.tags("tags", ["b", "a", "b", "é"]) == ("b", "a", "é")
    assert fields.tags("tags", []) == ()
    assert len(fields.tags("tags", [f"t{n}" for n in range(20)])) == 20


@pytest.mark.parametrize(
    "value",
    ["a", ("a",), {"a": 1}, None, 7, [1], [None], [["a"]], ["a b"], [""], ["a\n"], [f"t{n}" for n in range(21)]],
)
def test_invalid_tags(value: Any) -> None:
    refused(fields.tags, value)


def test_a_text_has_an_end_and_no_nul() -> None:
    assert fields.text(5)("search", "é" * 5) == "é" * 5
    assert fields.description("description", "x" * 2000) == "x" * 2000
    for value in ("x" * 2001, "a\0b", 7, None, ["x"]):
        refused(fields.description, value)


def test_flags_and_words_are_taken_literally() -> None:
    assert (fields.boolean("f", True), fields.boolean("f", False)) == (True, False)
    for value in ("true", 1, 0, "", None):
        refused(fields.boolean, value)
    one = fields.one_of("cpu", "gpu")
    assert one("warm", "gpu") == "gpu"
    for odd in ("GPU", "", None, 1, ["gpu"], "cpu, gpu"):
        assert "one of cpu, gpu" in refused(one, odd).message
