"""Clients that change what they have said before: whose conversation it is, and what the engine's cache still finds.

The fake engine keeps a prefix cache for each salt, in blocks of 16 tokens, and has a token for each byte. Its figures
through the gateway are compared with those of the same requests sent to it directly.
"""

import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, whole_reply
from tests.support.gateway_process import Gateway

CHAT = "/v1/chat/completions"
Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def tools(*names: str) -> list[Message]:
    return [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in names]


@pytest.fixture(autouse=True)
def _replies(engine: FakeEngine) -> None:
    """Every reply is another one, and none is short; the engine says what it found in its cache, empty at first."""
    numbers = itertools.count()
    engine._kv.clear()

    def answer(exchange: Exchange) -> None:
        body = exchange.request.json
        text = f"reply {next(numbers)} of {secrets.token_hex(16)}"
        ids = list(f"{body.get('tools')}{''.join(m['role'] + str(m['content']) for m in body['messages'])}".encode())
        exchange.json(whole_reply(text, engine._usage(body.get("cache_salt"), ids, completion=9)))

    engine.on_chat = answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got: the reply, the session, how it was recognised, and how much of its prompt was cached."""

    said: Message
    session: str
    match: str
    cached: int


class Client:
    """Sends what a client sends, without any id."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, messages: Sequence[Message], **more: Any) -> Answer:
        answer = self._http.post(CHAT, json={"model": MODEL, "messages": list(messages), **more})
        assert answer.status_code == 200, answer.text
        body, headers = answer.json(), answer.headers
        said = assistant(body["choices"][0]["message"]["content"])
        cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Answer(said, headers.get("x-session-id", ""), headers.get("x-session-match", ""), cached)


SYSTEM = system("You are a coding agent. " * 20)
MAIN = {"tools": tools("read", "write", "shell")}
MEMORY = system("You extract memories from conversations. " * 20)
SUB = {"tools": tools("save_memory")}


def coding_agent(
    client: Client, opening: str, *, reminder: bool, sub_agent: bool, turns: int = 4
) -> tuple[list[Answer], list[Answer]]:
    """An agent in the way of Qwen Code: a reminder before the last question only, a sub-agent behind each turn."""
    main: list[Answer] = []
    aside: list[Answer] = []
    history: list[Message] = []
    for number in range(turns):
        question = f"{opening} question {number}: " + "please look at this file " * 20
        sent = (
            f"<system-reminder>\nThe plan is number {number}.\n</system-reminder>\n\n{question}"
            if reminder
            else question
        )
        main.append(client.ask([SYSTEM, *history, user(sent)], **MAIN))
        history += [user(question), main[-1].said]
        if sub_agent:
            aside.append(client.ask([MEMORY, *history, user("Extract what is worth to be kept.")], **SUB))
    return main, aside


@pytest.mark.parametrize("sub_agent", [False, True])
@pytest.mark.parametrize("reminder", [False, True])
def test_an_agent_with_reminders_and_subagents_is_one_cached_session(
    engine: FakeEngine, gateway: Gateway, session: str, *, reminder: bool, sub_agent: bool
) -> None:
    main, aside = coding_agent(Client(gateway.http), session, reminder=reminder, sub_agent=sub_agent)
    with httpx.Client(base_url=engine.url) as direct:
        alone, alone_aside = coding_agent(Client(direct), session, reminder=reminder, sub_agent=sub_agent)
    assert len({one.session for one in main}) == 1
    assert not {one.session for one in main} & {one.session for one in aside}
    assert [one.match for one in aside] == ["side"] * len(aside)
    # A reply has another length each time, hence the block.
    for here, there in zip([*main[1:], *aside], [*alone[1:], *alone_aside], strict=True):
        assert here.cached >= there.cached - 16
    assert all(one.cached > len(str(SYSTEM["content"])) for one in main[1:])


