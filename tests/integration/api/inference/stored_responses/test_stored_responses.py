"""The Responses API: conversations continued by the id of a response."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gateway.api.inference import stored_responses
from gateway.records import StoredResponse
from gateway.sessions.active_turns import ActiveTurns
from gateway.store.sqlite import SqliteStore
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine
from tests.support.fakes.responses import PATH, called, response_of, said, serve, stream_of, usage_of
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.stored_answers import TOOL, answer_of, ask, error_of, finished, texts


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


def test_system_messages_of_the_input_keep_their_place(engine: FakeEngine, gateway: Gateway) -> None:
    first = answer_of(ask(gateway, [{"role": "developer", "content": "d"}, {"role": "user", "content": "one"}]))
    later = [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}]
    ask(gateway, later, first["id"], instructions="be kind")
    assert texts(engine.seen(PATH)[1]) == [
        ("developer", "d"), ("user", "one"), ("assistant", "Hello there!"), ("system", "s"), ("user", "two"),
    ]  # fmt: skip


def test_continuing_an_older_response_forks_within_the_lineage(engine: FakeEngine, gateway: Gateway) -> None:
    first = ask(gateway, "one")
    start = answer_of(first)["id"]
    second = answer_of(ask(gateway, "two", start))
    fork = ask(gateway, "other", start)
    mine, theirs = first.headers["x-session-id"], fork.headers["x-session-id"]
    assert mine != theirs
    assert len({request.json["cache_salt"] for request in engine.seen(PATH)}) == 1
    assert texts(engine.seen(PATH)[2]) == [("user", "one"), ("assistant", "Hello there!"), ("user", "other")]
    assert answer_of(fork)["usage"]["input_tokens_details"]["cached_tokens"] > 0
    # Both continue, each in its own session.
    assert ask(gateway, "x", second["id"]).headers["x-session-id"] == mine
    assert ask(gateway, "x", answer_of(fork)["id"]).headers["x-session-id"] == theirs
    gateway.turns(theirs, 2)
    sessions = [gateway.http.get(f"/admin/sessions/{name}").json() for name in (mine, theirs)]
    assert [one["turn_count"] for one in sessions] == [3, 2]
    assert sessions[0]["lineage"] == sessions[1]["lineage"] == mine


def test_the_session_that_a_client_names_is_continued(engine: FakeEngine, gateway: Gateway, session: str) -> None:
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


def test_tool_results_continue_a_response_by_id(engine: FakeEngine, gateway: Gateway) -> None:
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
    store: Any = Store()
    services: Any = SimpleNamespace(
        store=store, sessions=sessions, turns=ActiveTurns(store), recorder=SimpleNamespace(flush=flush)
    )
    assert await stored_responses.serve(services, "t", "GET", b"/v1/responses/r1") == b'{"id":"r1"}'


def test_a_client_continues_a_response_whose_stream_has_not_ended(engine: FakeEngine, gateway: Gateway) -> None:
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
def test_a_named_conversation_is_a_session_with_its_whole_history(
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


def test_a_client_is_recognised_by_its_history_in_either_api(
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


def test_a_thawed_session_is_continued_by_response_id_with_its_system_message(
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


def test_an_unknown_id_is_not_found_and_never_reaches_the_engine(engine: FakeEngine, gateway: Gateway) -> None:
    for name in ("resp_unknown", "", "x" * 5000, "a/b", "\u00e9"):
        response = gateway.http.post(PATH, json={"model": MODEL, "input": "x", "previous_response_id": name})
        assert error_of(response) == (404, "previous_response_not_found", "previous_response_id")
    assert engine.seen(PATH) == []


@pytest.mark.sqlite
@pytest.mark.anyio
async def test_an_id_of_another_tenant_is_unknown(engine: FakeEngine, tmp_path: Path) -> None:
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
