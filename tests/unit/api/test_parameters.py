"""Parameters: what each reader takes, what it refuses, and that a refusal names the field and stays short."""

from collections.abc import Callable
from typing import Any

import pytest

from gateway.api import parameters
from gateway.errors import GatewayError

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


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-0", 0), ("-5", -5), ("10", 10), ("007", 7)])
def test_a_whole_number_within_its_bounds(text: str, value: int) -> None:
    assert parameters.whole(-5, 10)("n", text) == value


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "+1", "1.0", "1e1", "0x1", "1_0", "11", "-6", "--1", "-", "٣", "²", "9" * 5000, "one"]
)
def test_what_is_no_whole_number_within_its_bounds(text: str) -> None:
    refused(parameters.whole(-5, 10), text)


@pytest.mark.parametrize("value", [1, 0.5, 9_999_999_999, 1e-9])
def test_a_duration(value: float) -> None:
    got = parameters.seconds("ttl", value)
    assert (got, type(got)) == (value, float)


@pytest.mark.parametrize("value", [0, -1, True, False, "1", INF, -INF, float("nan"), 1e10, 10**300, [1], {}])
def test_what_is_no_duration(value: Any) -> None:
    refused(parameters.seconds, value)


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
    assert parameters.when("at", text) == value


@pytest.mark.parametrize(
    "text", ["", "0", "now", "1970-13-01", "1970-02-30", "1970-01-01T25:00", "01/02/1970", "x" * 5000]
)
def test_what_is_no_moment(text: str) -> None:
    refused(parameters.when, text)


def test_the_ends_of_time_are_moments_or_refused_but_never_a_failure() -> None:
    for text in ("0001-01-01", "9999-12-31", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"):
        try:
            moment = parameters.when("the_field", text)
        except GatewayError:
            continue
        assert -7e10 < moment < 3e11


def test_tags_are_few_words_and_each_once() -> None:
    assert parameters.tags("tags", ["b", "a", "b", "é"]) == ("b", "a", "é")
    assert parameters.tags("tags", []) == ()
    assert len(parameters.tags("tags", [f"t{n}" for n in range(20)])) == 20


@pytest.mark.parametrize(
    "value",
    ["a", ("a",), {"a": 1}, None, 7, [1], [None], [["a"]], ["a b"], [""], ["a\n"], [f"t{n}" for n in range(21)]],
)
def test_what_are_no_tags(value: Any) -> None:
    refused(parameters.tags, value)


def test_a_text_has_an_end_and_no_nul() -> None:
    assert parameters.text("search", "é" * 5, longest=5) == "é" * 5
    assert parameters.description("description", "x" * 2000) == "x" * 2000
    for value in ("x" * 2001, "a\0b", 7, None, ["x"]):
        refused(parameters.description, value)


def test_flags_and_words_are_taken_literally() -> None:
    assert (parameters.flag("f", "true"), parameters.flag("f", "false")) == (True, False)
    for value in ("True", "1", "yes", "", " true"):
        refused(parameters.flag, value)
    one = parameters.one_of("cpu", "gpu")
    assert one("warm", "gpu") == "gpu"
    for odd in ("GPU", "", None, 1, ["gpu"], "cpu, gpu"):
        assert "one of cpu, gpu" in refused(one, odd).message


def test_a_table_reads_each_field_leaves_out_null_and_refuses_what_it_does_not_know() -> None:
    known = {"n": parameters.whole(0, 9), "tags": parameters.tags}
    assert parameters.read({"n": "3", "tags": None}, known) == {"n": 3}
    assert parameters.read({}, known) == {}
    with pytest.raises(GatewayError) as unknown:
        parameters.read({"n": "3", "tag": ["a"]}, known)
    assert (unknown.value.code, unknown.value.hint) == ("unknown_parameter", "did you mean 'tags'?")
    with pytest.raises(GatewayError) as unknown:
        parameters.read({"x" * 9999: 1}, known)
    assert unknown.value.hint == "known names: n, tags"
    assert len(unknown.value.message) < 200
    for given in ({}, {"n": None}):
        with pytest.raises(GatewayError, match="n is missing") as missing:
            parameters.read(given, known, ("n",))
        assert missing.value.details == {"field": "n"}
