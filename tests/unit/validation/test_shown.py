"""Values from outside in error messages: short and printable, however large or deep they are."""

from typing import Any

import pytest

from gateway.validation.shown import shown
from policies.contract import abbreviated

NESTED: list[Any] = []
for _ in range(5000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "value", [NESTED, {str(i): i for i in range(100_000)}, ["x" * 10**6] * 1000, "x" * 10**7, 10**3000, "\x1b]0;"]
)
def test_any_value_can_be_shown(value: Any) -> None:
    text = shown(value)
    assert len(text) <= 100
    assert text.isprintable()


def test_an_ordinary_value_is_shown_as_it_is() -> None:
    for value in ("x", 1, None, True, [1, "a"], {"a": 1}, 1.5):
        assert shown(value) == repr(value)


@pytest.mark.parametrize(
    "value", [NESTED, {str(i): i for i in range(100_000)}, ["x" * 10**6] * 1000, "x" * 10**7, "\x1b]0;"]
)
def test_policy_error_abbreviates_any_value(value: Any) -> None:
    text = abbreviated(value)
    assert len(text) <= 102
    assert text.isprintable()


def test_policy_error_repeats_a_small_value() -> None:
    for value in ("x", 1, None, True, [], {}, 1.5):
        assert abbreviated(value) == repr(value)
