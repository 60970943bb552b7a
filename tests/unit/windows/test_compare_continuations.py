"""When two continuations are equal: which differences prove something, and which do not."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from gateway.windows.replay import Continuation, compare_continuations

WHOLE = 64
CONTROL = Continuation(
    ids=[1, 2, 3],
    tokens=["a", "b", "c"],
    logprobs=[-1.0, -1.0, -1.0],
    likeliest=[{"a": -1.0, "x": -2.0}, {"b": -1.0, "y": -1.05}, {"c": -1.0, "z": -3.0}],
    prompt_tokens=70,
    cached_tokens=None,
)
SAME = replace(CONTROL, cached_tokens=WHOLE)


def parting(ids: Sequence[int], tokens: Sequence[str], second: dict[str, float]) -> Continuation:
    """What says another second token, and something else after it."""
    likeliest = [CONTROL.likeliest[0], second, {"q": -0.1}]
    return replace(SAME, ids=ids, tokens=tokens, logprobs=[-1.0, -1.02, -0.1], likeliest=likeliest)


def test_same_tokens_are_equal_only_if_kv_was_used() -> None:
    assert compare_continuations("disk", CONTROL, SAME, WHOLE).equal
    assert compare_continuations("disk", CONTROL, SAME, WHOLE).tokens_compared == 3
    assert not compare_continuations("disk", CONTROL, replace(SAME, cached_tokens=WHOLE - 16), WHOLE).equal


def test_near_tie_ends_the_comparison() -> None:
    seen = compare_continuations("disk", CONTROL, parting([1, 9, 9], ["a", "y", "q"], {"b": -1.04, "y": -1.02}), WHOLE)
    assert (seen.equal, seen.first_difference, seen.tokens_compared) == (True, None, 2)


@pytest.mark.parametrize("second", [{"b": -1.9, "y": -1.02}, {"y": -1.02}, {"b": -1.0, "y": -0.2}])
def test_less_likely_token_is_a_difference(second: dict[str, float]) -> None:
    seen = compare_continuations("disk", CONTROL, parting([1, 9, 9], ["a", "y", "q"], second), WHOLE)
    assert not seen.equal
    assert seen.first_difference is not None
    assert (seen.first_difference.position, seen.first_difference.token_id) == (1, 9)


def test_other_probabilities_are_a_difference() -> None:
    seen = compare_continuations("disk", CONTROL, replace(SAME, logprobs=[-1.0, -1.2, -1.0]), WHOLE)
    assert (seen.equal, seen.first_difference.position if seen.first_difference else None) == (False, 1)
