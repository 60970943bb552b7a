"""What the further names of a reply leave out, and whose conversation is recognised by them."""

from collections.abc import Sequence
from typing import Any

import pytest

from gateway.records import Alias, AliasMatch, Session
from gateway.sessions import prefix_chain, reply_aliases, session_match
from gateway.sessions.prefix_chain import ConversationPrefix, Prompt
from tests.integration.sessions.test_changing_clients import Message, assistant, system, tools, user


def known(
    messages: list[Message], reply: Message, names: Sequence[str] = (), *, lineage: str = "s"
) -> list[AliasMatch]:
    """A session whose last reply is known under all of its names."""
    request = ConversationPrefix.of(Prompt(messages, b"", {"tools": tools(*names)}))
    trace = prefix_chain.trace(b"", messages, reply, request)
    return [AliasMatch(Session("t", lineage, lineage), alias, current=True) for alias in trace.aliases]


def judged(messages: list[Message], found: list[AliasMatch], names: Sequence[str] = ()) -> session_match.PrefixMatch:
    request = ConversationPrefix.of(Prompt(messages, b"", {"tools": tools(*names)}))
    verdicts = (session_match.match_reply(reply, found) for reply in request.answered())
    return next((verdict for verdict in verdicts if verdict), session_match.NO_MATCH)


REPLY = assistant("this is what was said in reply to it")


def test_only_a_change_of_both_the_system_prompt_and_the_tools_is_a_sub_agent() -> None:
    found = known([system("a"), user("q")], REPLY, ["f"])
    asked = [user("q"), REPLY, user("next")]
    assert judged([system("b"), *asked], found, ["f"]).how == "last reply"
    assert judged([system("a"), *asked], found, ["g"]).how == "last reply"
    told = judged([system("b"), *asked], found, ["g"])
    assert (told.how, told.forks, told.session and told.session.id) == ("side", True, "s")


def test_two_matches_of_one_lineage_fork_and_of_two_are_ambiguous() -> None:
    messages, asked = [system("a"), user("q")], [system("b"), user("q"), REPLY, user("next")]
    twins = [
        AliasMatch(Session("t", name, "s"), one.alias, current=True) for name in "sx" for one in known(messages, REPLY)
    ]
    assert (judged(asked, twins).how, judged(asked, twins).forks) == ("fork", True)
    both = known(messages, REPLY) + known(messages, REPLY, lineage="other")
    assert (judged(asked, both).how, judged(asked, both).session) == ("ambiguous", None)


def test_a_short_reply_matches_only_with_its_question_and_system_prompt() -> None:
    short = assistant("ok")
    history = [user("a"), assistant("first reply of some length, to be sure"), user("q")]
    found = known([system("s"), *history], short)
    assert judged([system("s"), user("<b>\nq"), short, user("next")], found).how == "last reply"
    assert judged([system("s"), user("other"), short, user("next")], found).session is None
    assert judged([system("t"), user("q"), short, user("next")], found).session is None


@pytest.mark.parametrize("said", [REPLY["content"], "ok"])
def test_a_reply_has_one_name_however_it_is_sent_back(said: str) -> None:
    found = known([system("s"), user("a"), assistant("first reply of some length"), user("q")], assistant(f" {said}\n"))
    for content in (said, [{"type": "text", "text": said}], f"<think>why</think>{said}"):
        asked = [system("s"), user("q"), {"role": "assistant", "content": content}, user("next")]
        assert judged(asked, found).how == "last reply"


def test_a_question_without_words_is_the_same_as_another_one() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    silent = {"role": "tool", "tool_call_id": "1", "content": ""}
    found = known([system("s"), user("q"), call, silent], REPLY)
    assert judged([system("s"), call, silent, REPLY, user("next")], found).how == "last reply"
    assert judged([system("s"), user("q"), REPLY, user("next")], found).session is None


@pytest.mark.parametrize("broken", [None, 5, "text", {"name": 3}, {"function": "f"}, {"function": {"name": None}}])
def test_tools_may_be_anything(broken: Any) -> None:
    assert isinstance(reply_aliases.tool_names({"tools": [broken]}), bytes)
    assert isinstance(reply_aliases.tool_names({"tools": broken}), bytes)


def test_marks_are_read_as_they_were_written() -> None:
    (alias, *_) = known([system("s"), user("one\ntwo\n" * 50 + "x" * 9_000)], REPLY)
    marks = reply_aliases.Marks.read(Alias(*alias.alias).marks)
    assert 2 <= len(marks.lines) <= 32
