"""Answers that the gateway keeps: chains, forks, and asking for them by id, before an engine that keeps nothing."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from gateway.api.inference import stored_responses
from gateway.records import Session, StoredResponse, Trace, Turn
from gateway.store.sqlite import SqliteStore
from gateway.store.types import TurnRecord
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine
from tests.support.fakes.responses import PATH, called, event, response_of, said, serve, stream_of, usage_of
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

TOOL = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def engine(engine: FakeEngine) -> FakeEngine:
    """One that speaks the Responses API."""
    serve(engine)
    return engine


def ask(gateway: Gateway, text: Any, previous: str | None = None, session: str = "", **more: Any) -> httpx.Response:
    """Send one request."""
    body = {"model": MODEL, "input": text, **more} | ({"previous_response_id": previous} if previous else {})
    response = gateway.http.post(PATH, json=body, headers={"x-session-id": session} if session else {})
    assert response.status_code == 200, response.text
    return response


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """The response object, streamed or not."""
    if response.headers["content-type"] == "application/json":
        whole: dict[str, Any] = response.json()
        return whole
    last: dict[str, Any] = json.loads(response.text.strip().rpartition("data: ")[2])["response"]
    return last


def error_of(response: httpx.Response) -> tuple[int, str, Any]:
    """Status, code and parameter of an error in OpenAI's shape."""
    error = response.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return response.status_code, error["code"], error["param"]


def texts(request: Any) -> list[tuple[str, str]]:
    """Who said what in the input that the engine got."""
    return [
        (item["role"], item["content"] if isinstance(item["content"], str) else item["content"][0]["text"])
        for item in request.json["input"]
    ]


# --- going on


@pytest.mark.parametrize("stream", [False, True])
def test_a_chain_is_one_session_and_the_engine_gets_the_whole_conversation(
    engine: FakeEngine, gateway: Gateway, stream: bool
) -> None:
    first = ask(gateway, "one", stream=stream)
    second = ask(gateway, [{"role": "user", "content": "two"}], answer_of(first)["id"], stream=stream)
    third = ask(gateway, "three", answer_of(second)["id"], stream=stream)
    ids = {response.headers["x-session-id"] for response in (first, second, third)}
    assert len(ids) == 1
    requests = engine.seen(PATH)
    assert len({request.json["cache_salt"] for request in requests}) == 1
    assert texts(requests[2]) == [
        ("user", "one"), ("assistant", "Hello there!"), ("user", "two"), ("assistant", "Hello there!"),
        ("user", "three"),
    ]  # fmt: skip
    assert all("previous_response_id" not in r.json and r.json["store"] is False for r in requests)
    assert len(gateway.turns(ids.pop(), 3)) == 3
    # What is put in front is what was there, to the byte: the engine finds it again.
    assert answer_of(third)["usage"]["input_tokens_details"]["cached_tokens"] > 0


def test_instructions_and_tools_are_those_of_each_request(engine: FakeEngine, gateway: Gateway) -> None:
    first = answer_of(ask(gateway, "one", instructions="be terse", tools=[TOOL]))
    second = answer_of(ask(gateway, "two", first["id"], instructions="be kind"))
    ask(gateway, "three", second["id"])
    one, two, three = (request.json for request in engine.seen(PATH))
    assert (one["instructions"], two["instructions"]) == ("be terse", "be kind")
    assert "tools" not in two
    assert "instructions" not in three
    assert [item["role"] for item in three["input"]] == ["user", "assistant"] * 2 + ["user"]


def test_system_messages_of_the_input_stay_where_they_were_said(engine: FakeEngine, gateway: Gateway) -> None:
    first = answer_of(ask(gateway, [{"role": "developer", "content": "d"}, {"role": "user", "content": "one"}]))
    later = [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}]
    ask(gateway, later, first["id"], instructions="be kind")
    assert texts(engine.seen(PATH)[1]) == [
        ("developer", "d"), ("user", "one"), ("assistant", "Hello there!"), ("system", "s"), ("user", "two"),
    ]  # fmt: skip


