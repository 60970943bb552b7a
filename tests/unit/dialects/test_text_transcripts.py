"""A conversation that is one text, or one row of token ids: what of it a turn lacks, and what it becomes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import text_transcripts, transcripts
from gateway.errors import GatewayError
from gateway.records import Front


def text(content: str) -> list[dict[str, Any]]:
    return [{"role": "text", "content": content}]


def row(*ids: int) -> list[dict[str, Any]]:
    return [{"role": "tokens", "content": list(ids)}]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
STORY = "Once upon a time there was a king."


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        (text("x"), "text"),
        (row(1), "tokens"),
        ([*row(1), *text("x")], "tokens"),
        (CHAT, ""),
        ([], ""),
        ([*text("a custom role in a chat"), CHAT[1]], ""),
    ],
)
def test_a_conversation_is_a_text_where_nothing_in_it_is_a_chat(messages: list[dict[str, Any]], kind: str) -> None:
    assert text_transcripts.kind(messages) == kind


@pytest.mark.parametrize(
    "sent",
    [STORY, STORY + " He", STORY[:-1], STORY[:-1] + "! And", STORY.rstrip(".") + ", who", STORY[:20] + "was a queen."],
)
def test_a_text_that_has_most_of_the_window_in_it_is_the_whole(sent: str) -> None:
    assert transcripts.missing(text(STORY), text(sent), "") is None


@pytest.mark.parametrize("sent", [" He", "O", "Once more", "\n", "king", STORY[:17], "x" + STORY])
def test_any_other_text_is_what_is_new(sent: str) -> None:
    front = transcripts.missing(text(STORY), text(sent), "")
    assert front == Front(None, text(STORY))
    assert transcripts.merged(front, text(sent)) == text(STORY + sent)


def test_rows_of_ids_continue_as_texts_do() -> None:
    window = row(1, 5, 6, 7)
    assert transcripts.missing(window, row(1, 5, 6, 7, 8), "") is None
    front = transcripts.missing(window, row(1, 9), "")
    assert front is not None
    assert transcripts.merged(front, row(1, 9)) == row(1, 5, 6, 7, 1, 9)


@pytest.mark.parametrize(
    ("window", "sent", "says"),
    [
        (text("x"), CHAT, "from a text, which a chat cannot follow"),
        (CHAT, text("x"), "from a chat, which a text cannot follow"),
        (row(1), text("x"), "from a list of token ids, which a text cannot follow"),
        (text("x"), row(1), "from a text, which a list of token ids cannot follow"),
        (row(1), CHAT, "from a list of token ids, which a chat cannot follow"),
        (CHAT, row(1), "from a chat, which a list of token ids cannot follow"),
    ],
)
def test_one_kind_cannot_follow_another_and_the_refusal_says_where_to_go(window: Any, sent: Any, says: str) -> None:
    with pytest.raises(GatewayError, match=says) as refused:
        transcripts.missing(window, sent, "")
    assert refused.value.code == "invalid_request"
    assert ("/v1/chat/completions" if window is CHAT else "/v1/completions") in refused.value.hint


def test_a_reply_extends_the_text_and_the_ids_where_it_has_any() -> None:
    reply = {"role": "text", "content": " He", "token_ids": [8, 9]}
    plain = {"role": "text", "content": " He"}
    assert transcripts.followed(text("king."), reply, echoes=False) == text("king. He")
    assert transcripts.followed(row(1, 2), reply, echoes=False) == row(1, 2, 8, 9)
    assert transcripts.followed(row(1, 2), plain, echoes=False) == [*row(1, 2), *text(" He")]
    assert transcripts.followed(text("king."), {**plain, "content": "king. He"}, echoes=True) == text("king. He")
    assert transcripts.followed(CHAT, plain, echoes=False) == [*CHAT, plain]


def test_no_conversation_is_changed_on_the_way() -> None:
    window, sent = row(1, 2), row(3)
    transcripts.followed(window, {"role": "text", "content": "x", "token_ids": [4]}, echoes=False)
    transcripts.merged(Front(None, window), sent)
    assert (window, sent) == (row(1, 2), row(3))


@given(st.text(alphabet="ab", max_size=40), st.text(alphabet="ab", max_size=40))
def test_what_two_texts_share_is_their_longest_common_beginning(one: str, other: str) -> None:
    length = text_transcripts.shared(one, other)
    assert one[:length] == other[:length]
    assert length in (len(one), len(other)) or one[length] != other[length]
    assert text_transcripts.shared(list(map(ord, one)), list(map(ord, other))) == length
