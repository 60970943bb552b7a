"""Which session a request belongs to: by its id, by its own beginning, and what must never be taken for the same."""

import secrets
import threading
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.records import SESSION_ID, Session
from gateway.sessions import prefix_chain
from gateway.sessions.prefix_chain import ClientSessionId, ConversationPrefix, Prompt, read_client_session_id
from tests.support.fakes.engine import MODEL, WITHIN, Exchange, FakeEngine, usage_of, whole_reply
from tests.support.gateway_process import Gateway, eventually

CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "You are terse."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


# --- ids that a request brings


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
        beside = prefix_chain.subconversation_id(main, prefix_chain.head([user("title of work")]))
        assert SESSION_ID.fullmatch(beside)
        assert beside.startswith(f"{main[:111]}:")
        assert beside != prefix_chain.subconversation_id(main, prefix_chain.head([user("another")]))


# --- the verdict


def at(messages: list[dict[str, Any]], *, answered: bool = True, name: str = "s", start: bytes = b"") -> Session:
    """A session whose last turn is `messages`; the last of them is the reply if it was answered."""
    asked = messages[:-1] if answered else messages
    trace = prefix_chain.trace(start, asked, messages[-1] if answered else None)
    return Session("t", name, name, asked=trace.asked, tip=trace.tip, answered=answered)


def verdict(request: list[dict[str, Any]], known: int, *candidates: Session) -> prefix_chain.PrefixMatch:
    beginning = ConversationPrefix.of(Prompt(request, b""))
    return prefix_chain.match_session(beginning, beginning.prefix_hashes[known - 1] if known else None, candidates)


FIRST = [SYSTEM, user("one"), assistant("1")]
SECOND = [*FIRST, user("two"), assistant("2")]


def test_the_next_turn_goes_on() -> None:
    told = verdict([*FIRST, user("two")], 3, at(FIRST))
    assert (told.session and told.session.id, told.forks, told.how) == ("s", False, "prefix")


def test_several_new_messages_go_on() -> None:
    told = verdict([*FIRST, user("two"), user("three")], 3, at(FIRST))
    assert (told.session is not None, told.forks) == (True, False)


def test_of_two_sessions_with_one_beginning_the_one_that_stands_there_goes_on() -> None:
    told = verdict([*FIRST, user("two")], 3, at(SECOND, name="further"), at(FIRST, name="here"))
    assert told.session is not None
    assert told.session.id == "here"


def test_going_on_from_an_older_reply_is_a_fork() -> None:
    told = verdict([*FIRST, user("another")], 3, at(SECOND))
    assert (told.session and told.session.id, told.forks, told.how) == ("s", True, "fork")


def test_an_edited_history_forks_from_the_last_common_reply() -> None:
    told = verdict([*FIRST, user("edited"), assistant("2"), user("three")], 3, at(SECOND))
    assert told.forks


def test_the_same_turn_again_is_a_retry() -> None:
    told = verdict([*FIRST, user("two")], 4, at(SECOND))
    assert (told.session is not None, told.forks, told.how) == (True, False, "retry")


def test_a_first_question_that_was_not_answered_is_a_retry_and_one_that_was_is_a_stranger() -> None:
    assert verdict(FIRST[:2], 2, at(FIRST[:2], answered=False)).how == "retry"
    assert verdict(FIRST[:2], 2, at(FIRST)).session is None


def test_an_answered_and_an_unanswered_stranger_with_one_question_are_told_apart() -> None:
    told = verdict(FIRST[:2], 2, at(FIRST, name="answered"), at(FIRST[:2], answered=False, name="waiting"))
    assert told.session is not None
    assert told.session.id == "waiting"


def test_a_reply_that_was_cut_and_is_sent_back_goes_on() -> None:
    told = verdict([*FIRST[:2], assistant("half of"), user("go on")], 2, at(FIRST[:2], answered=False))
    assert (told.session is not None, told.forks) == (True, False)


def test_a_reply_that_comes_back_differently_goes_on_unless_strangers_asked_the_same() -> None:
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


def test_reasoning_that_never_ends_is_all_that_was_said() -> None:
    assert prefix_chain.link(b"", assistant("<think>1")) != prefix_chain.link(b"", assistant("<think>2"))
    assert prefix_chain.link(b"", assistant("<think>1</think>")) != prefix_chain.link(
        b"", assistant("<think>2</think>")
    )


def test_a_tool_that_said_nothing_says_the_same_as_a_part_without_text() -> None:
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


# --- through the gateway


def ask(gateway: Gateway, messages: list[dict[str, Any]], headers: dict[str, str] | None = None, **more: Any) -> str:
    """Send a turn without any id of ours; return the session that it was put in."""
    answer = gateway.http.post(CHAT, json={"model": MODEL, "messages": messages, **more}, headers=headers or {})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-session-id"]


