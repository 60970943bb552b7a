"""Titles of conversations."""

import unicodedata
from typing import Any

import pytest

from gateway.dialects.titles import MAX_TITLE, title_of


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


REMINDER = "<system-reminder>\nToday is Monday. <b>Be brief.</b>\n</system-reminder>\n"


@pytest.mark.parametrize(
    ("messages", "title"),
    [
        ([user("Hello there")], "Hello there"),
        ([{"role": "system", "content": "You help."}, user("Why?")], "Why?"),
        ([{"role": "assistant", "content": "Hi"}, user("Why?"), user("later")], "Why?"),
        ([user([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}, 1])], "see"),
        ([user(" two\n\n\tlines \u2028 of it\r\n")], "two lines of it"),
        ([user("")], None),
        ([user(None)], None),
        ([user(" \n\x00\u202e"), user("second")], "second"),
        ([], None),
        ([{"role": "text", "content": "Once upon"}], "Once upon"),
        ([{"role": "tokens", "content": [1, 2]}], None),
        ([{"role": ["user"], "content": "odd"}, user("x")], "x"),
        ([user(REMINDER + "Fix the build")], "Fix the build"),
        ([user([{"type": "text", "text": REMINDER}, {"type": "text", "text": "Fix it"}])], "Fix it"),
        ([user("<environment_context cwd='/'>a</environment_context>"), user("Go on")], "Go on"),
        ([user(REMINDER)], "<system-reminder> Today is Monday. <b>Be brief.</b> </system-reminder>"),
        ([user("<system-reminder> is never closed")], "<system-reminder> is never closed"),
        ([user("<table><tr>what is wrong here?</table>")], "<table><tr>what is wrong here?</table>"),
        ([user("請求書はどこですか")], "請求書はどこですか"),
        ([user("\u202eevil\u2066 a\x1b[2Jb \u200fc\x07")], "evil a [2Jb c"),
        (
            [user("👩\u200d🔬 and \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")],
            "👩\u200d🔬 and \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
    ],
)
def test_title_is_the_beginning_of_the_first_user_message(messages: list[dict[str, Any]], title: str | None) -> None:
    assert title_of(messages) == title


@pytest.mark.parametrize(
    "text",
    [
        "word " * 200_000,
        "x" * 1_000_000,
        " " * 1_000_000 + "end",
        "<a_" + "_" * 1_000_000,
        "漢" * 81,
        "<a-b " * 100_000,
    ],
)
def test_title_of_a_long_message_is_cut(text: str) -> None:
    title = title_of([user(text)])
    assert title is not None
    assert len(title) <= MAX_TITLE
    assert title == "end" or title.endswith("…")


def test_every_character_is_harmless_in_a_title() -> None:
    for start in range(0, 0xD800, 64):
        title = title_of([user("a" + "".join(map(chr, range(start, start + 64))) + "b")]) or ""
        assert len(title) <= MAX_TITLE
        assert {unicodedata.category(char) for char in title} & {"Cc", "Zl", "Zp"} == set()
        assert not {unicodedata.bidirectional(char) for char in title} & {
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
        }