def test_going_on_from_an_older_point_is_a_fork_in_the_same_lineage(engine: FakeEngine, gateway: Gateway) -> None:
    first = ask(gateway, "one")
    start = answer_of(first)["id"]
    second = answer_of(ask(gateway, "two", start))
    fork = ask(gateway, "other", start)
    mine, theirs = first.headers["x-session-id"], fork.headers["x-session-id"]
    assert mine != theirs
    assert len({request.json["cache_salt"] for request in engine.seen(PATH)}) == 1
    assert texts(engine.seen(PATH)[2]) == [("user", "one"), ("assistant", "Hello there!"), ("user", "other")]
    assert answer_of(fork)["usage"]["input_tokens_details"]["cached_tokens"] > 0
    # Both go on, each in its own session.
    assert ask(gateway, "x", second["id"]).headers["x-session-id"] == mine
    assert ask(gateway, "x", answer_of(fork)["id"]).headers["x-session-id"] == theirs
    gateway.turns(theirs, 2)
    sessions = [gateway.http.get(f"/admin/sessions/{name}").json() for name in (mine, theirs)]
    assert [one["turn_count"] for one in sessions] == [3, 2]
    assert sessions[0]["lineage"] == sessions[1]["lineage"] == mine


def test_the_session_that_a_client_names_is_the_one_that_goes_on(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    start = answer_of(ask(gateway, "one", session=session))["id"]
    ask(gateway, "two", start, session)
    again = ask(gateway, "other", start, session)  # an older point, but the client says which session it is
    assert again.headers["x-session-id"] == session
    branch = ask(gateway, "three", start, f"{session}-b")  # a new name: a fork of that name
    assert branch.headers["x-session-id"] == f"{session}-b"
    ask(gateway, "elsewhere", session=f"{session}-c")
    moved = ask(gateway, "four", start, f"{session}-c")  # a session of another conversation keeps its own salt
    assert moved.headers["x-session-id"] == f"{session}-c"
    salts = [request.json["cache_salt"] for request in engine.seen(PATH)]
    assert len(set(salts[:4])) == 1
    assert salts[4] == salts[5] != salts[0]
    assert texts(engine.seen(PATH)[5])[:2] == [("user", "one"), ("assistant", "Hello there!")]


def test_calls_and_their_results_go_on_by_id(engine: FakeEngine, gateway: Gateway) -> None:
    serve(engine, [said("Let me look."), called("now", '{"a": 1}', "c1"), called("now", "{}", "c2")])
    first = answer_of(ask(gateway, "time?", tools=[TOOL]))
    results = [{"type": "function_call_output", "call_id": f"c{n}", "output": str(n)} for n in (1, 2)]
    second = answer_of(ask(gateway, results, first["id"], tools=[TOOL]))
    sent = engine.seen(PATH)[1].json["input"]
    assert [item["type"] for item in sent] == [
        "message", "message", "function_call", "function_call", "function_call_output", "function_call_output",
    ]  # fmt: skip
    assert (sent[2]["call_id"], sent[2]["name"], sent[2]["arguments"]) == ("c1", "now", '{"a": 1}')
    assert sent[4:] == results
    items = gateway.http.get(f"{PATH}/{second['id']}/input_items", params={"order": "asc"}).json()["data"]
    assert [{name: item[name] for name in ("type", "call_id", "output")} for item in items] == results


def test_a_chain_survives_a_restart(engine: FakeEngine, tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, engine.url).start().wait()
    try:
        first = ask(gateway, "one")
        second = ask(gateway, "two", answer_of(first)["id"])
        assert gateway.stop() == 0
        gateway.start().wait()
        third = ask(gateway, "three", answer_of(second)["id"])
        assert third.headers["x-session-id"] == first.headers["x-session-id"]
        assert len(texts(engine.seen(PATH)[2])) == 5
        assert len({request.json["cache_salt"] for request in engine.seen(PATH)}) == 1
        assert gateway.http.get(f"{PATH}/{answer_of(first)['id']}").json()["output"] == answer_of(first)["output"]
    finally:
        gateway.close()


def test_the_next_request_finds_a_turn_that_waits_to_be_recorded(engine: FakeEngine, gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        previous = None
        for number in range(20):
            body = {"model": MODEL, "input": str(number), "stream": True, "previous_response_id": previous}
            with client.stream("POST", PATH, json=body) as response:
                assert response.status_code == 200
                for line in response.iter_lines():  # the answer is known before the stream has ended
                    if line.startswith("data: "):
                        last = json.loads(line[6:])
                previous = last["response"]["id"]
    assert len(texts(engine.seen(PATH)[-1])) == 39


@pytest.mark.anyio
async def test_a_turn_that_is_recorded_while_the_store_is_asked_is_found() -> None:
    kept = StoredResponse("t", "r1", "s", "s", 1.0, {"id": "r1"})

    class Store:
        """Read just before the record, whose turn has left by the time the answer is there."""

        async def response(self, tenant: str, response_id: str) -> StoredResponse | None:
            seen, sessions.in_flight = (None if sessions.in_flight else kept), 0
            return seen

    async def flush() -> None:
        """Everything is recorded."""

    sessions = SimpleNamespace(in_flight=1)
    services: Any = SimpleNamespace(store=Store(), sessions=sessions, recorder=SimpleNamespace(flush=flush))
    assert await stored_responses.serve(services, "t", "GET", b"/v1/responses/r1") == b'{"id":"r1"}'


def test_a_client_may_go_on_before_the_stream_that_told_it_the_id_has_ended(
    engine: FakeEngine, gateway: Gateway
) -> None:
    usual, first = engine.on_other, response_of({}, [said("Hello there!")], usage_of(5, 3))

    def slow_to_end(exchange: Exchange) -> None:
        engine.on_other = usual
        exchange.begin()
        for one in stream_of(first):
            exchange.chunk(one)
        threading.Event().wait(0.05)
        exchange.end()

    engine.on_other = slow_to_end
    body = {"model": MODEL, "input": "one", "stream": True}
    with gateway.http.stream("POST", PATH, json=body) as response:
        lines = response.iter_lines()  # held, as the response is closed with it
        while next(lines) != "event: response.completed":
            pass
        ask(gateway, "two", first["id"])
    assert len(texts(engine.seen(PATH)[1])) == 3


@pytest.mark.parametrize("wrap", [str, lambda name: {"id": name}])
def test_a_conversation_that_a_client_names_is_a_session_and_goes_on_with_all_it_holds(
    engine: FakeEngine, gateway: Gateway, session: str, wrap: Any
) -> None:
    for text in ("one", "two", "three"):
        response = ask(gateway, text, conversation=wrap(session))
        assert response.headers["x-session-id"] == session
    one, two, three = engine.seen(PATH)
    assert texts(three)[::2] == [("user", "one"), ("user", "two"), ("user", "three")]
    assert len(texts(two)) == 3
    # Who sends all of it, has it not twice.
    whole = [{"role": role, "content": text} for role, text in [*texts(three), ("assistant", "Hello there!")]]
    ask(gateway, [*whole, {"role": "user", "content": "four"}], conversation=wrap(session), instructions="be kind")
    last = engine.seen(PATH)[3]
    assert len(texts(last)) == 7
    assert last.json["instructions"] == "be kind"
    assert all("conversation" not in request.json for request in (one, two, three, last))


def test_who_sends_the_whole_history_is_recognised_by_it_in_either_dialect(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    question = {"role": "user", "content": f"one {session}"}
    first = gateway.http.post("/v1/chat/completions", json={"model": MODEL, "messages": [question]})
    reply = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello there!"}]}
    second = ask(gateway, [question, reply, {"role": "user", "content": "two"}])
    history = [question, {"role": "assistant", "content": "Hello there!"}, {"role": "user", "content": "two"}]
    answer = {"role": "assistant", "content": answer_of(second)["output"][0]["content"][0]["text"]}
    messages = [*history, answer, {"role": "user", "content": "three"}]
    third = gateway.http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert len({response.headers["x-session-id"] for response in (first, second, third)}) == 1
    by_id = ask(gateway, "four", answer_of(second)["id"])  # an older point by now
    assert by_id.headers["x-session-id"] != first.headers["x-session-id"]
    gateway.turns(by_id.headers["x-session-id"])
    shown = gateway.http.get(f"/admin/sessions/{by_id.headers['x-session-id']}").json()
    assert (shown["recognised_by"], shown["forked_from"]) == ("fork", first.headers["x-session-id"])


def test_a_session_thawed_from_a_window_goes_on_by_id_with_its_system_message(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    messages = [{"role": "system", "content": "old"}, {"role": "user", "content": "one"}]
    gateway.chat(session, messages=messages, tools=[{"type": "function", "function": {"name": "now"}}])
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    first = answer_of(ask(gateway, "two", session=thawed))
    ask(gateway, "three", first["id"], thawed)
    one, two = engine.seen(PATH)
    window = [("system", "old"), ("user", "one"), ("assistant", "Hello there!")]
    assert texts(one) == [*window, ("user", "two")]
    assert texts(two) == [*window, ("user", "two"), ("assistant", "Hello there!"), ("user", "three")]
    assert one.json["tools"] == two.json["tools"] == [{"type": "function", "name": "now"}]
    refused = gateway.http.post(
        PATH, json={"model": MODEL, "input": "x", "instructions": "new"}, headers={"x-session-id": thawed}
    )
    assert error_of(refused)[:2] == (400, "window_system_conflict")


# --- what cannot go on


def test_an_unknown_id_is_not_found_and_never_reaches_the_engine(engine: FakeEngine, gateway: Gateway) -> None:
    for name in ("resp_unknown", "", "x" * 5000, "a/b", "\u00e9"):
        response = gateway.http.post(PATH, json={"model": MODEL, "input": "x", "previous_response_id": name})
        assert error_of(response) == (404, "previous_response_not_found", "previous_response_id")
    assert engine.seen(PATH) == []


@pytest.mark.anyio
async def test_an_id_of_another_tenant_is_an_id_that_nobody_has(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        mine = answer_of(ask(gateway, "one"))["id"]
        async with SqliteStore(gateway.data_dir / "gateway.db", turns_kept=5) as store:
            await store.record([finished("resp_theirs", tenant="other"), finished(mine, tenant="other")])
            assert await store.response("other", "resp_theirs")
            for method, path in [
                ("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")
            ]:  # fmt: skip
                theirs = gateway.http.request(method, f"{PATH}/resp_theirs{path}")
                nobodys = gateway.http.request(method, f"{PATH}/resp_nobodys{path}")
                assert error_of(theirs) == (404, "response_not_found", None)
                assert theirs.text == nobodys.text.replace("nobodys", "theirs")
            bodies = [
                {"model": MODEL, "input": "x", "previous_response_id": f"resp_{n}"} for n in ("theirs", "nobodys")
            ]
            theirs, nobodys = (gateway.http.post(PATH, json=body) for body in bodies)
            assert theirs.status_code == 404
            assert theirs.text == nobodys.text.replace("nobodys", "theirs")
            assert gateway.http.delete(f"{PATH}/{mine}").status_code == 200
            assert await store.response("other", mine)  # the same id, but not the same answer
    assert len(engine.seen(PATH)) == 1


def finished(response_id: str, tenant: str = "default", session: str = "s", at: float = 1.0) -> TurnRecord:
    """A turn with an answer that is kept."""
    turn = Turn(tenant, session, MODEL, "completed", 200, at, 1.0)
    answer = {"id": response_id, "output": [], "instructions": "long", "tools": []}
    messages = [{"role": "user", "content": response_id}, {"role": "assistant", "content": "a"}]
    response = StoredResponse(tenant, response_id, session, session, at, answer)
    return TurnRecord(
        turn, Session(tenant, session, session), "fp", "salt", messages, {}, Trace(b"", b"", None),
        response=response, asked=[{"role": "user", "content": response_id}],
    )  # fmt: skip


@pytest.mark.anyio
async def test_an_answer_replaces_another_of_its_id_in_its_own_session_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with SqliteStore(tmp_path / "x.db", turns_kept=5) as store:
        await store.record([finished("resp_x", session="first", at=1.0)])
        await store.record([finished("resp_x", session="second", at=2.0), finished("resp_y", session="second", at=3.0)])
        kept = await store.response("default", "resp_x")
        assert kept is not None
        assert (kept.session_id, kept.created_at) == ("first", 1.0)
        assert await store.response("default", "resp_y")
        assert len(await store.turns("default", "second", 5)) == 2  # the turn is recorded all the same
        assert "'resp_x' is that of another session" in caplog.text
        await store.record([finished("resp_x", session="first", at=4.0)])
        again = await store.response("default", "resp_x")
        assert again is not None
        assert again.created_at == 4.0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True}, "background"),
        ({"store": "yes"}, "store"),
        ({"previous_response_id": 7}, "previous_response_id"),
        ({"previous_response_id": "a", "conversation": "b"}, "previous_response_id"),
    ],
)
def test_what_is_not_served_is_refused_by_its_field(
    engine: FakeEngine, gateway: Gateway, body: dict[str, Any], param: str
) -> None:
    response = gateway.http.post(PATH, json={"model": MODEL, "input": "x", **body})
    assert error_of(response) == (400, "invalid_request", param)
    assert engine.seen(PATH) == []


@pytest.mark.parametrize("text", [[], [{"type": "item_reference", "id": "x"}], 7])
def test_an_input_that_cannot_follow_is_refused(engine: FakeEngine, gateway: Gateway, text: Any) -> None:
    start = answer_of(ask(gateway, "one"))["id"]
    response = gateway.http.post(PATH, json={"model": MODEL, "input": text, "previous_response_id": start})
    assert error_of(response) == (400, "invalid_request", "input")
    assert len(engine.seen(PATH)) == 1


def test_an_answer_that_is_more_than_one_message_is_kept_but_not_gone_on_from(
    engine: FakeEngine, gateway: Gateway
) -> None:
    serve(engine, [said("a"), said("b")])
    start = answer_of(ask(gateway, "one"))["id"]
    response = gateway.http.post(PATH, json={"model": MODEL, "input": "x", "previous_response_id": start})
    assert error_of(response) == (400, "invalid_request", "previous_response_id")
    assert len(gateway.http.get(f"{PATH}/{start}").json()["output"]) == 2


def test_what_the_client_did_not_want_stored_is_not(engine: FakeEngine, gateway: Gateway) -> None:
    first = ask(gateway, "one", store=False)
    start = answer_of(first)["id"]
    gateway.turns(first.headers["x-session-id"])
    assert error_of(gateway.http.get(f"{PATH}/{start}")) == (404, "response_not_found", None)
    response = gateway.http.post(PATH, json={"model": MODEL, "input": "x", "previous_response_id": start})
    assert error_of(response)[:2] == (404, "previous_response_not_found")


@pytest.mark.parametrize("how", ["error", "failed", "ended", "cut"])
def test_a_stream_that_broke_is_not_kept(engine: FakeEngine, gateway: Gateway, session: str, how: str) -> None:
    response = response_of({}, [said("one two three")], usage_of(5, 3))
    events = stream_of(response)
    bad = {
        "error": [event("error", 4, code="x", message="it broke", param=None)],
        "failed": [event("response.failed", 4, response={**response, "status": "failed", "error": "it broke"})],
        "ended": [],
        "cut": [events[4][:20]],
    }[how]

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        for one in [*events[:4], *bad]:
            exchange.chunk(one)
        if how == "cut":
            exchange.cut()
        else:
            exchange.end()

    engine.on_other = answer
    with RawHttpClient(gateway.url) as wire:
        body = json.dumps({"model": MODEL, "input": "x", "stream": True}).encode()
        wire.post(PATH, body, f"x-session-id: {session}")
        assert wire.head() == 200
        stream = b"".join(wire.chunks())
    assert stream.startswith(b"".join(events[:4]))
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == ("engine_cut" if how == "cut" else "engine_error")
    assert gateway.http.get(f"{PATH}/{response['id']}").status_code == 404
    if how == "cut":  # the client is told, in an event that goes on counting
        last = json.loads(stream.rpartition(b"data: ")[2])
        assert (last["type"], last["code"], last["sequence_number"]) == ("error", "engine_unreachable", 4)
        assert stream.rpartition(b"\n\nevent: ")[2].startswith(b"error\n")


# --- asking for them


def test_a_kept_answer_is_what_the_client_got_and_what_only_the_gateway_knows(
    engine: FakeEngine, gateway: Gateway
) -> None:
    first = answer_of(ask(gateway, "one", instructions="long", tools=[TOOL], metadata={"a": "b"}))
    second = answer_of(ask(gateway, "two", first["id"], stream=True))
    for answer, previous in ((first, None), (second, first["id"])):
        kept = gateway.http.get(f"{PATH}/{answer['id']}")
        assert kept.headers["content-type"] == "application/json"
        assert kept.json() == {**answer, "previous_response_id": previous, "store": True}


def test_an_answer_that_is_deleted_is_gone_and_what_went_on_from_it_stays(engine: FakeEngine, gateway: Gateway) -> None:
    first = answer_of(ask(gateway, "one"))["id"]
    second = answer_of(ask(gateway, "two", first))["id"]
    assert gateway.http.delete(f"{PATH}/{first}").json() == {"id": first, "object": "response", "deleted": True}
    assert error_of(gateway.http.delete(f"{PATH}/{first}")) == (404, "response_not_found", None)
    assert error_of(gateway.http.get(f"{PATH}/{first}")) == (404, "response_not_found", None)
    assert gateway.http.get(f"{PATH}/{first}/input_items").status_code == 404
    ask(gateway, "three", second)
    assert len(texts(engine.seen(PATH)[-1])) == 5


def test_a_deleted_session_takes_its_answers_with_it(engine: FakeEngine, gateway: Gateway) -> None:
    first = ask(gateway, "one")
    fork = ask(gateway, "x", answer_of(ask(gateway, "other"))["id"])
    gateway.turns(first.headers["x-session-id"])
    assert gateway.http.delete(f"/admin/sessions/{first.headers['x-session-id']}").status_code == 200
    assert gateway.http.get(f"{PATH}/{answer_of(first)['id']}").status_code == 404
    assert gateway.http.get(f"{PATH}/{answer_of(fork)['id']}").status_code == 200


def test_input_items_come_in_pages_newest_first(engine: FakeEngine, gateway: Gateway) -> None:
    items = [
        {"role": "user", "content": "0"},
        {"type": "message", "id": "msg_mine", "role": "assistant", "content": [{"type": "output_text", "text": "1"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "2"}]},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
    ]
    path = f"{PATH}/{answer_of(ask(gateway, items))['id']}/input_items"
    every = gateway.http.get(path).json()
    assert [item["type"] for item in every["data"]] == [
        "function_call_output", "function_call", "message", "message", "message",
    ]  # fmt: skip
    assert [item["content"][0] for item in every["data"][2:]] == [
        {"type": "input_text", "text": "2"}, {"type": "output_text", "text": "1"}, {"type": "input_text", "text": "0"},
    ]  # fmt: skip
    assert (every["object"], every["has_more"]) == ("list", False)
    assert (every["first_id"], every["last_id"]) == (every["data"][0]["id"], every["data"][-1]["id"])
    assert every["data"][3]["id"] == "msg_mine"
    assert len({item["id"] for item in every["data"]}) == 5
    page = gateway.http.get(path, params={"limit": 2, "order": "asc"}).json()
    assert (len(page["data"]), page["has_more"], page["last_id"]) == (2, True, "msg_mine")
    rest = gateway.http.get(path, params={"limit": 3, "order": "asc", "after": "msg_mine"}).json()
    assert [*page["data"], *rest["data"]] == every["data"][::-1]
    assert rest["has_more"] is False
    after = gateway.http.get(path, params={"after": every["last_id"]}).json()
    assert after == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    for bad in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "nobody"}):
        assert gateway.http.get(path, params=bad).status_code == 400
    unknown = gateway.http.get(path, params={"lmit": 1}).json()["error"]
    assert (unknown["code"], unknown["param"]) == ("unknown_parameter", "lmit")