def test_a_side_session_is_linked_to_its_parent_and_shares_its_salt(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    (first, second), (side, _) = coding_agent(Client(gateway.http), session, reminder=False, sub_agent=True, turns=2)
    assert first.session == second.session
    gateway.turns(side.session)
    shown = gateway.http.get(f"/admin/sessions/{side.session}").json()
    assert (shown["forked_from"], shown["lineage"], shown["recognised_by"]) == (first.session, first.session, "side")
    assert len({request.json["cache_salt"] for request in engine.seen(CHAT)}) == 1


def test_a_side_session_continues_by_itself(gateway: Gateway, session: str) -> None:
    client = Client(gateway.http)
    question = user(f"{session} a question")
    main = client.ask([SYSTEM, question], **MAIN)
    asked = [MEMORY, question, main.said, user("Extract.")]
    side = client.ask(asked, **SUB)
    more = client.ask([*asked, side.said, user("And the rest?")], **SUB)
    assert (more.session, more.match) == (side.session, "prefix")


def test_a_changed_system_prompt_with_the_same_tools_matches(gateway: Gateway, session: str) -> None:
    client, history = Client(gateway.http), [user(f"{session} first")]
    found = set()
    for minute in range(4):
        answer = client.ask([system(f"It is 12:0{minute}."), *history], **MAIN)
        found.add(answer.session)
        history += [answer.said, user(f"more {minute}")]
    assert len(found) == 1


def test_a_truncated_history_under_a_changing_system_prompt_matches(gateway: Gateway, session: str) -> None:
    client, history = Client(gateway.http), []
    found = []
    for number in range(4):
        history.append(user(f"{session} question {number}"))
        found.append(client.ask([system(f"Help.\nIt is 2026-11-30 08:17:5{number}.70601."), *history[-5:]]))
        history.append(found[-1].said)
    assert len({one.session for one in found}) == 1


@pytest.mark.parametrize(
    "dressed",
    [
        "<system-reminder>\nBe brief.\n</system-reminder>\n{}",
        "{}\n\n<environment_details>\nTime: 12:0{n}\n</environment_details>",
        "Use these passages:\n[{n}] some passage\n[{n}] another passage\n\nQuestion: {}",
        "Context information is below.\n---\npassage {n}\n---\nAnswer the query.\nQuery: {}\nAnswer: ",
        "[12:0{n}] {}",
        "<user_query>\n{}\n</user_query>",
    ],
)
@pytest.mark.parametrize("short", [False, True])
def test_text_added_around_the_last_question_is_ignored_when_matching(
    gateway: Gateway, session: str, dressed: str, *, short: bool
) -> None:
    client, history, found = Client(gateway.http), [], []
    for number in range(3):
        question = "hi" if short else f"{session} asks for number {number}"
        answer = client.ask([system(session), *history, user(dressed.format(question, n=number))])
        found.append(answer)
        history += [user(question), answer.said]
    assert len({one.session for one in found}) == 1
    assert [one.match for one in found] == ["new", "last-reply", "last-reply"]


def test_parts_of_a_message_that_come_and_go_are_looked_through(gateway: Gateway, session: str) -> None:
    def parts(*texts: str) -> Message:
        return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}

    client = Client(gateway.http)
    first = client.ask([system(session), parts("<reminder>be brief</reminder>", "hi")])
    assert client.ask([system(session), parts("hi"), first.said, parts("on")]).session == first.session


