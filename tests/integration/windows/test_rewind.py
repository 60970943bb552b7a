"""A session is taken back to a window: what it goes on with, what is told of what it had, and what is refused."""

import threading
from typing import Any

import pytest

from tests.support.admin_requests import error_of
from tests.support.cli import cwg
from tests.support.conversations import assistant, user, without_turns
from tests.support.fakes.engine import MODEL, FakeEngine, usage_of, whole_reply
from tests.support.gateway_process import Gateway, eventually

CHAT = "/v1/chat/completions"


@pytest.fixture
def talk(engine: FakeEngine, gateway: Gateway, session: str) -> list[dict[str, Any]]:
    """A session of three turns, frozen after each as `SESSION-1` and so on; the engine repeats each question."""
    engine.on_chat = lambda exchange: exchange.json(
        whole_reply(f"re: {exchange.request.json['messages'][-1]['content']}", usage_of(9, 2))
    )
    messages: list[dict[str, Any]] = []
    for number in range(1, 4):
        messages += send(gateway, session, [*messages, user(f"turn {number}")])[-2:]
        frozen = gateway.freeze(session, f"{session}-{number}")
        assert frozen.status_code == 201, frozen.text
    return messages


def send(gateway: Gateway, session: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One turn; the messages and the reply."""
    answer = gateway.http.post(f"/s/{session}{CHAT}", json={"model": MODEL, "messages": messages})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-session-id"] == session
    return [*messages, assistant(answer.json()["choices"][0]["message"]["content"])]


def take_back(gateway: Gateway, window: str, session: str, **more: Any) -> dict[str, Any]:
    answer = gateway.http.post(f"/admin/windows/{window}/thaw", json={"into_session": session, **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def asked(engine: FakeEngine) -> list[dict[str, Any]]:
    """What the engine was asked last."""
    return list(engine.seen(CHAT)[-1].json["messages"])


def text_of(gateway: Gateway, window: str) -> list[dict[str, Any]]:
    return without_turns(gateway.http.get(f"/admin/windows/{window}/messages").json()["messages"])


def session_of(gateway: Gateway, session: str) -> dict[str, Any]:
    return dict(gateway.http.get(f"/admin/sessions/{session}").json())


def test_client_that_sends_only_new_messages_goes_on_from_the_window(
    engine: FakeEngine, gateway: Gateway, session: str, talk: list[dict[str, Any]]
) -> None:
    salt = engine.seen(CHAT)[-1].json["cache_salt"]
    thawed = take_back(gateway, f"{session}-1", session)
    assert (thawed["session_id"], thawed["cache_salt"]) == (session, salt)
    assert thawed["replaced"] == {"turns_dropped": 2, "token_count": 11, "kept_in": f"{session}-3"}
    assert thawed["warnings"] == [w for w in thawed["warnings"] if "dropped" not in w]
    shown = session_of(gateway, session)
    assert (shown["state"], shown["window"], shown["turn_count"]) == ("thawed", f"{session}-1", 3)
    assert shown["token_count"] == thawed["token_count"]
    send(gateway, session, [user("otherwise")])
    assert asked(engine) == [*talk[:2], user("otherwise")]
    assert engine.seen(CHAT)[-1].json["cache_salt"] == salt
    send(gateway, session, [user("and on")])
    assert asked(engine) == [*talk[:2], user("otherwise"), assistant("re: otherwise"), user("and on")]
    window = gateway.freeze(session, f"{session}-b").json()
    assert window["parent_window"] == f"{session}-1"
    assert text_of(gateway, f"{session}-b")[:4] == [*talk[:2], user("otherwise"), assistant("re: otherwise")]
    assert text_of(gateway, f"{session}-3") == talk


def test_client_that_sends_its_whole_history_goes_on_with_that(
    engine: FakeEngine, gateway: Gateway, session: str, talk: list[dict[str, Any]]
) -> None:
    take_back(gateway, f"{session}-1", session)
    send(gateway, session, [*talk[:2], user("otherwise")])
    assert asked(engine) == [*talk[:2], user("otherwise")]


def test_session_is_taken_back_to_a_turn_and_again(
    engine: FakeEngine, gateway: Gateway, session: str, talk: list[dict[str, Any]]
) -> None:
    for turn, dropped in ((2, 1), (1, 1), (3, 0)):
        replaced = take_back(gateway, f"{session}-3", session, at_turn=turn)["replaced"]
        assert (replaced["turns_dropped"], replaced["kept_in"] is not None) == (dropped, True), turn
        send(gateway, session, [user("and?")])
        assert asked(engine) == [*talk[: 2 * turn], user("and?")]
        replaced = take_back(gateway, f"{session}-3", session, at_turn=turn)["replaced"]
        assert replaced == {"turns_dropped": 1, "token_count": 11, "kept_in": None}


def test_what_no_window_has_is_told_or_kept(gateway: Gateway, session: str, talk: list[dict[str, Any]]) -> None:
    send(gateway, session, [*talk, user("unsaved")])
    kept = take_back(gateway, f"{session}-2", session, keep_as=f"{session}-kept")
    assert kept["replaced"] == {"turns_dropped": 2, "token_count": 11, "kept_in": f"{session}-kept"}
    assert text_of(gateway, f"{session}-kept") == [*talk, user("unsaved"), assistant("re: unsaved")]
    send(gateway, session, [user("unsaved too")])
    lost = take_back(gateway, f"{session}-2", session)
    assert lost["replaced"] == {"turns_dropped": 1, "token_count": 11, "kept_in": None}
    (warning,) = [one for one in lost["warnings"] if "dropped" in one]
    assert "in no window: 1 turn" in warning


def test_text_of_a_window_into_a_session(
    engine: FakeEngine, gateway: Gateway, session: str, talk: list[dict[str, Any]]
) -> None:
    thawed = take_back(gateway, f"{session}-3", session, as_text=True, at_turn=2, continuation_prompt="go on")
    assert (thawed["receipt"]["as_text"], thawed["receipt"]["at_turn"]) == (True, 2)
    assert thawed["receipt"]["computed_tokens"] == thawed["token_count"] > 0
    assert thawed["continuation"]["message"]["content"] == "re: go on"
    assert asked(engine) == [*talk[:4], user("go on")]


@pytest.mark.parametrize(
    ("fields", "status", "code", "says"),
    [
        ({"into_session": "no-such"}, 404, "session_not_found", "`new_session_id` thaws into a new one"),
        ({"into_session": "a b"}, 400, "invalid_session_id", "into_session"),
        ({"into": "no-such"}, 404, "session_not_found", ""),
        ({"into": "a", "into_session": "b"}, 400, "invalid_request", "one parameter"),
        ({"into_session": "x", "new_session_id": "y"}, 400, "invalid_request", "give one of them"),
        ({"keep_as": "x"}, 400, "invalid_request", "keep_as keeps what into_session has"),
        ({"into_session": "SESSION", "at_turn": 4}, 400, "invalid_request", "has 3 turns, so there is no turn 4"),
        ({"at_turn": 0}, 400, "invalid_request", "at_turn must be a whole number from 1"),
        ({"at_turn": "2"}, 400, "invalid_request", "at_turn must be a whole number from 1"),
        ({"at_turn": True}, 400, "invalid_request", "at_turn must be a whole number from 1"),
        ({"into_session": "SESSION", "keep_as": "SESSION-1"}, 409, "window_already_exists", ""),
        ({"new_session_id": "SESSION"}, 409, "session_already_exists", "`into_session` takes that session back"),
    ],
)
def test_refusals(
    gateway: Gateway,
    session: str,
    talk: list[dict[str, Any]],
    fields: dict[str, Any],
    status: int,
    code: str,
    says: str,
) -> None:
    named = {name: value.replace("SESSION", session) for name, value in fields.items() if isinstance(value, str)}
    body = {**fields, **named}
    before = session_of(gateway, session)
    answer = gateway.http.post(f"/admin/windows/{session}-3/thaw", json=body)
    assert error_of(answer) == (status, code)
    assert says in answer.text
    assert session_of(gateway, session) == before


def test_session_of_another_lineage_is_refused(gateway: Gateway, session: str, talk: list[dict[str, Any]]) -> None:
    gateway.chat(f"{session}-other")
    isolated = {"target_window": f"{session}-apart", "isolate": True}
    assert gateway.http.post(f"/admin/windows/{session}-1/clone", json=isolated).status_code == 201
    for window, into in ((f"{session}-1", f"{session}-other"), (f"{session}-apart", session)):
        answer = gateway.http.post(f"/admin/windows/{window}/thaw", json={"into_session": into})
        assert error_of(answer) == (400, "invalid_request")
        assert answer.json()["error"]["details"]["field"] == "into_session"
        assert "new_session_id" in answer.json()["error"]["hint"]
    fork = gateway.http.post(f"/admin/windows/{session}-1/thaw", json={"new_session_id": f"{session}-fork"})
    assert fork.status_code == 200
    take_back(gateway, f"{session}-3", f"{session}-fork")


def test_session_in_a_turn_is_refused(
    engine: FakeEngine, gateway: Gateway, session: str, talk: list[dict[str, Any]]
) -> None:
    release = threading.Event()
    engine.on_chat = lambda exchange: (release.wait(60), engine.answer_chat(exchange))[1]
    seen = len(engine.seen(CHAT))
    turn = threading.Thread(target=gateway.chat, args=(session, "slow"))
    turn.start()
    try:
        engine.wait_seen(CHAT, seen + 1)
        answer = gateway.http.post(f"/admin/windows/{session}-1/thaw", json={"into_session": session})
        assert error_of(answer) == (409, "session_busy")
    finally:
        release.set()
        turn.join()
    eventually(lambda: session_of(gateway, session)["turn_count"] == 4, "the turn is recorded")
    take_back(gateway, f"{session}-1", session)


def test_window_of_the_session_is_deleted_after_it_was_taken_back(
    engine: FakeEngine, gateway: Gateway, session: str, talk: list[dict[str, Any]]
) -> None:
    take_back(gateway, f"{session}-2", session, at_turn=1)
    for number in range(1, 4):
        assert gateway.http.delete(f"/admin/windows/{session}-{number}").status_code == 200
    send(gateway, session, [user("still here?")])
    assert asked(engine) == [*talk[:2], user("still here?")]
    assert gateway.http.delete(f"/admin/sessions/{session}").status_code == 200


def test_cli(engine: FakeEngine, gateway: Gateway, session: str, talk: list[dict[str, Any]]) -> None:
    send(gateway, session, [*talk, user("unsaved")])
    options = ["--into", session, "--at-turn", "1", "--keep-as", f"{session}-k", "--warm", "none"]
    done = cwg("thaw", f"{session}-2", *options, url=gateway.url)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    assert lines["session"] == session
    assert lines["dropped"] == f"3 turns, kept in {session}-k"
    assert lines["at turn"] == "1"
    assert lines["to compute"].endswith("tokens, in the first turn")
    shown = cwg("messages", f"{session}-2", url=gateway.url).stdout
    assert shown == (
        "--- turn 1\nuser: turn 1\nassistant: re: turn 1\n--- turn 2\nuser: turn 2\nassistant: re: turn 2\n"
    )
    done = cwg("thaw", f"{session}-2", "--at-turn", "3", url=gateway.url)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: window '{session}-2' has 2 turns, so there is no turn 3 "
        "(--at-turn is 1 to 2, or omit it for all of the window)\n"
    )
    done = cwg("clone", f"{session}-2", f"{session}-c", "--at-turn", "1", url=gateway.url)
    assert done.returncode == 0, done.stderr
    assert text_of(gateway, f"{session}-c") == talk[:2]
    done = cwg("ask", f"{session}-2", "and?", "--at-turn", "1", url=gateway.url)
    assert (done.returncode, done.stdout) == (0, "re: and?\n")
    assert asked(engine) == [*talk[:2], user("and?")]
    done = cwg("fanout", f"{session}-2", "2", "--prefix", f"{session}-f", "--at-turn", "1", url=gateway.url)
    assert done.returncode == 0, done.stderr
    send(gateway, f"{session}-f-1", [user("here")])
    assert asked(engine) == [*talk[:2], user("here")]


def test_base_url_of_a_turn(engine: FakeEngine, gateway: Gateway, session: str, talk: list[dict[str, Any]]) -> None:
    base = f"/w/{session}-3@2"

    def ask(messages: list[dict[str, Any]], path: str = base, **headers: str) -> Any:
        return gateway.http.post(f"{path}{CHAT}", json={"model": MODEL, "messages": messages}, headers=headers)

    one = ask([user("new")]).headers["x-session-id"]
    assert asked(engine) == [*talk[:4], user("new")]
    assert ask([user("new"), assistant("re: new"), user("on")]).headers["x-session-id"] == one
    assert asked(engine) == [*talk[:4], user("new"), assistant("re: new"), user("on")]
    whole = ask([*talk[:4], user("whole")]).headers["x-session-id"]
    assert asked(engine) == [*talk[:4], user("whole")]
    at_the_end = ask([user("new")], f"/w/{session}-3").headers["x-session-id"]
    assert asked(engine) == [*talk, user("new")]
    by_header = ask([user("header")], "", **{"x-window": f"{session}-3@1"}).headers["x-session-id"]
    assert asked(engine) == [*talk[:2], user("header")]
    assert len({one, whole, at_the_end, by_header}) == 4
    named = ask([user("named")], **{"x-session-id": f"{session}-n"})
    assert (named.status_code, asked(engine)) == (200, [*talk[:4], user("named")])
    assert ask([user("on")], **{"x-session-id": f"{session}-n"}).status_code == 200
    other = ask([user("on")], f"/w/{session}-3@1", **{"x-session-id": f"{session}-n"})
    assert other.json()["error"]["message"].startswith(
        f"session '{session}-n' does not come from turn 1 of window '{session}-3'"
    )
    for turn in ("4", "0", "", "x"):
        refused = ask([user("new")], f"/w/{session}-3@{turn}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request"), refused.text
