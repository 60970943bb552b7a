"""Bounds on JSON: what is counted, what is refused before and after it is parsed, and what people send passes."""

import json
import random
from typing import Any

import orjson
import pytest

from gateway.errors import GatewayError
from gateway.validation import json_limits
from gateway.validation.json_limits import COUNTED_BYTES, MAX_CONTAINERS, MAX_DEPTH, MAX_NAMES, MAX_VALUES, TooMany


def nested(depth: int, inner: Any = 1) -> Any:
    """Arrays and objects in turns, so many levels deep."""
    for level in range(depth):
        inner = [inner] if level % 2 else {"a": inner}
    return inner


def refusal(text: bytes) -> str:
    """Why a text is refused."""
    with pytest.raises(GatewayError) as caught:
        json_limits.parse(text)
    assert (caught.value.code, caught.value.status) == ("too_complex", 413)
    assert len(caught.value.message) < 200
    return caught.value.message


@pytest.mark.parametrize("depth", [0, 1, MAX_DEPTH - 1, MAX_DEPTH])
def test_what_nests_within_the_bound_is_taken(depth: int) -> None:
    assert json_limits.parse(orjson.dumps(nested(depth))) == nested(depth)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 250, 1000])
def test_what_nests_deeper_is_refused(depth: int) -> None:
    text = b"[" * depth + b"]" * depth
    assert "levels deep" in refusal(text)
    assert "levels deep" in refusal(b'{"a":' * depth + b"1" + b"}" * depth)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"[" + b"{}," * (MAX_CONTAINERS + 1) + b"1]", "arrays and objects"),
        (b"[" + b"[]," * (MAX_CONTAINERS + 1) + b"1]", "arrays and objects"),
        (b"[" + b"1," * (MAX_VALUES + 1) + b"1]", "values"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(MAX_NAMES + 1)) + b"}", "members of objects"),
        (b"[" + b",".join([b'{"a":1,"b":2,"c":3}'] * (MAX_NAMES // 3 + 1)) + b"]", "members of objects"),
        (b'["' + b"," * (json_limits.MAX_QUOTED + 1) + b'"]', "strings included"),
    ],
    ids=["objects", "arrays", "numbers", "names", "names of many objects", "in a string"],
)
def test_what_holds_too_much_is_refused_before_it_is_parsed(text: bytes, what: str) -> None:
    with pytest.raises(TooMany, match=what):
        json_limits.check_text(text)


def test_a_short_text_is_counted_when_it_is_parsed() -> None:
    text = b"[" + b"[]," * (MAX_CONTAINERS + 1) + b"1]"
    assert len(text) < COUNTED_BYTES
    assert "arrays and objects" in refusal(text)
    names = b"{" + b",".join(b'"%d":1' % i for i in range(MAX_NAMES + 1)) + b"}"
    with pytest.raises(TooMany, match="members of objects"):
        json_limits.check_value(orjson.loads(names))
    assert json_limits.parse(b"[" + b"1," * 100 + b"1]", most=101)
    with pytest.raises(GatewayError, match="at most 100"):
        json_limits.parse(b"[" + b"1," * 100 + b"1]", most=100)


LARGE: dict[str, Any] = {
    "a picture": {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "A" * 20_000_000}]}]},
    "several hundred messages": {"messages": [{"role": "user", "content": "x, {y} [z]" * 700}] * 600},
    "a table in a string": {"content": json.dumps([{"a": 1, "b": [2, 3]}] * 150_000)},
    "token ids": {"prompt": list(range(128_000))},
    "inputs to embed": {"input": ["text, " * 100] * 2048},
    "tools": {"tools": [{"properties": {f"p{i}": {"type": "string", "enum": ["a", "b"]} for i in range(2000)}}]},
}


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
def test_what_people_send_passes_however_large(value: Any) -> None:
    assert json_limits.parse(orjson.dumps(value)) == value


def test_strings_are_recognised_wherever_a_chunk_ends() -> None:
    draw = random.Random(5)
    texts = ["," * 50, '"', "\\", "\\" * 7, '\\"', "[{", "a", "😀", "\n"]
    values = [draw.choices(texts, k=draw.randrange(6)) for _ in range(90_000)]
    text = orjson.dumps(values)
    assert len(text) > 2 * COUNTED_BYTES
    assert json_limits._outside_strings(text, MAX_VALUES)[1] == 1 + len(values)
    assert json_limits.parse(text) == values
    run = orjson.dumps(["\\" * 3_000_000, "," * 200_000, "\\" * 1_048_575 + '"', "[" * 200_000])
    assert json_limits._outside_strings(run, MAX_VALUES) == (4, 1, 0)


def test_json_in_a_string_is_looked_into_within_the_same_bounds() -> None:
    assert json_limits.parse_text('{"a": [1, 2]}') == {"a": [1, 2]}
    for text in ("{", "[" * 200 + "]" * 200, "[" + "1," * 5_000_000 + "1]"):
        with pytest.raises(ValueError, match=r"."):
            json_limits.parse_text(text)