def shown(gateway: Gateway, session: str) -> dict[str, Any]:
    gateway.turns(session)
    return dict(gateway.http.get(f"/admin/sessions/{session}").json())


def test_a_conversation_without_ids_is_one_session(gateway: Gateway, session: str) -> None:
    messages = [SYSTEM, user(session)]
    first = ask(gateway, messages)
    for text in ("two", "three", "four"):
        messages += [assistant("Hello there!"), user(text)]
        assert ask(gateway, messages) == first
    turns = gateway.turns(first, 4)
    assert [turn["recognised_by"] for turn in turns] == ["prefix", "prefix", "prefix", "new"]
    assert shown(gateway, first)["recognised_by"] == "new"


def test_a_fork_is_a_session_of_its_own_in_the_same_lineage_and_under_the_same_salt(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    first = [SYSTEM, user(session)]
    origin = ask(gateway, first)
    answered = [*first, assistant("Hello there!")]
    assert ask(gateway, [*answered, user("two")]) == origin
    fork = ask(gateway, [*answered, user("otherwise")])
    assert fork != origin
    seen = shown(gateway, fork)
    assert (seen["lineage"], seen["forked_from"], seen["recognised_by"]) == (origin, origin, "fork")
    assert ask(gateway, [*answered, user("otherwise"), assistant("Hello there!"), user("on")]) == fork
    salts = {request.json["cache_salt"] for request in engine.seen(CHAT)}
    assert len(salts) == 1


def test_strangers_with_one_system_prompt_and_one_question_are_two_sessions(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    messages = [SYSTEM, user(session)]
    one, two = ask(gateway, messages), ask(gateway, messages)
    assert one != two
    assert shown(gateway, one)["lineage"] != shown(gateway, two)["lineage"]
    assert len({request.json["cache_salt"] for request in engine.seen(CHAT)}) == 2


def test_a_retry_of_a_failed_first_request_is_the_same_session(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    messages = [SYSTEM, user(session)]
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "busy", "code": 503}}, 503)
    failed = gateway.http.post(CHAT, json={"model": MODEL, "messages": messages})
    assert failed.status_code == 503
    engine.on_chat = engine.answer_chat
    gateway.turns(failed.headers["x-session-id"])
    assert ask(gateway, messages) == failed.headers["x-session-id"]


