"""Hints in the words of `cwg`, for every code."""

import pytest

from gateway.cli.hints import translate_hint
from gateway.errors import CODES


@pytest.mark.parametrize("code", CODES)
def test_hint_of_no_code_speaks_http(code: str) -> None:
    for word in ("/admin/", "Authorization", "x-api-key"):
        assert word not in translate_hint(code, "")


def test_error_without_a_hint_gets_the_remedy_for_its_code() -> None:
    assert translate_hint("engine_timeout", "") == "`engine_timeout_s` sets how long the gateway waits"
    assert translate_hint("engine_timeout", "wait") == "wait"
    assert translate_hint("engine_unreachable", "").endswith("`cwg health` says what is wrong")
    assert translate_hint("model_mismatch", "").endswith("the window with --as-text: the engine computes it then")


def test_message_that_says_it_all_gets_none() -> None:
    assert (translate_hint("invalid_request", ""), translate_hint("gateway_unreachable", "")) == ("", "")
