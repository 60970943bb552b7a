"""`cwg demo` says what did not hold: answers that differ, KV that was computed again, salts that leak."""

from dataclasses import replace
from typing import Any

import pytest

from gateway.cli.connection import Failure
from gateway.cli.demo import Round, check_cache, outcome, problems
from gateway.cli.demo_answers import Answer, difference
from gateway.cli.demo_conversations import long_script, short_script
from gateway.windows.comparison import compare

SAID = Answer(
    text="marmalade.",
    tokens=["mar", "malade", "."],
    logprobs=[-0.1, -0.2, -0.3],
    likeliest=[{"mar": -0.1, "a": -2.5}, {"malade": -0.2, "ble": -0.25}, {".": -0.3, "!": -3.0}],
    prompt_tokens=200,
    cached_tokens=192,
)


def changed(position: int, token: str, logprob: float) -> Answer:
    tokens, logprobs = [*SAID.tokens], [*SAID.logprobs]
    tokens[position], logprobs[position] = token, logprob
    return replace(SAID, tokens=tokens, logprobs=logprobs)


def said(other: Answer) -> str:
    return difference(SAID, other, compare(SAID, other))


def test_equal_answers_have_no_difference() -> None:
    seen = compare(SAID, changed(1, "malade", -0.25))
    assert (seen.tokens, round(seen.largest, 6), seen.verdict) == (3, 0.05, "equal")
    assert said(changed(1, "malade", -0.25)) == ""


def test_another_token_is_a_difference() -> None:
    assert said(changed(2, "!", -0.3)) == "differs from token 3 on: '!', not '.'"


def test_another_log_probability_is_a_difference() -> None:
    assert said(changed(0, "mar", -0.4)) == "has another log probability at token 1: 0.300 apart"


def test_a_shorter_answer_is_a_difference() -> None:
    shorter = replace(SAID, tokens=SAID.tokens[:2], logprobs=SAID.logprobs[:2])
    assert said(shorter) == "differs from token 3 on: None, not '.'"


def test_an_answer_up_to_a_tie_is_not_called_identical() -> None:
    tied = changed(1, "ble", -0.2)
    longer = [replace(one, tokens=[*"abc", *one.tokens], logprobs=[-0.1] * 6) for one in (SAID, tied)]
    longer = [replace(one, likeliest=[{}, {}, {}, *one.likeliest]) for one in longer]
    live, after = longer
    seen = lossless()._replace(live=live, after=after)
    assert (problems([seen]), seen.is_identical, seen.tie) == ([], False, 5)
    assert outcome(seen) == "equal up to a tie at token 5"


def test_an_answer_that_is_a_tie_from_the_start_proves_nothing() -> None:
    seen = lossless()._replace(after=changed(1, "ble", -0.2))
    (problem,) = problems([seen])
    assert problem.endswith("is equal only up to a tie at token 2, and so few tokens prove nothing")
    assert not seen.is_identical


def test_answers_without_log_probabilities_are_not_called_equal() -> None:
    empty = Answer()
    assert difference(empty, empty, compare(empty, empty)) == "has no log probabilities to compare"


def lossless() -> Round:
    window = {"kv": "complete", "receipt": {"tokens": 200, "tail_tokens": 8, "chunks": 3, "chunk_size": 64}}
    thawed = {"receipt": {"partial": False, "chunks_found": 3, "chunks_expected": 3}}
    return Round(short_script(), window, thawed, SAID, SAID, replace(SAID, cached_tokens=0))


def test_a_lossless_thaw_has_no_problems() -> None:
    assert problems([lossless(), lossless()]) == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"window": {"kv": "partial"}}, "the freeze stored only 3 chunks of 64 tokens (kv partial)"),
        ({"thawed": {"partial": True, "chunks_found": 1}}, "the thaw found 1 of 3 chunks"),
        ({"after": replace(SAID, cached_tokens=None)}, "the engine does not report cached_tokens"),
        ({"after": replace(SAID, cached_tokens=128)}, "128 tokens came from the cache, not 192"),
        ({"after": replace(SAID, prompt_tokens=7)}, "the prompt has 7 tokens after the thaw, not 200"),
        ({"after": changed(0, "Mar", -0.1)}, "the answer differs from token 1 on: 'Mar', not 'mar'"),
        ({"recomputed": SAID}, "another salt hit 192 tokens: sessions are not isolated"),
    ],
)
def test_what_did_not_hold_is_named(damage: dict[str, Any], problem: str) -> None:
    sound = lossless()
    if "window" in damage:
        damage = {"window": {**sound.window, **damage["window"]}}
    if "thawed" in damage:
        damage = {"thawed": {"receipt": {**sound.thawed["receipt"], **damage["thawed"]}}}
    (found,) = problems([sound, sound._replace(**damage)])
    assert found.startswith(f"short conversation: {problem}")


@pytest.mark.parametrize(
    ("status", "says"), [("not configured", "no cache is configured"), ("unreachable", "the cache is unreachable")]
)
def test_a_stack_without_a_cache_is_refused(status: str, says: str) -> None:
    with pytest.raises(Failure, match=says):
        check_cache({"lmcache": {"status": status}, "tiers": {"disk": {}}})


def test_a_gateway_without_a_durable_tier_is_refused() -> None:
    with pytest.raises(Failure, match=r"no durable tier is configured.*set CWG_KV_DIR or CWG_KV_REDIS_URL"):
        check_cache({"lmcache": {"status": "healthy"}, "tiers": {"cpu": {}, "gpu": {}}})
    for durable in ("disk", "redis"):
        check_cache({"lmcache": {"status": "healthy"}, "tiers": {"cpu": {}, durable: {}}})


@pytest.mark.parametrize(("limit", "most"), [(32_768, 4_000), (2_048, 1_228), (0, 4_000)])
def test_the_long_conversation_fits_into_the_context(limit: int, most: int) -> None:
    def count(text: str) -> int:
        return len(text.split())

    (turn,) = long_script(count, limit).turns
    assert most * 0.9 < count(turn) <= most + 20


def test_cached_tokens_are_those_of_whole_chunks() -> None:
    assert lossless().cacheable == 192
