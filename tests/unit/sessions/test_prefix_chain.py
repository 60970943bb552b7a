"""Which session a request belongs to, by its id and by its conversation: the rules, without a gateway."""

from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.records import SESSION_ID, Session, subconversation_id
from gateway.sessions import prefix_chain, session_match
from gateway.sessions.client_ids import ClientSessionId, read_client_session_id
from gateway.sessions.prefix_chain import ConversationPrefix, Prompt
from tests.support.conversations import SYSTEM, assistant, at, user


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        (
            {"x-session-id": "mine"},
            {"metadata": {"session_id": "b"}},
            ClientSessionId("session", "mine", "header x-session-id"),
        ),
        ({"x-session-id": "o1", "x-session-affinity": "o1"}, {}, ClientSessionId("agent", "o1", "header x-session-id")),
        (
            {"x-session-id": "o1", "x-session-affinity": "p"},
            {},
            ClientSessionId("session", "o1", "header x-session-id"),
        ),
        (
            {"x-claude-code-session-id": "c1"},
            {"metadata": {"user_id": "user_1_account__session_zzz"}},
            ClientSessionId("agent", "c1", "header x-claude-code-session-id"),
        ),
        (
            {"x-claude-code-session-id": "c1", "x-claude-code-agent-id": "a2"},
            {},
            ClientSessionId("agent", "c1:a2", "header x-claude-code-session-id", "c1"),
        ),
        (
            {"x-codex-turn-metadata": '{"session_id":"s","thread_id":"t","turn_id":"7"}', "session_id": "other"},
            {},
            ClientSessionId("agent", "t", "header x-codex-turn-metadata"),
        ),
        (
            {"x-codex-turn-metadata": "no json", "session_id": "s"},
            {},
            ClientSessionId("agent", "s", "header session_id"),
        ),
        (
            {"session-id": "s", "x-openai-subagent": "review"},
            {},
            ClientSessionId("agent", "s:review", "header session-id", "s"),
        ),
        ({"x-litellm-session-id": "l"}, {}, ClientSessionId("agent", "l", "header x-litellm-session-id")),
        ({"x-dynamo-session-id": "d"}, {}, ClientSessionId("agent", "d", "header x-dynamo-session-id")),
        ({"x-openwebui-chat-id": "o"}, {}, ClientSessionId("agent", "o", "header x-openwebui-chat-id")),
        ({"x-conversation-id": "v"}, {}, ClientSessionId("agent", "v", "header x-conversation-id")),
        (
            {"helicone-session-id": "h", "langfuse-session-id": "f"},
            {},
            ClientSessionId("agent", "h", "header helicone-session-id"),
        ),
        ({"langfuse_session_id": "f"}, {}, ClientSessionId("agent", "f", "header langfuse_session_id")),
        ({"x-client-request-id": "r", "x-correlation-id": "c"}, {}, None),
        ({}, {"metadata": {"session_id": "b"}}, ClientSessionId("session", "b", "body metadata.session_id")),
        (
            {},
            {"metadata": {"user_id": "user_ab12_account__session_0d3f-9"}},
            ClientSessionId("agent", "0d3f-9", "body metadata.user_id"),
        ),
        (
            {},
            {"metadata": {"user_id": '{"device_id":"d","account_uuid":"","session_id":"0d3f-9"}'}},
            ClientSessionId("agent", "0d3f-9", "body metadata.user_id"),
        ),
        ({}, {"metadata": {"user_id": "user-17"}}, None),
        ({}, {"conversation": {"id": "conv_1"}}, ClientSessionId("session", "conv_1", "body conversation")),
        ({}, {"conversation": "conv_1"}, ClientSessionId("session", "conv_1", "body conversation")),
        ({}, {"prompt_cache_key": "k"}, ClientSessionId("key", "k", "body prompt_cache_key")),
        ({}, {"metadata": "odd", "conversation": 5, "prompt_cache_key": None}, None),
    ],
)
def test_the_first_id_that_a_request_brings_names_its_session(
    headers: dict[str, str], body: dict[str, Any], expected: ClientSessionId | None
) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert read_client_session_id(raw, body, None) == expected


def test_the_base_url_wins_over_everything() -> None:
    assert read_client_session_id([(b"x-session-id", b"h")], {}, "url") == ClientSessionId("session", "url", "base URL")


def test_a_foreign_id_that_does_not_fit_is_hashed_and_ours_is_refused() -> None:
    named = read_client_session_id([(b"x-litellm-session-id", b"has spaces/and\\more")], {}, None)
    assert named is not None
    assert named.id.startswith("x-")
    with pytest.raises(GatewayError, match="X-Session-ID"):
        read_client_session_id([(b"x-session-id", b"has spaces")], {}, None)


def test_the_name_of_a_side_conversation_fits_and_begins_with_its_agents() -> None:
    for length in (1, 110, 111, 112, 127, 128):
        main = "a" * length
        side = subconversation_id(main, prefix_chain.head([user("title of work")]))
        assert SESSION_ID.fullmatch(side)
        assert side.startswith(f"{main[:111]}:")
        assert side != subconversation_id(main, prefix_chain.head([user("another")]))


def verdict(request: list[dict[str, Any]], known: int, *candidates: Session) -> session_match.PrefixMatch:
    beginning = ConversationPrefix.of(Prompt(request, b""))
    return session_match.match_by_prefix(beginning, beginning.prefix_hashes[known - 1] if known else None, candidates)


FIRST = [SYSTEM, user("one"), assistant("1")]


SECOND = [*FIRST, user("two"), assistant("2")]


