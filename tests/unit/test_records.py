"""Names and what is computed from records."""

from dataclasses import replace
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.records import TAG, Session, check_session_id, check_window_name
from tests.support.store_records import window

BAD: list[Any] = [
    "", " ", "a ", " a", "a\n", "\na", "a\r", "a b", "-a", ".a", "_a", "a" * 129, "é", "\u0430", "\uff41",
    "a/b", "a\\b", "a@b",
    "a\0", "a%b", "🎉", "\u202ea", None, 7, True, b"a", ["a"], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("value", BAD)
def test_an_invalid_name_is_refused_with_its_field(value: Any) -> None:
    for check, code in ((check_session_id, "invalid_session_id"), (check_window_name, "invalid_window_name")):
        with pytest.raises(GatewayError) as refused:
            check(value, "the field")
        assert (refused.value.code, refused.value.details) == (code, {"field": "the field"})
        assert refused.value.message.startswith("the field ")
        assert len(refused.value.message) < 300


@pytest.mark.parametrize("value", ["a", "0", "A" * 128, "a.b_c-d", "a..", "a--"])
def test_what_is_a_name_is_itself(value: str) -> None:
    assert check_session_id(value) == check_window_name(value) == value


def test_only_sessions_have_colons() -> None:
    assert check_session_id("a:b") == "a:b"
    with pytest.raises(GatewayError):
        check_window_name("a:b")


@pytest.mark.parametrize(
    ("tag", "good"),
    [("a", True), ("é", True), ("日本", True), ("a.b:c-d_e", True), ("-", True), ("a" * 64, True), ("a" * 65, False),
     ("", False), ("a b", False), ("a,b", False), ("a\n", False), ("e\u0301", False), ("🎉", False), ("a/b", False)],
)  # fmt: skip
def test_a_tag_is_a_word(tag: str, good: bool) -> None:
    assert bool(TAG.fullmatch(tag)) is good


@pytest.mark.parametrize(
    ("tokens", "size", "chunks", "tail"), [(10, 4, 2, 2), (8, 4, 2, 0), (8, 4, 1, 4), (3, 0, 0, 3)]
)
def test_the_tail_is_what_no_pinned_chunk_covers(tokens: int, size: int, chunks: int, tail: int) -> None:
    made = replace(window("w"), token_count=tokens, chunk_size=size, chunk_count=chunks)
    assert made.tail_tokens == tail


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Session("t", "s", "l").state = "frozen"  # type: ignore[misc]