def test_the_openai_client_reads_what_is_kept(engine: FakeEngine, gateway: Gateway) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        first = client.responses.create(model=MODEL, input="one")
        second = client.responses.create(model=MODEL, input="two", previous_response_id=first.id)
        kept = client.responses.retrieve(second.id)
        assert (kept.output_text, kept.previous_response_id) == ("Hello there!", first.id)
        (item,) = client.responses.input_items.list(second.id)
        assert item.content[0].text == "two"  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
            client.responses.cancel(second.id)
        with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
            list(client.responses.retrieve(second.id, stream=True))
        client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError, match=second.id):
            client.responses.retrieve(second.id)
        with pytest.raises(openai.NotFoundError) as unknown:
            client.responses.create(model=MODEL, input="x", previous_response_id=second.id)
    assert (unknown.value.code, unknown.value.param) == ("previous_response_not_found", "previous_response_id")


def test_of_other_paths_the_engine_gets_those_that_are_known(engine: FakeEngine, gateway: Gateway) -> None:
    engine.on_other = lambda exchange: exchange.json({"target": exchange.request.target})
    assert gateway.http.post(f"{PATH}/render", json={}).json() == {"target": f"{PATH}/render"}
    for method, path in [("POST", "/compact"), ("PATCH", "/resp_1"), ("GET", "/resp_1/x")]:
        answer = gateway.http.request(method, f"{PATH}{path}", json={} if method == "POST" else None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert [request.target for request in engine.asked] == [f"{PATH}/render"]


# --- what is kept, and for how long


@pytest.mark.anyio
async def test_only_so_many_answers_are_kept_for_each_tenant_and_nothing_of_the_others(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5, responses_kept=3) as store:
        for number in range(8):
            await store.record([finished(f"r{number}", session=f"s{number}", at=float(number))])
        await store.record([finished("theirs", tenant="other", session="t")])
        kept = [number for number in range(8) if await store.response("default", f"r{number}")]
        assert kept == [5, 6, 7]
        assert await store.response("other", "theirs")
        oldest = await store.response("default", "r5")
        assert oldest is not None
        assert oldest.asked is not None
        assert oldest.transcript is not None
        assert oldest.answer == {"id": "r5", "output": [], "instructions": "long", "tools": []}
        for number in (5, 6, 7):  # what only the answer holds stays as long as the answer
            assert await store.delete_session("default", f"s{number - 5}")
            assert await store.messages(oldest.asked) == [{"role": "user", "content": "r5"}]
        assert await store.delete_response("default", "r6")
        assert not await store.delete_response("default", "r6")
        assert await store.messages(oldest.transcript) == [
            {"role": "user", "content": "r5"}, {"role": "assistant", "content": "a"},
        ]  # fmt: skip
        assert await store.delete_session("default", "s5")
        assert await store.response("default", "r5") is None
        assert await store.messages(oldest.asked) == []


def test_many_at_once_go_on_from_one_answer(engine: FakeEngine, gateway: Gateway) -> None:
    start = answer_of(ask(gateway, "one"))["id"]
    answers: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(answer_of(ask(gateway, str(n), start)))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["id"] for answer in answers}) == 8
    for answer in answers:  # whichever came last in their session, each goes on from itself
        ask(gateway, "next", answer["id"])
        sent = texts(engine.seen(PATH)[-1])
        assert len(sent) == 5
        items = gateway.http.get(f"{PATH}/{answer['id']}/input_items").json()["data"]
        assert sent[2] == ("user", items[0]["content"][0]["text"])