def test_the_next_turn_continues() -> None:
    told = verdict([*FIRST, user("two")], 3, at(FIRST))
    assert (told.session and told.session.id, told.forks, told.how) == ("s", False, "prefix")


def test_several_new_messages_continue() -> None:
    told = verdict([*FIRST, user("two"), user("three")], 3, at(FIRST))
    assert (told.session is not None, told.forks) == (True, False)


def test_of_two_sessions_with_one_prefix_the_one_that_ends_there_continues() -> None:
    told = verdict([*FIRST, user("two")], 3, at(SECOND, name="further"), at(FIRST, name="here"))
    assert told.session is not None
    assert told.session.id == "here"


def test_continuing_an_older_reply_is_a_fork() -> None:
    told = verdict([*FIRST, user("another")], 3, at(SECOND))
    assert (told.session and told.session.id, told.forks, told.how) == ("s", True, "fork")


def test_an_edited_history_forks_from_the_last_common_reply() -> None:
    told = verdict([*FIRST, user("edited"), assistant("2"), user("three")], 3, at(SECOND))
    assert told.forks


def test_the_same_turn_again_is_a_retry() -> None:
    told = verdict([*FIRST, user("two")], 4, at(SECOND))
    assert (told.session is not None, told.forks, told.how) == (True, False, "retry")


def test_an_unanswered_first_question_is_a_retry_and_an_answered_one_is_not() -> None:
    assert verdict(FIRST[:2], 2, at(FIRST[:2], answered=False)).how == "retry"
    assert verdict(FIRST[:2], 2, at(FIRST)).session is None


def test_an_answered_and_an_unanswered_session_with_one_question_differ() -> None:
    told = verdict(FIRST[:2], 2, at(FIRST, name="answered"), at(FIRST[:2], answered=False, name="waiting"))
    assert told.session is not None
    assert told.session.id == "waiting"


def test_a_cut_reply_that_is_sent_back_continues() -> None:
    told = verdict([*FIRST[:2], assistant("half of"), user("go on")], 2, at(FIRST[:2], answered=False))
    assert (told.session is not None, told.forks) == (True, False)


def test_a_changed_reply_continues_unless_others_asked_the_same() -> None:
    request = [*FIRST[:2], assistant("one"), user("two")]
    assert verdict(request, 2, at(FIRST)).session is not None
    assert verdict(request, 2, at(FIRST), at([*FIRST[:2], assistant("eins")], name="other")).session is None


def test_a_shared_system_prompt_or_question_makes_no_conversation() -> None:
    assert verdict([SYSTEM, user("two")], 0).session is None
    assert verdict([*FIRST[:2], user("more")], 2, at(FIRST)).session is None


@pytest.mark.parametrize(
    "sent",
    [
        assistant("1", refusal=None, tool_calls=[]),
        assistant(" 1\n"),
        {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
        assistant("1", reasoning="because"),
        assistant("<think>\nbecause\n</think>\n\n1"),
    ],
)
def test_what_clients_change_on_the_way_changes_no_link(sent: dict[str, Any]) -> None:
    assert prefix_chain.link(b"", sent) == prefix_chain.link(b"", assistant("1"))


def test_unterminated_reasoning_is_the_whole_reply() -> None:
    assert prefix_chain.link(b"", assistant("<think>1")) != prefix_chain.link(b"", assistant("<think>2"))
    assert prefix_chain.link(b"", assistant("<think>1</think>")) != prefix_chain.link(
        b"", assistant("<think>2</think>")
    )


def test_an_empty_tool_result_equals_a_part_without_text() -> None:
    silent = {"role": "tool", "tool_call_id": "c1", "content": ""}
    assert prefix_chain.link(b"", {**silent, "content": [{"type": "text", "text": ""}]}) == prefix_chain.link(
        b"", silent
    )


def test_tool_calls_are_the_same_however_their_arguments_are_spelt() -> None:
    def call(arguments: str, **more: Any) -> dict[str, Any]:
        function = {"name": "add", "arguments": arguments}
        return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function, **more}]}

    one = prefix_chain.link(b"", call('{"b": 1.0, "a": [2]}'))
    assert one == prefix_chain.link(b"", call('{"a":[2],"b":1}', index=0))
    assert one != prefix_chain.link(b"", call('{"a":[2],"b":1.5}'))
    for number in ("1" + "0" * 20, "-9223372036854775809", "18446744073709551616", "1e300"):
        huge = prefix_chain.link(b"", call(f'{{"n": {number}}}'))
        assert huge == prefix_chain.link(b"", call(f'{{"n":{number}}}', index=0))
        assert huge != one
    assert prefix_chain.link(b"", call('{"n": 1e18}')) == prefix_chain.link(b"", call('{"n": 1000000000000000000}'))


def test_the_seed_keeps_apart_what_the_client_keeps_apart() -> None:
    seeds = [
        prefix_chain.seed({}, "", ""),
        prefix_chain.seed({"user": "a"}, "", ""),
        prefix_chain.seed({"user": "b"}, "", ""),
        prefix_chain.seed({"safety_identifier": "c"}, "", ""),
        prefix_chain.seed({"safety_identifier": "d"}, "", ""),
        prefix_chain.seed({}, "a", ""),
        prefix_chain.seed({}, "", "a"),
    ]
    assert len(set(seeds)) == len(seeds)


def test_a_message_that_nests_too_deep_is_refused() -> None:
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    with pytest.raises(GatewayError, match="cannot be written as JSON"):
        prefix_chain.link(b"", {"role": "user", "content": deep})