def test_exchanges_that_the_client_puts_after_the_last_reply_are_looked_past(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    """In the way of aider when it edits: what was changed and what the files hold now, each with a made-up reply."""

    def talk(client: Client) -> list[Answer]:
        files = [user("These are the files:\n" + "a line of code\n" * 20), assistant("Ok, I will use these contents.")]
        done: list[Message] = []
        found = []
        for number in range(4):
            question = f"{session} asks for change number {number}"
            found.append(client.ask([SYSTEM, *done, *files, user(f"{question}\n\nUse the edit format.")]))
            done += [user(question), found[-1].said, user("I committed the changes."), assistant("Ok.")]
        return found

    turns = talk(Client(gateway.http))
    with httpx.Client(base_url=engine.url) as direct:
        alone = talk(Client(direct))
    assert [one.match for one in turns] == ["new", *["last-reply"] * 3]
    assert len({one.session for one in turns}) == 1
    for here, there in zip(turns[1:], alone[1:], strict=True):
        assert here.cached >= there.cached - 16 > 0


def test_of_conversations_that_begin_alike_the_one_with_the_same_question_matches(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_chat = engine.answer_chat  # "Hello there!" to everybody
    client = Client(gateway.http)
    preamble = "\n".join(f"- {session} tool {number} does something" for number in range(40))
    opened = {}
    for question in ("hi", "hello, are you there?", "good morning"):
        opened[question] = client.ask([SYSTEM, user(f"{preamble}\n<reminder>\n{question}")], **MAIN)
        gateway.turns(opened[question].session)
    for question, first in opened.items():
        again = client.ask([SYSTEM, user(f"{preamble}\n{question}"), first.said, user("go on")], **MAIN)
        assert (again.match, again.session) == ("last-reply", first.session)


@pytest.mark.parametrize("dressed", ["{}", "{}\n\nAnswer in English."])
def test_the_same_script_run_again_is_a_conversation_of_its_own_in_every_turn(
    engine: FakeEngine, gateway: Gateway, session: str, dressed: str
) -> None:
    engine.on_chat = engine.answer_chat
    client, runs = Client(gateway.http), []
    for _ in range(2):
        history, found = [SYSTEM], set()
        for number in range(3):
            answer = client.ask([*history, user(dressed.format(f"{session} question {number}"))])
            gateway.turns(answer.session)
            history += [user(f"{session} question {number}"), answer.said]
            found.add(answer.session)
        runs.append(found)
    assert [len(found) for found in runs] == [1, 1]
    assert runs[0] != runs[1]


def test_the_turn_after_a_reply_sent_back_empty_matches(gateway: Gateway, session: str) -> None:
    """In the way of smolagents, which keeps no call that it could not run."""
    client, history = Client(gateway.http), [SYSTEM, user(session)]
    found = []
    for _ in range(3):
        found.append(client.ask(history, **MAIN))
        gateway.turns(found[-1].session)
        history += [assistant(""), user("Error: an argument is missing. Try again.")]
    assert [one.match for one in found] == ["new", "prefix", "prefix"]
    assert len({one.session for one in found}) == 1


def test_a_history_without_its_oldest_turns_is_the_same_session(gateway: Gateway, session: str) -> None:
    client, history, found = Client(gateway.http), [], []
    for number in range(6):
        history.append(user(f"{session} asks for number {number}"))
        answer = client.ask([SYSTEM, *history[-5:]], **MAIN)
        history.append(answer.said)
        found.append(answer)
    assert len({one.session for one in found}) == 1
    assert all(one.cached > len(str(SYSTEM["content"])) for one in found[1:])


def test_an_earlier_point_stays_known_when_its_words_have_changed(gateway: Gateway, session: str) -> None:
    client, history = Client(gateway.http), []
    for number in range(3):
        answer = client.ask([SYSTEM, *history, user(f"<b>\n{session} question {number}")])
        history += [user(f"{session} question {number}"), answer.said]
    fork = client.ask([SYSTEM, *history[:4], user("otherwise")])
    assert (fork.match, fork.session == answer.session) == ("fork", False)
    assert fork.cached > len(str(SYSTEM["content"]))


def test_clients_with_the_same_reply_to_different_questions_stay_apart(engine: FakeEngine, gateway: Gateway) -> None:
    engine.on_chat = engine.answer_chat  # "Hello there!" to everybody
    client, prompt = Client(gateway.http), system(secrets.token_hex(8))
    one = client.ask([prompt, user("How are you?")])
    gateway.turns(one.session)
    other = client.ask([prompt, user("What is the time?"), one.said, user("Really?")])
    assert (other.match, other.session == one.session) == ("new", False)


def test_a_request_that_matches_several_sessions_is_marked_ambiguous(
    gateway: Gateway, engine: FakeEngine, session: str
) -> None:
    engine.on_chat = engine.answer_chat
    client = Client(gateway.http)
    two = {client.ask([system(who), user(session)]).session for who in ("Be Ada.", "Be Bob.")}
    for one in two:
        gateway.turns(one)
    third = client.ask([system("Be Eve."), user(session), assistant("Hello there!"), user("on")])
    assert (third.match, third.session in two) == ("ambiguous", False)
    gateway.turns(third.session)
    assert gateway.http.get(f"/admin/sessions/{third.session}").json()["recognised_by"] == "ambiguous"


@pytest.mark.parametrize("kept", [False, True])
def test_the_turn_after_an_empty_reply_matches_with_and_without_it(
    engine: FakeEngine, gateway: Gateway, session: str, *, kept: bool
) -> None:
    client, ordinary = Client(gateway.http), engine.on_chat
    history = [SYSTEM, user(session)]
    first = client.ask(history)
    history += [first.said, user("two")]
    engine.on_chat = lambda exchange: exchange.json(whole_reply("", engine._usage(None, [1], completion=1)))
    assert client.ask(history).session == first.session
    engine.on_chat = ordinary
    third = client.ask([*history, *([assistant("")] if kept else []), user("three")])
    assert (third.session, third.match) == (first.session, "prefix")


def test_two_clients_with_the_same_question_and_empty_reply_stay_apart(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    client = Client(gateway.http)
    engine.on_chat = lambda exchange: exchange.json(whole_reply("", engine._usage(None, [1], completion=1)))
    first = client.ask([SYSTEM, user(session)])
    gateway.turns(first.session)
    # The same question once more is a retry, as there was no answer.
    again = client.ask([SYSTEM, user(session)])
    assert (again.session, again.match) == (first.session, "retry")
    assert client.ask([SYSTEM, user(session), user("more")]).session == first.session


@pytest.mark.parametrize(
    ("headers", "match"), [({"x-session-id": "mine"}, "id"), ({"x-claude-code-session-id": "c"}, "id"), ({}, "new")]
)
def test_the_answer_says_how_its_session_was_recognised(
    gateway: Gateway, session: str, headers: dict[str, str], match: str
) -> None:
    named = {name: f"{session}-{value}" for name, value in headers.items()}
    body = {"model": MODEL, "messages": [user(session)]}
    assert gateway.http.post(CHAT, json=body, headers=named).headers["x-session-match"] == match