def test_the_last_turn_asked_anew_is_the_same_session_and_its_new_reply_goes_on(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    messages = [SYSTEM, user(session)]
    first = ask(gateway, messages)
    messages += [assistant("Hello there!"), user("two")]
    assert ask(gateway, messages) == first
    engine.on_chat = lambda exchange: exchange.json(whole_reply("Otherwise.", usage_of(5, 2)))
    assert ask(gateway, messages) == first
    assert ask(gateway, [*messages, assistant("Otherwise."), user("three")]) == first
    fork = ask(gateway, [*messages, assistant("Hello there!"), user("three")])
    assert shown(gateway, fork)["lineage"] == first


def test_an_agents_side_conversations_are_sessions_beside_its_own(gateway: Gateway, session: str) -> None:
    named = {"x-claude-code-session-id": session}
    assert ask(gateway, [SYSTEM, user("work")], named) == session
    title = ask(gateway, [{"role": "system", "content": "Make a title."}, user("title of work")], named)
    assert title.startswith(f"{session}:")
    changed = {"role": "system", "content": "You are terse. It is Tuesday."}
    assert ask(gateway, [changed, user("work"), assistant("Hello there!"), user("on")], named) == session
    agent = ask(gateway, [SYSTEM, user("work")], named | {"x-claude-code-agent-id": "a"})
    assert agent == f"{session}:a"
    # All of them are one client's: they share its salt, and what they have in common is computed once.
    assert {shown(gateway, one)["lineage"] for one in (title, agent)} == {session}
    assert {shown(gateway, one)["forked_from"] for one in (title, agent)} == {session}


def test_a_cache_key_names_its_first_conversation_and_keeps_strangers_apart(gateway: Gateway, session: str) -> None:
    first = ask(gateway, [user("hi")], prompt_cache_key=session)
    assert first == session
    assert ask(gateway, [user("hi"), assistant("Hello there!"), user("on")], prompt_cache_key=session) == session
    other = ask(gateway, [user("hi")], prompt_cache_key=session)
    assert other != session


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
def test_users_of_one_application_are_kept_apart(gateway: Gateway, session: str, field: str) -> None:
    ada = ask(gateway, [user(session)], **{field: "ada"})
    history = [user(session), assistant("Hello there!"), user("on")]
    assert ask(gateway, history, **{field: "bob"}) != ada
    assert ask(gateway, history, **{field: "ada"}) == ada


def test_two_first_requests_at_once_are_two_conversations(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    both = threading.Barrier(2, timeout=WITHIN)

    def answer(exchange: Exchange) -> None:
        both.wait()
        engine.answer_chat(exchange)

    engine.on_chat = answer
    found: list[str] = []
    work = [threading.Thread(target=lambda: found.append(ask(gateway, [user(session)]))) for _ in range(2)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(set(found)) == 2


def test_two_with_the_same_reply_that_go_on_at_once_go_on_in_two_sessions(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    strangers = {ask(gateway, [user(session)]) for _ in range(2)}
    both = threading.Barrier(2, timeout=WITHIN)

    def answer(exchange: Exchange) -> None:
        both.wait()
        engine.answer_chat(exchange)

    engine.on_chat = answer
    found: list[str] = []

    def go_on(text: str) -> None:
        found.append(ask(gateway, [user(session), assistant("Hello there!"), user(text)]))

    work = [threading.Thread(target=go_on, args=(text,)) for text in ("one", "two")]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert set(found) == strangers


def test_a_request_that_failed_and_comes_again_at_once_is_a_retry(engine: FakeEngine, gateway: Gateway) -> None:
    for attempt in range(20):
        engine.on_chat = lambda exchange: exchange.json({"error": {"message": "overloaded"}}, 503)
        question = {"model": MODEL, "messages": [user(f"{attempt} {secrets.token_hex(8)}")]}
        failed = gateway.http.post(CHAT, json=question)
        engine.on_chat = engine.answer_chat
        assert gateway.http.post(CHAT, json=question).headers["x-session-id"] == failed.headers["x-session-id"]


def test_a_conversation_goes_on_beside_a_request_of_its_own_that_hangs(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    first = ask(gateway, [user(session)])
    gone, hangs = threading.Event(), threading.Event()

    def hang(exchange: Exchange) -> None:
        engine.on_chat = engine.answer_chat
        hangs.set()
        gone.wait(5)
        engine.answer_chat(exchange)

    engine.on_chat = hang
    second = [user(session), assistant("Hello there!"), user("two")]
    found: list[str] = []
    hung = threading.Thread(target=lambda: found.append(ask(gateway, second)))
    hung.start()
    assert hangs.wait(5)
    found.append(ask(gateway, second))
    found.append(ask(gateway, [*second, assistant("Hello there!"), user("three")]))
    gone.set()
    hung.join()
    assert found == [first] * 3


def test_a_conversation_whose_system_prompt_tells_the_time_is_one_session(gateway: Gateway, session: str) -> None:
    def at(minute: int, *rest: dict[str, Any]) -> str:
        return ask(gateway, [{"role": "system", "content": f"It is 12:0{minute}."}, user(session), *rest])

    first = at(1)
    assert at(2, assistant("Hello there!"), user("two")) == first
    whole = (assistant("Hello there!"), user("two"), assistant("Hello there!"), user("three"))
    assert at(3, *whole) == first
    gateway.turns(first, 3)
    assert at(4, *whole[:2]) != first  # a fork that shares nothing word for word
    (turn, *_) = gateway.turns(first, 3)
    assert turn["recognised_by"] == "last reply"


def test_a_conversation_whose_questions_come_back_shorter_is_one_session(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    # Only the replies tell it from others, and every other test has the same ones.
    reply = f"Hello, {session}!"
    engine.on_chat = lambda exchange: exchange.json(whole_reply(reply, usage_of(5, 5)))
    messages = [user(session)]
    found = {ask(gateway, messages)}
    for text in ("two", "three", "four"):
        messages += [assistant(reply), user(text)]
        found.add(ask(gateway, [*messages[:-1], user(f"Passages: ... Question: {text}")]))
    assert len(found) == 1


def test_a_last_reply_that_two_sessions_share_names_neither(gateway: Gateway, session: str) -> None:
    two = {ask(gateway, [{"role": "system", "content": who}, user(session)]) for who in ("Be Ada.", "Be Bob.")}
    third = [{"role": "system", "content": "Be Eve."}, user(session), assistant("Hello there!"), user("on")]
    for one in two:
        gateway.turns(one)
    assert len({*two, ask(gateway, third)}) == 3


def test_a_session_known_by_its_beginning_alone_is_deleted_whole(gateway: Gateway, session: str) -> None:
    messages = [SYSTEM, user(session)]
    first = ask(gateway, messages)
    gateway.turns(first)
    eventually(lambda: gateway.http.delete(f"/admin/sessions/{first}").status_code == 200, "the session is deleted")
    assert ask(gateway, [*messages, assistant("Hello there!"), user("two")]) != first


def test_session_headers_do_not_reach_the_engine(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    ask(gateway, [user("hi")], {"x-claude-code-session-id": session, "x-client-request-id": "r1"})
    (request,) = engine.seen(CHAT)
    assert request.header("x-claude-code-session-id") == []
    assert request.header("x-client-request-id") == ["r1"]
